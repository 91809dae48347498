"""What a rank holds is what the plan says; what is too much for one fits on four."""

import gc
import json
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest
import torch
import torch._dynamo  # optimizers import it when first made: here, not in each rank
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
from torch import nn

import accelx as ax
from accelx.env_rest import rest
from accelx.simulate import simulate
from accelx.testing import run
from tests.laws import training as t
from tests.limits import limit

# torch says it where shapes are taken of tensors that have a gradient
quiet_shapes = pytest.mark.filterwarnings("ignore:The .grad attribute of:UserWarning")
pytestmark = [pytest.mark.multi, t.quiet_views, quiet_shapes]
WIDTH, DEEP, RANKS, FLOAT = 32, 3, 4, 4
WHOLE = DEEP * 8 * WIDTH * WIDTH * FLOAT  # bytes of all weights
COUNTS = 2 * DEEP * FLOAT  # AdamW's own counts of steps, a number for each weight
MB = 2**20


class Block(nn.Module):
    """Two Linears with nothing else to hold."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def made(width=WIDTH, deep=DEEP):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(deep)))


def loss(model, x):
    return model(x).square().mean()


def adam(model):
    return torch.optim.AdamW(model.parameters(), 1e-3)


def rows(width=WIDTH):
    """One rank's rows."""
    return torch.linspace(-1, 1, 2 * width).view(2, width)


def sharded(kind, **options):
    return lambda env: ax.shard_model(env, kind, **options)


def split(kind):
    plan = {"*.up": "column", "*.down": "row"}
    place = sharded(kind, blocks="*")
    return lambda env: ax.chain(place(env), ax.shard_tensors(env, plan))


PLANS = {  # name: (chain, axes, on how many ranks the weights are spread)
    "ddp": (sharded("ddp"), "data=4", 1),
    "fsdp2": (sharded("fsdp2", blocks="*"), "data=4", 4),
    "hsdp": (sharded("hsdp", blocks="*"), "replicate=2,shard=2", 2),
    "tensor": (split("ddp"), "data=2,tensor=2", 2),
    "fsdp2-tensor": (split("fsdp2"), "data=2,tensor=2", 4),
}


def held(env, chained, axes):
    """Bytes of weights, gradients and optimizer state, counted and as reported."""
    env = ax.connect(env, axes=axes)
    tx = chained(env)
    state, out = ax.grads(tx, loss)(ax.init(tx, made, adam), rows())
    weights = [t.local(p) for p in state.model.parameters()]
    grads = [t.local(p.grad) for p in state.model.parameters()]
    found = [ax.memory_report(env, state).of(n) for n in ("parameters", "gradients")]
    counted = [sum(x.nbytes for x in some) for some in (weights, grads)]
    state, _ = ax.apply(tx)(state, out)
    kept = [t.local(x) for s in state.optim.state.values() for x in s.values()]
    found.append(ax.memory_report(env, state).of("optimizer state"))
    return [*counted, sum(x.nbytes for x in kept)], found


@cache
def real():
    """Every plan on four ranks."""
    cases = {name: case[:2] for name, case in PLANS.items()}
    return run(RANKS, timeout=120)(
        lambda env: {name: held(env, *case) for name, case in cases.items()}
    )()


def planned(env):
    """Every plan without ranks, as the last of four would have it."""
    found = {}
    for name, (chained, axes, _) in list(PLANS.items())[1:]:  # torch's DDP cannot be
        plan = simulate(
            chained, made, adam, loss, rows(), world=RANKS, axes=axes, rank=RANKS - 1
        )
        found[name] = [plan.weights, plan.gradients, plan.optimizer]
    return found


@cache
def simulated():
    return run(1, timeout=120)(planned)()[0]


@pytest.mark.parametrize("name", PLANS)
def test_a_rank_holds_what_the_plan_says(name):
    """To the byte: the closed form, what is counted, what is reported and simulated."""
    slice_ = WHOLE // PLANS[name][2]
    wanted = [slice_, slice_, 2 * slice_ + COUNTS]
    for rank in real():
        counted, reported = rank[name]
        assert counted == wanted
        assert reported[0] == slice_
        assert reported[2] == wanted[2]
    assert name == "ddp" or simulated()[name] == wanted


