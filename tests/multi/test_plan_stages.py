"""Simulated stages and experts hold and send what those of real ranks do."""

import gc
from functools import cache
from itertools import accumulate

import pytest
import torch
import torch._dynamo  # optimizers import it when first made: here, not in each rank
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor.parallel
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import accelx as ax
from accelx.env_part import along
from accelx.env_rest import rest
from accelx.simulate import simulate
from accelx.testing import run
from tests.laws import training as t

# torch says it where shapes are taken of tensors that have a gradient
quiet_shapes = pytest.mark.filterwarnings("ignore:The .grad attribute of:UserWarning")
pytestmark = [pytest.mark.multi, t.quiet_views, quiet_shapes]
WIDTH, ROWS, RANKS, FLOAT, N = 32, 8, 4, 4, 4
BLOCK = 8 * WIDTH * WIDTH * FLOAT  # bytes of its weights
CROSSING = ROWS * WIDTH * FLOAT  # bytes of all rows between two blocks
EXPERTS, EACH = 4, 2
THREADS = 2  # of gloo, each of which lets go of a collective's tensors when it wakes


class Block(nn.Module):
    """Two Linears with nothing else to hold."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Experts(nn.Module):
    """Each with a square of weights; it goes through those that have tokens."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 8)

    def forward(self, tokens, index, weights):
        made = torch.zeros_like(tokens)
        for expert in index.unique():
            row, which = torch.where(index == expert)
            part = tokens[row] @ self.weight[expert] * weights[row, which, None]
            made = made.index_add(0, row, part)
        return made


class Mixture(nn.Module):
    """Tokens in turn to all pairs of experts, so that each gets as many."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)
        self.experts = Experts()

    def forward(self, x):
        index = (torch.arange(EACH * len(x)) % EXPERTS).view(len(x), EACH)
        index = index + torch.zeros_like(x[:, :EACH], dtype=torch.int64)  # as x is
        return x + self.experts(self.up(x), index, torch.ones(len(x), EACH))


def made():
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4)))


def mixed():
    torch.manual_seed(0)
    return nn.Sequential(Mixture(), Mixture())


def loss(model, x):
    return model(x).square().mean()


def adam(model):
    return torch.optim.AdamW(model.parameters(), 1e-3)


def rows():
    """One rank's rows."""
    return torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH)


def staged(kind, schedule, split=("2",), tensor=False):
    def chained(env):
        place = ax.shard_model(env, kind, blocks="*")
        plan = {"*.up": "column", "*.down": "row"}
        cut = [ax.shard_tensors(env, plan)] if tensor else []
        return ax.chain(ax.shard_stages(env, split, N, schedule), place, *cut)

    return chained


def dealt(kind, stages=False):
    def chained(env):
        cut = [ax.shard_stages(env, "1", N)] if stages else []
        deal = ax.shard_experts(env, "*.experts")
        return ax.chain(deal, ax.shard_model(env, kind, blocks="*"), *cut)

    return chained


FOUR = ("1", "2", "3")
CASES = {  # name: (model, chain, axes)
    "gpipe": (made, staged("ddp", "gpipe"), "data=2,stage=2"),
    "1f1b": (made, staged("ddp", "1f1b"), "data=2,stage=2"),
    "fsdp2": (made, staged("fsdp2", "1f1b"), "data=2,stage=2"),
    "interleaved": (made, staged("ddp", "interleaved", FOUR), "data=2,stage=2"),
    "zbv": (made, staged("ddp", "zbv", FOUR), "data=2,stage=2"),
    "tensor": (made, staged("ddp", "1f1b", tensor=True), "stage=2,tensor=2"),
    "experts": (mixed, dealt("fsdp2"), "data=2,expert=2"),
    "experts-stages": (mixed, dealt("ddp", True), "stage=2,expert=2"),
}


class Counted(TorchDispatchMode):
    """Bytes that leave this rank for others, of each kind."""

    def __init__(self):
        super().__init__()
        self.stages = self.exchanged = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.c10d.send.default and args[0][0].dim() > 1:
            self.stages += args[0][0].nbytes
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            rank = torch.distributed.get_rank() % 2  # the axis expert is the last
            others = args[2][1 - rank]
            self.exchanged += args[0].nbytes * others // sum(args[2])
        return func(*args, **(kwargs or {}))


def buffers(state):
    """Bytes of what schedules receive into, and of its gradients."""
    stages = state.slots["shard_model"].stages
    if stages is None:
        return 0
    [(_, pipes)] = stages.routes.values()
    [pipe] = pipes.values()
    own = getattr(pipe.schedule, "_stages", None) or [pipe.schedule._stage]
    infos = [i for s in own for one in s.args_recv_info.values() for i in one]
    infos += [i for s in own for one in s.grad_recv_info.values() for i in one]
    there = [i.buffer for i in infos if i.buffer is not None]
    there += [b.grad for b in there if b.grad is not None]
    return sum({b.data_ptr(): b.nbytes for b in there}.values())  # some are shared


