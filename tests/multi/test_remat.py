"""remat on ranks: the same run, no more communication, forks that call themselves."""

from functools import cache

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

import accelx as ax
from accelx import testing
from accelx.passes.compile import compile
from accelx.passes.remat import remat
from tests.laws import training as t

hooked = "ignore:Full backward hook is firing:UserWarning"  # those that count messages
traced = "ignore:The .grad attribute of:UserWarning"  # torch says it while it traces
pytestmark = [
    pytest.mark.multi,
    t.quiet_views,
    pytest.mark.filterwarnings(hooked),
    pytest.mark.filterwarnings(traced),
]
DATA = t.batches()
each_kind = pytest.mark.parametrize("kind", t.KINDS)


def tanh(op):
    """Keep one kind of result."""
    return op is torch.ops.aten.tanh.default


CHAINS = {  # remat before and after the placing
    "full": lambda place: (place, remat("layers.*")),
    "selective": lambda place: (remat("layers.*", "selective"), place),
    "function": lambda place: (remat(t.Block, tanh), place),
    "offload": lambda place: (place, remat("layers.*", offload=True)),
    "microbatches": lambda place: (ax.accumulate(2), place, remat("layers.*")),
}


def run(env, kind, name, blocks="layers.*"):
    """Every step of a run."""
    place = ax.identity
    if kind != "plain":
        place = ax.shard_model(env, kind, blocks=blocks)
    rest = (ax.clip(t.LIMIT), ax.with_schedule(t.curve))
    tx = ax.chain(*CHAINS[name](place), *rest)
    return t.train(tx, env, t.made(), t.masked, t.grouped, DATA)


def gaps(env, kind):
    """How far each run lies from that of one process."""
    judge = t.by_hand(t.made(), t.masked, t.grouped, DATA)
    runs = {name: run(env, kind, name) for name in CHAINS}
    if kind == "fsdp2":  # gathered inside and outside of what is recomputed
        runs["inside"] = run(env, kind, "full", "layers.*.inner")
        runs["inside, kept"] = run(env, kind, "selective", "layers.*.inner")
        runs["root"] = run(env, kind, "full", None)
    return {n: t.apart(judge, one, env.rank, env.world) for n, one in runs.items()}


def noisy(model, batch):
    """A loss that draws, so that recomputing has to draw the same."""
    noise = torch.nn.functional.dropout(model(batch[0]), 0.5)
    return noise.square().mean()


class Noisy(t.Net):
    """Dropout inside the blocks."""

    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer.norm = torch.nn.Sequential(layer.norm, torch.nn.Dropout(0.5))


def drawn(env, kind, recomputed):
    """Weights after two steps with dropout, and the collectives of the last."""
    place = t.placing(env, kind)
    tx = ax.chain(place, remat("layers.*")) if recomputed else place
    torch.manual_seed(1)
    state = ax.init(tx, Noisy().double(), t.grouped)
    step = ax.step(tx, noisy)
    torch.manual_seed(10 + env.rank)
    state, _ = step(state, t.part(env, DATA[0]))
    with CommDebugMode() as seen:
        state, _ = step(state, t.part(env, DATA[0]))
    return t.weights(state.model), dict(seen.get_comm_counts())


def as_without(env, kind):
    """Whether weights, and what was sent, are those of a run without remat."""
    (one, sent), (other, also) = drawn(env, kind, True), drawn(env, kind, False)
    return t.same(one, other), sent == also


def fork(env, kind, before):
    """Whether forks of forks train as their source, each with its own forward."""
    place, again = t.placing(env, kind), remat("layers.*")
    tx = ax.chain(again, place) if before else ax.chain(place, again)
    step = ax.step(tx, t.masked)
    state = ax.init(tx, t.made(), t.grouped)
    state, _ = step(state, t.part(env, DATA[0]))
    other = ax.fork(ax.fork(state))
    bound = all(m.forward.__self__ is m for m in other.model.layers)
    start = t.weights(other.model)
    state, _ = step(state, t.part(env, DATA[2]))
    still = t.same(start, t.weights(other.model))
    names = [n for n, m in other.model.named_modules() if "forward" in vars(m)]
    other, _ = step(other, t.part(env, DATA[2]))
    alike = t.same(t.weights(state.model), t.weights(other.model))
    return bound, still, alike, names


def alone(env, kind):
    """The gap of a loop of one's own around a model that was wrapped, then placed."""
    model = ax.shard_model(env, kind, blocks="layers.*")(remat("layers.*")(t.made()()))
    plain = ax.shard_model(env, kind, blocks="layers.*")(t.made()())
    low, high = t.even(5, env.rank, env.world)
    batch = tuple(x[low:high] for x in DATA[0])
    for one in (model, plain):
        t.bare(one, batch).backward()
    grads = [
        {n: t.local(p.grad) for n, p in m.named_parameters() if p.grad is not None}
        for m in (model, plain)
    ]
    return t.same(*grads)


def compiled(env):
    """The gap of a run whose blocks are recomputed and compiled, and of its fork."""
    blocks = ["layers.0", "layers.2"]
    place = t.placing(env, "fsdp2")
    twice = (remat(blocks, "selective"), compile(blocks, backend="aot_eager"))
    tx = ax.chain(*twice, place, ax.clip(t.LIMIT), ax.with_schedule(t.curve))
    judge = t.by_hand(t.made(), t.masked, t.grouped, DATA)
    state, step = ax.init(tx, t.made(), t.grouped), ax.step(tx, t.masked)
    for batch in DATA[:2]:
        state, _ = step(state, t.part(env, batch))
    other, gaps = ax.fork(state), []
    for one in (state, other):
        after, out = step(one, t.part(env, DATA[2]))
        end = t.Step(float(out.loss), out.norm.item(), t.weights(after.model))
        gaps.append(t.apart(judge[2:], [end], env.rank, env.world))
    return max(gaps)


@cache
def found(kind):
    """All of that of each rank, in one launch."""

    def rank(env):
        return {
            "gaps": gaps(env, kind),
            "as without": as_without(env, kind),
            "forks": [fork(env, kind, before) for before in (True, False)],
            "alone": kind == "plain" or alone(env, kind),
            "compiled": compiled(env) if kind == "fsdp2" else 0.0,
        }

    return testing.run(t.ranks(kind), timeout=120)(rank)()


@each_kind
def test_the_run_is_that_of_one_process(kind):
    """Under every policy, tied, frozen and shared weights included (L4)."""
    for rank in found(kind):
        assert max(rank["gaps"].values()) < 1e-12, rank["gaps"]


@each_kind
def test_dropout_and_communication_are_as_without_it(kind):
    """The same masks on every rank, to the bit, and not one collective more."""
    assert {rank["as without"] for rank in found(kind)} == {(True, True)}


@each_kind
def test_a_fork_recomputes_with_its_own_weights(kind):
    """Neither touches the other, and both make the same next step."""
    wanted = (True, True, True, [f"layers.{i}" for i in range(4)])
    for rank in found(kind):
        assert rank["forks"] == [wanted, wanted]


@each_kind
def test_it_serves_a_loop_of_ones_own(kind):
    """Wrapped first and placed then: gradients to the bit."""
    assert all(rank["alone"] for rank in found(kind))


def test_recomputing_is_compiled_along_in_slices():
    """Under fsdp2, and in a fork, whose blocks run the same code."""
    assert max(rank["compiled"] for rank in found("fsdp2")) < 1e-12