SMALL = 200  # bytes of numbers that no report counts
STAGES = {1: {}, 2: {}, 3: {"stage3_param_persistence_threshold": 0}}
AWAY = {"offload_param": {"device": "cpu"}, **STAGES[3]}  # and the optimizer


def storages():
    """Bytes of all storages that tensors have which are not frozen (by gc)."""
    gc.collect()
    kinds = (torch.Tensor, nn.Parameter)
    dense = [x for x in gc.get_objects() if type(x) in kinds]
    found = [x.untyped_storage() for x in dense if x.layout is torch.strided]
    held = {x.data_ptr(): x.nbytes() for x in found if x.device.type != "meta"}
    return sum(held.values())


def zero(env):
    """What is reported of each stage of ZeRO, and the bytes that are in no report.

    With gradients, and after the step.
    """
    found = {}
    for stage, offload in ((1, False), (2, False), (2, True), (3, False), (3, True)):
        part = AWAY if stage == 3 and offload else STAGES[stage]
        config = {"zero_optimization": {**part, "reduce_bucket_size": 1000}}
        tx = ax.shard_model(
            env, "deepspeed", stage=stage, offload=offload, config=config
        )
        gc.freeze()
        state, out = ax.grads(tx, loss)(ax.init(tx, made, adam), rows())
        reports = [reported(env, state)]
        state, _ = ax.apply(tx)(state, out)
        found[stage, offload] = [*reports, reported(env, state)]
    return found


def reported(env, state):
    """What a report says of each part; bytes of tensors that it does not count."""
    report = ax.memory_report(env, state)
    parts = {name: report.of(name) for name in {one.what for one in report.held}}
    for _ in range(20):  # gloo's threads let go of what they sent a little later
        left = storages() - sum(parts.values())
        if abs(left) < SMALL:
            break
        rest()
    return parts, left


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is missing")
def test_zero_holds_what_its_stages_say():
    """Moments and gradients in slices at each stage, weights at the third.

    No tensor is left out of the report: what it says is what the process has more.
    """
    half = WHOLE // 2
    for rank in run(2, timeout=120)(zero)():
        for (stage, _), reports in rank.items():
            (first, _), (last, _) = reports
            assert last["parameters"] == (half if stage == 3 else WHOLE)
            assert first["master weights"] == last["master weights"] == half
            assert half <= first["gradients"] <= WHOLE  # offloaded ones twice
            assert WHOLE <= last["optimizer state"] <= WHOLE + COUNTS
            assert [left for _, left in reports] == pytest.approx([0, 0], abs=SMALL)


LARGE, BLOCKS, ROOM = 256, 24, 112 * MB  # 48 MiB of weights, 192 with all the rest


def trained(env, more):
    """Losses of two steps of a large model, with so many bytes beyond a first step."""
    env = ax.connect(env)
    tx = ax.shard_model(env, "fsdp2", blocks="*")
    step = ax.step(tx, loss)
    step(ax.init(tx, made, adam), rows())  # imports, threads and buffers of gloo
    if more:
        limit(more)
    state, losses = ax.init(tx, lambda: made(LARGE, BLOCKS), adam), []
    for _ in range(2):
        state, out = step(state, rows(LARGE))
        losses.append(float(out.loss))
    return losses


def failed(env, more):
    """What the error says where that does not fit."""
    try:
        trained(env, more)
    except RuntimeError as error:
        return "\n".join([str(error), *error.__notes__])


@cache
def in_a_new_process():
    """What ranks of a process find whose heap no other test has used."""
    program = [sys.executable, "-m", "tests.multi.test_memory_plan"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_too_large_for_one_rank_trains_on_four():
    """Under a real limit of each rank, with the losses of one that has none."""
    found = in_a_new_process()
    assert found["one"] is not None
    assert "parameters 50.3 MB, gradients 50.3 MB" in found["one"]
    assert 'shard_model(env, "fsdp2")' in found["one"]
    for losses in found["four"]:
        assert losses == pytest.approx(found["free"], rel=1e-5)
    assert abs(found["free"][0] - found["free"][1]) > 1e-3  # a step was made


if __name__ == "__main__":
    found = {"free": run(1)(trained)(None)[0], "one": run(1)(failed)(ROOM)[0]}
    print(json.dumps(found | {"four": run(4, timeout=120)(trained)(ROOM)}))