def highest(fn):
    """The most bytes that tensors took in `fn` at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        fn()
    events = seen.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(sizes))


def settled(env):
    """Let gloo's threads go of what they have: they do when they get other things."""
    for _ in range(2 * THREADS):
        for axis in env.axes:
            ax.gather_objects(along(env, axis.name), None)
    rest()


def held(env, make, chained, axes):
    """What one rank holds and sends, and the most at a time in a second pass."""
    env = ax.connect(env, axes=axes)
    tx = chained(env)
    with Counted() as sent:
        state, out = ax.grads(tx, loss)(ax.init(tx, make, adam), rows())
    weights = sum(t.local(p).nbytes for p in state.model.parameters())
    grads = sum(t.local(p.grad).nbytes for p in state.model.parameters())
    state, _ = ax.apply(tx)(state, out)
    kept = [t.local(x) for s in state.optim.state.values() for x in s.values()]
    moments, waits, here = sum(x.nbytes for x in kept), buffers(state), rows()
    del out, kept
    gc.collect()
    settled(env)
    most = highest(lambda: ax.grads(tx, loss)(state, here))
    peak = weights + moments + waits + most
    return weights, grads, moments, waits, sent.stages, sent.exchanged, peak


@cache
def real():
    """Every case on four ranks."""
    return run(RANKS, timeout=200)(
        lambda env: {name: held(env, *case) for name, case in CASES.items()}
    )()


def planned(env, rank):
    """Every case without ranks: torch remembers meshes, so of one rank in a process."""
    found = {}
    for name, (make, chained, axes) in CASES.items():
        found[name] = simulate(
            *(chained, make, adam, loss, rows()), world=RANKS, axes=axes, rank=rank
        )
    return found


@cache
def simulated():
    """Of the first rank, and of the last."""
    return {rank: run(1, timeout=200)(planned)(rank)[0] for rank in (0, RANKS - 1)}


LITTLE = 1024  # bytes of losses and counts
PIECE = 4 * WIDTH * FLOAT * ROWS // N  # bytes of a microbatch inside a block


@pytest.mark.parametrize("name", CASES)
def test_a_rank_holds_and_sends_what_the_plan_says(name):
    """To the byte: weights, gradients, moments, what is received into, what is sent."""
    for rank, plans in simulated().items():
        plan, sent = plans[name], plans[name].sent
        *wanted, _ = real()[rank][name]
        ways = sent.get("to other stages", 0), sent.get("exchanged", 0)
        found = [plan.weights, plan.gradients, plan.optimizer, plan.received, *ways]
        assert found == wanted
        assert any(ways)
        assert plan.total == sum(found[:4]) + plan.activations


def test_what_crosses_follows_closed_forms():
    """Rows between two stages, once each way; tokens to experts and back, twice."""
    plans = simulated()[0]
    for name, hops in {"gpipe": 1, "1f1b": 1, "fsdp2": 1, "interleaved": 3}.items():
        assert plans[name].sent["to other stages"] == hops * CROSSING
        assert plans[name].received == hops * CROSSING
    assert plans["1f1b"].sent["reduced"] == 2 * BLOCK  # of 2 copies, half of them twice
    half = ROWS * EACH // 2  # rows that go to the other rank of two
    tokens, which = 4 * half * WIDTH * FLOAT, half * 8
    assert plans["experts"].sent["exchanged"] == 2 * (tokens + which)


def test_activations_are_those_of_the_microbatches_in_flight():
    """In flight are all, or as many as stages that follow; the batch itself is one."""
    inside, between = 2 * PIECE, PIECE // 4  # of a stage's two blocks
    first, last = simulated().values()
    for name, ahead in {"gpipe": (N, N), "1f1b": (2, 1), "fsdp2": (2, 1)}.items():
        wanted = CROSSING + ahead[0] * (inside + between)
        assert first[name].activations == wanted
        assert last[name].activations == ahead[1] * (inside + 2 * between)


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_that_of_the_plan(name):
    """But for what gloo holds of collectives that have ended, and what is sent on.

    Of slices that is a block, a copy of it that is summed, and a slice.
    """
    late = THREADS * (2 * BLOCK + BLOCK // 2) if name == "fsdp2" else BLOCK // 2
    for rank, plans in simulated().items():
        plan = plans[name]
        above = real()[rank][name][-1] - plan.peak
        assert abs(above) < LITTLE + late + plan.sent.get("to other stages", 0)
        after = plan.total - plan.activations  # of all backward passes
        if name in ("gpipe", "1f1b"):  # gradients, and the copy of them that is summed
            assert plan.peak == after + plan.gradients
        assert plan.peak > after
