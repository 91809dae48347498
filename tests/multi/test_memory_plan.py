"""What a rank holds is what the plan says; what is too much for one fits on four."""

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


def zero(env):
    """Bytes of weights, gradients and optimizer state at each stage of ZeRO."""
    found, small = {}, {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    for stage in (1, 2, 3):
        config = small if stage == 3 else None
        tx = ax.shard_model(env, "deepspeed", stage=stage, config=config)
        state, out = ax.grads(tx, loss)(ax.init(tx, made, adam), rows())
        theirs = state.slots["shard_model"].handle.zero
        weights = [getattr(p, "ds_tensor", p) for p in state.model.parameters()]
        grads = [g for some in theirs.averaged_gradients.values() for g in some]
        counted = [sum(x.nbytes for x in some) for some in (weights, grads)]
        state, _ = ax.apply(tx)(state, out)
        kept = [x for s in state.optim.state.values() for x in s.values() if x.dim()]
        found[stage] = [*counted, sum(x.nbytes for x in kept)]
    return found


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is missing")
def test_zero_holds_what_its_stages_say():
    """Moments and gradients in slices at each stage, weights at the third."""
    half = WHOLE // 2
    for rank in run(2, timeout=120)(zero)():
        assert rank[1] == rank[2] == [WHOLE, half, WHOLE]
        assert rank[3] == [half, half, WHOLE]


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
