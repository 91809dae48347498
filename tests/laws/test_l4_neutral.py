"""L4: a neutral pass leaves the run of one process, one batch and torch alone."""

import tempfile
from functools import cache
from itertools import product
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax
from accelx import testing
from accelx.passes.compile import compile
from accelx.passes.remat import remat
from accelx.passes.with_diloco import with_diloco
from accelx.passes.with_ema import with_ema
from accelx.passes.with_local_sgd import with_local_sgd
from tests.laws import training as t

# torch says it of itself, where it traces a block that is given what has a gradient
quiet_traces = pytest.mark.filterwarnings("ignore:The .grad attribute of:UserWarning")
pytestmark = [pytest.mark.multi, t.quiet_views, quiet_traces]
WORLDS = (1, 2, 3, 4)
MICROBATCHES = (1, 2, 3, 5)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
LOSSES = {"bare": t.bare, "masked": t.masked}
BLOCKS = "layers.*"


def cases():
    """(kind, microbatches, loss, dtype, given, split, optimizers) that a world runs."""
    found = []
    grid = product(("ddp", "fsdp2"), MICROBATCHES, LOSSES, TOLERANCE)
    for i, (kind, n, loss, dtype) in enumerate(grid):
        given = "function" if (i // 2 + i // 16) % 2 else "module"
        split = "lopsided" if i % 5 == 4 else "even"
        optim = "pair" if i % 7 == 6 else "grouped"
        found.append((kind, n, loss, dtype, given, split, optim))
    return found


def label(case):
    """A name for a case."""
    return "-".join(str(x).removeprefix("torch.") for x in case)


@cache
def judge(loss, dtype, optim):
    """The run by hand that a case is held to."""
    data = t.batches(dtype=dtype)
    return t.by_hand(t.made(dtype), LOSSES[loss], getattr(t, optim), data)


def run_case(env, case):
    """How far one case lies from its judge on this rank."""
    kind, n, loss, dtype, given, split, optim = case
    tx = ax.chain(
        ax.shard_model(env, kind, blocks=BLOCKS),
        ax.accumulate(n),
        ax.clip(t.LIMIT),
        ax.with_schedule(t.curve),
    )
    make = t.made(dtype)
    model = make if given == "function" else make()
    data = t.batches(dtype=dtype)
    how = getattr(t, split)
    run = t.train(tx, env, model, LOSSES[loss], getattr(t, optim), data, how)
    return t.apart(judge(loss, dtype, optim), run, env.rank, env.world)


def fed(env, kind, n):
    """The gap of a run over ax.feed, in order and with a short last batch."""
    whole = t.batches(rows=(12,))[0]
    data = [tuple(x[low : low + 5] for x in whole) for low in (0, 5, 10)]
    loader = DataLoader(TensorDataset(*whole), batch_size=5)
    tx = ax.chain(
        ax.shard_model(env, kind, blocks=BLOCKS),
        ax.shard_loader(env),
        ax.accumulate(n),
        ax.clip(t.LIMIT),
        ax.with_schedule(t.curve),
    )
    state = ax.init(tx, t.made(), t.grouped)
    step, trace = ax.step(tx, t.bare), []
    for batch in ax.feed(tx, loader, stop=3):
        state, out = step(state, batch)
        trace.append(t.Step(float(out.loss), out.norm.item(), t.weights(state.model)))
    judge = t.by_hand(t.made(), t.bare, t.grouped, data)
    return t.apart(judge, trace, env.rank, env.world)


def saved(env, kind, wait):
    """The gap of a run that saves after each step and listens for signals."""
    folder = ax.broadcast(env, tempfile.mkdtemp())
    tx = ax.chain(
        ax.save_state(env, folder, every=1, keep=2, wait=wait),
        ax.on_preempt(env, folder),
        ax.shard_model(env, kind, blocks=BLOCKS),
        ax.clip(t.LIMIT),
        ax.with_schedule(t.curve),
    )
    run = t.train(tx, env, t.made(), t.masked, t.grouped, t.batches())
    wanted = judge("masked", torch.float64, "grouped")
    return t.apart(wanted, run, env.rank, env.world)


def with_passes(env, kind, *passes):
    """The gap of a run with more passes that claim to change nothing."""
    place = ax.shard_model(env, kind, blocks=BLOCKS)
    rest = (ax.accumulate(2), ax.clip(t.LIMIT), ax.with_schedule(t.curve))
    tx = ax.chain(place, *passes, *rest)
    run = t.train(tx, env, t.made(), t.masked, t.grouped, t.batches())
    wanted = judge("masked", torch.float64, "grouped")
    return t.apart(wanted, run, env.rank, env.world)


def unmarked(env, loss):
    """The gap of batches of 2 * world rows that nobody marked: rows are counted."""
    data = t.batches(rows=(2 * env.world,))
    mine = [tuple(x[2 * env.rank : 2 * env.rank + 2] for x in data[0])]
    tx = ax.chain(ax.shard_model(env), ax.clip(t.LIMIT), ax.with_schedule(t.curve))
    state = ax.init(tx, t.made(), t.grouped)
    state, out = ax.step(tx, loss)(state, mine[0])
    trace = [t.Step(float(out.loss), out.norm.item(), t.weights(state.model))]
    return t.apart(t.by_hand(t.made(), loss, t.grouped, data), trace)


def compiled(blocks):
    """compile, by a backend that traces and is quick."""
    return compile(blocks, backend="eager")


def apart_for_two(env):
    """The gap of ranks that agree each second step only: what must not pass."""
    return with_passes(env, "ddp", with_local_sgd(env, 2))


def unsynchronised(env):
    """The gap of ranks that each train by themselves: what must not pass."""
    alone = [t.part(env, batch) for batch in t.batches()]
    run = t.by_hand(t.made(), t.bare, t.grouped, alone)
    return t.apart(judge("bare", torch.float64, "grouped"), run)


def mean_of_means(env, kind, n):
    """The gap of a loss that takes each part's own mean: what must not pass."""
    tx = ax.chain(
        ax.shard_model(env, kind, blocks=BLOCKS),
        ax.accumulate(n),
        ax.clip(t.LIMIT),
        ax.with_schedule(t.curve),
    )
    run = t.train(tx, env, t.made(), t.mean_of_means, t.grouped, t.batches())
    wanted = judge("masked", torch.float64, "grouped")
    return t.apart(wanted, run, env.rank, env.world)


EXACT = {
    "fed-ddp": lambda env: fed(env, "ddp", 1),
    "fed-ddp-3": lambda env: fed(env, "ddp", 3),
    "fed-fsdp2-2": lambda env: fed(env, "fsdp2", 2),
    "saved-ddp": lambda env: saved(env, "ddp", True),
    "saved-fsdp2-beside": lambda env: saved(env, "fsdp2", False),
    "remat-ddp": lambda env: with_passes(env, "ddp", remat(BLOCKS)),
    "remat-fsdp2": lambda env: with_passes(env, "fsdp2", remat(BLOCKS, "selective")),
    "compile-ddp": lambda env: with_passes(env, "ddp", compiled("layers.0")),
    "compile-fsdp2": lambda env: with_passes(
        env, "fsdp2", remat("layers.3"), compiled("layers.3")
    ),
    "ema-ddp": lambda env: with_passes(env, "ddp", with_ema(0.9)),
    "ema-fsdp2": lambda env: with_passes(env, "fsdp2", with_ema(0.9)),
    "unmarked-bare": lambda env: unmarked(env, t.bare),
    "unmarked-masked": lambda env: unmarked(env, t.masked),
    # last: from there on ranks compare
    "lockstep-ddp": lambda env: with_passes(env, "ddp", ax.with_lockstep()),
    "lockstep-fsdp2": lambda env: with_passes(env, "fsdp2", ax.with_lockstep(60)),
}
APART = {"unsynchronised": unsynchronised, "local sgd": apart_for_two}
CONTROLS = {
    "mean-of-means-ddp": lambda env: mean_of_means(env, "ddp", 2),
    "mean-of-means-fsdp2": lambda env: mean_of_means(env, "fsdp2", 2),
}


@cache
def gaps(world):
    """Every case on `world` ranks, in one launch: of each rank, {case: gap}."""
    for case in cases():
        judge(case[2], case[3], case[6])  # before the fork, for all ranks at once
    torch.compile(nn.Tanh(), backend="eager")(torch.ones(1))  # it imports a second long
    others = EXACT | CONTROLS | (APART if world > 1 else {})

    def rank(env):
        found = {case: run_case(env, case) for case in cases()}
        return found | {name: run(env) for name, run in others.items()}

    return testing.run(world, timeout=150)(rank)()


@pytest.mark.parametrize("case", cases(), ids=label)
@pytest.mark.parametrize("world", WORLDS)
def test_any_placement_makes_the_run_of_one_process(world, case):
    """Every loss, norm and parameter after every step is the hand-written loop's."""
    found = [rank[case] for rank in gaps(world)]
    assert max(found) < TOLERANCE[case[3]], found


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("world", WORLDS)
def test_so_do_other_sources_of_batches(world, name):
    """Rows from ax.feed, and unmarked ones, weigh alike; saving changes nothing."""
    found = [rank[name] for rank in gaps(world)]
    assert max(found) < 1e-12, found


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("world", WORLDS)
def test_control_the_mean_of_means_is_another_run(world, name):
    """The comparison sees a loss that each part divides by its own tokens."""
    assert min(rank[name] for rank in gaps(world)) > 1e-3


@pytest.mark.parametrize("world", WORLDS[1:])
def test_control_ranks_by_themselves_are_another_run(world):
    """The comparison sees ranks whose gradients were never reduced, or too late."""
    for name in APART:
        assert min(rank[name] for rank in gaps(world)) > 1e-3, name


ENV = ax.Env()
FACTORIES = {  # one call of each public factory of passes
    "accumulate": lambda: ax.accumulate(2),
    "clip": lambda: ax.clip(1.0),
    "clip_value": lambda: ax.clip_value(1.0),
    "compile": lambda: compile(BLOCKS),
    "load_state": lambda: ax.load_state(ENV, "url"),
    "load_weights": lambda: ax.load_weights("url"),
    "on_preempt": lambda: ax.on_preempt(ENV, "url"),
    "quantize": lambda: ax.quantize("nf4"),
    "remat": lambda: remat(BLOCKS),
    "save_state": lambda: ax.save_state(ENV, "url", every=1),
    "shard_experts": lambda: ax.shard_experts(ENV),
    "shard_loader": lambda: ax.shard_loader(ENV),
    "shard_model": lambda: ax.shard_model(ENV),
    "shard_sequence": lambda: ax.shard_sequence(ENV),
    "shard_stages": lambda: ax.shard_stages(ENV, "layers.2", 2),
    "shard_tensors": lambda: ax.shard_tensors(ENV),
    "with_diloco": lambda: with_diloco(ENV, 2, torch.optim.SGD),
    "with_ema": lambda: with_ema(0.9),
    "with_local_sgd": lambda: with_local_sgd(ENV, 2),
    "with_lockstep": ax.with_lockstep,
    "with_precision": lambda: ax.with_precision("fp16"),
    "with_schedule": lambda: ax.with_schedule(t.curve),
}
COVERED = {"accumulate", "shard_loader", "shard_model"}  # by the cases above
COVERED |= {"shard_tensors", "shard_experts"}  # by files of that name in tests/multi
COVERED |= {"shard_sequence"}  # by tests/multi/test_shard_sequence.py
COVERED |= {"shard_stages"}  # by tests/multi/test_shard_stages.py
COVERED |= {"compile", "on_preempt", "remat", "save_state", "with_ema"}
COVERED |= {"with_lockstep"}


def test_every_factory_of_passes_is_looked_at():
    """A new file of passes/ has a call here, so that its claim is seen."""
    folder = Path(ax.__file__).parent / "passes"
    assert {f.stem for f in folder.glob("[a-z]*.py")} == set(FACTORIES)


def test_every_pass_that_claims_to_be_neutral_has_a_case():
    """The claim is what the comparison above was made for, and no more is claimed."""
    claims = {n for n, make in FACTORIES.items() if any(p.neutral for p in make())}
    assert claims == COVERED


def test_control_a_run_that_is_no_number_is_another_run():
    """nan in one weight, loss or norm is as far away as can be."""
    wanted = judge("bare", torch.float64, "grouped")[:1]
    weights = {n: w * float("nan") for n, w in wanted[0].weights.items()}
    assert t.apart(wanted, wanted) == 0
    for bad in ({"weights": weights}, {"loss": float("nan")}, {"norm": float("nan")}):
        assert t.apart(wanted, [attrs.evolve(wanted[0], **bad)]) == float("inf")
