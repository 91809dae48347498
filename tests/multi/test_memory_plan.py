"""What a rank holds is what the plan says; what is too much for one fits on four."""

import gc
import json
import subprocess
import sys
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate

import pytest
import torch
import torch._dynamo  # optimizers import it when first made: here, not in each rank
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
from torch import nn
from torch.profiler import ProfilerActivity, profile

import accelx as ax
from accelx import deferred
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


def highest(fn):
    """What `fn` returns, and the most bytes that tensors took in it at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = fn()
    events = seen.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return result, max(accumulate(sizes))


def held(env, chained, axes):
    """Bytes of weights, gradients and optimizer state, counted and as reported.

    And the most at a time of another forward and backward pass.
    """
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
    moments, here = sum(x.nbytes for x in kept), rows()
    _, most = highest(lambda: ax.grads(tx, loss)(state, here))
    return [*counted, moments], found, counted[0] + moments + most


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
    for name, (chained, axes, _) in PLANS.items():
        found[name] = simulate(
            chained, made, adam, loss, rows(), world=RANKS, axes=axes, rank=RANKS - 1
        )
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
        counted, reported, _ = rank[name]
        assert counted == wanted
        assert reported[0] == slice_
        assert reported[2] == wanted[2]
    plan = simulated()[name]
    assert [plan.weights, plan.gradients, plan.optimizer] == wanted


THREADS = 2  # of gloo, each of which lets go of a collective's tensors when it wakes
LITTLE = 1024  # bytes of losses and counts


@pytest.mark.parametrize("name", PLANS)
def test_the_peak_is_that_of_the_plan(name):
    """Beyond it is what a collective has that has ended, of each thread of gloo.

    That of slices has a block, a copy of it that is summed, and a slice; hsdp has a
    group more, which sums a slice. Without what is gathered the plan would be too low.
    """
    axes, plan = PLANS[name][1], simulated()[name]
    block = WHOLE // DEEP // (2 if "tensor=2" in axes else 1)
    slices = {"hsdp": 2, "fsdp2": 4, "fsdp2-tensor": 2}.get(name, 1)
    late = THREADS * (2 * block + (2 if name == "hsdp" else 1) * block // slices)
    ready = plan.gradients if name == "ddp" else 0  # its buckets stay
    for rank in real():
        above = rank[name][2] + ready - plan.peak
        assert -LITTLE < above < LITTLE + late * (name != "ddp"), (name, above / block)
    gathers = slices > 1
    assert (plan.peak - plan.total > 2.5 * block) == gathers


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

    With gradients, and after the step. And the most that each half of another takes.
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
        reports.append(reported(env, state))
        gc.unfreeze()
        here = rows()
        (state, out), high = highest(partial(ax.grads(tx, loss), state, here))
        _, update = highest(partial(ax.apply(tx), state, out))
        found[stage, offload] = reports, high, update
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


without = pytest.mark.skipif(find_spec("deepspeed") is None, reason="no deepspeed")


@cache
def zeros():
    """Every stage on two ranks."""
    return run(2, timeout=120)(zero)()


@without
def test_zero_holds_what_its_stages_say():
    """Moments and gradients in slices at each stage, weights at the third.

    No tensor is left out of the report: what it says is what the process has more.
    """
    half = WHOLE // 2
    for rank in zeros():
        for (stage, _), (reports, *_) in rank.items():
            (first, _), (last, _) = reports
            assert last["parameters"] == (half if stage == 3 else WHOLE)
            assert first["master weights"] == last["master weights"] == half
            assert half <= first["gradients"] <= WHOLE  # offloaded ones twice
            assert WHOLE <= last["optimizer state"] <= WHOLE + COUNTS
            assert [left for _, left in reports] == pytest.approx([0, 0], abs=SMALL)


PEAKS = {  # (stage, offload): least and most of a pass, in sizes of all weights
    (1, False): (1.5, 1.5),  # gradients whole, and then a slice of them
    (2, False): (0.5, 1.5),  # reduced as they come
    (2, True): (0.3, 1.0),  # slices are kept between steps
    (3, False): (2.0, 2.0),  # all weights gathered, and kept by autograd
    (3, True): (2.0, 2.0),
}


@without
def test_zero_takes_for_a_moment_what_its_page_says():
    """Beside what it holds; the update takes up to three slices."""
    block = WHOLE // DEEP
    late = THREADS * 5 * (block // 2) // 2  # of a weight, its copy and its slice
    for rank in zeros():
        for case, (_, high, update) in rank.items():
            least, most = (WHOLE * times for times in PEAKS[case])
            assert least <= high <= most + block + late, (case, high / WHOLE)
            assert WHOLE // 2 <= update <= 3 * WHOLE // 2 + LITTLE, (case, update)


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


TIGHT, TIGHT_BLOCKS = 62 * MB, 32  # all weights are 64 MiB
LEAST = {  # nothing is gathered ahead of its use, nor a large part updated at once
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "sub_group_size": LARGE * LARGE * 4,
    "reduce_bucket_size": 1000,
}


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def sliced(env, more):
    """Losses of two steps at the third stage of ZeRO, within so many bytes."""
    env, tx = ax.connect(env), ax.identity
    if env.world > 1:
        config = {"zero_optimization": {**STAGES[3], **LEAST}}
        place = ax.shard_model(env, "deepspeed", stage=3, config=config)
        tx = ax.chain(place, ax.remat("*"))
    step = ax.step(tx, loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferred.build, "__defaults__", (MB,))  # to hold at a time
        step(ax.init(tx, made, sgd), rows())
        if more:
            limit(more)
        state = ax.init(tx, lambda: made(LARGE, TIGHT_BLOCKS), sgd)
    state, out = step(state, rows(LARGE))
    look = ax.measure(tx, lambda model, x: {"loss": loss(model, x)})
    after = ax.reduce(env, look(state, rows(LARGE)))["loss"]
    return [float(out.loss), float(after.value)]


def failed(env, more):
    """What the error says where that does not fit."""
    try:
        trained(env, more)
    except RuntimeError as error:
        return "\n".join([str(error), *error.__notes__])


@cache
def in_a_new_process(name):
    """What ranks of a process find whose heap no other test has used."""
    program = [sys.executable, "-m", "tests.multi.test_memory_plan", name]
    done = subprocess.run(program, capture_output=True, text=True, timeout=270)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_a_model_too_large_for_one_rank_trains_on_four():
    """Under a real limit of each rank, with the losses of one that has none."""
    found = in_a_new_process("large")
    assert found["one"] is not None
    assert "parameters 50.3 MB, gradients 50.3 MB" in found["one"]
    assert 'shard_model(env, "fsdp2")' in found["one"]
    for losses in found["four"]:
        assert losses == pytest.approx(found["free"], rel=1e-5)
    assert abs(found["free"][0] - found["free"][1]) > 1e-3  # a step was made


@linux
@without
def test_zero_trains_in_less_than_all_weights_take():
    """Stage 3, weight by weight, with blocks computed again in the backward pass."""
    found = in_a_new_process("tight")
    assert TIGHT < TIGHT_BLOCKS * 8 * LARGE * LARGE * FLOAT
    assert "allocate memory" in found["one"]
    for losses in found["four"]:
        assert losses == pytest.approx(found["free"], rel=1e-5)
    assert abs(found["free"][0] - found["free"][1]) > 1e-3


def whole(env, more):
    """What the error says of the weights alone, within so many bytes."""
    limit(more)
    try:
        made(LARGE, TIGHT_BLOCKS)
    except RuntimeError as error:
        return str(error)


def three(trains, fails, room):
    """One process without a limit; one with it; four with it."""
    found = {"free": run(1)(trains)(None)[0], "one": run(1)(fails)(room)[0]}
    return found | {"four": run(4, timeout=200)(trains)(room)}


if __name__ == "__main__":
    if sys.argv[1] == "tight":
        import_module("deepspeed")  # here, not in each rank
        print(json.dumps(three(sliced, whole, TIGHT)))
    else:
        print(json.dumps(three(trained, failed, ROOM)))
