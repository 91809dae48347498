"""L6: a run that is stopped, saved and resumed is the run that was not."""

import random

import attrs
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as rates

import accelx as ax
from accelx import testing
from tests import saving
from tests.laws import odd
from tests.laws.training import (
    TOKENS,
    WIDTH,
    Net,
    curve,
    grouped,
    masked,
    pair,
    quiet_views,
)

pytestmark = [pytest.mark.multi, quiet_views]
BATCHES = 2 * saving.EPOCH
SKIPPED = (2, 5)  # batches whose update is not made
ROUNDING = 1e-12


class Noisy(Net):
    """Dropout, where the random stream decides."""

    def forward(self, tokens):
        x = F.dropout(self.embed(tokens), 0.3, self.training)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Short(nn.Module):
    """A model without float32 buffers, which a CPU does not mix with float16."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def halves(model):
    """Two optimizers of different kinds over `Short`."""
    layers, rest = model.layers.parameters(), (model.embed, model.head)
    others = [p for m in rest for p in m.parameters()]
    return [torch.optim.Adam(layers, 1e-2), torch.optim.RMSprop(others, 1e-3, 0.9)]


def noisy(model, batch):
    """A loss that draws from the streams of Python and NumPy, too."""
    mean = masked(model, batch)
    return ax.Mean(mean.total * (1 + random.random() + np.random.rand()), mean.weight)


def skip(state, out):
    """Leave out some updates."""
    why = "left out" if state.position in SKIPPED else out.skipped
    return state, attrs.evolve(out, skipped=why)


def remember(state, out):
    """A slot that each update changes: tensors, a record, an object, plain data."""
    old = state.slots["mine"]
    tally = odd.Tally(old["object"].count + 1)
    new = {
        "loss": [*old["loss"], float(out.loss)],
        "sums": old["sums"] + out.loss,
        "record": odd.Settings(float(out.loss), (*old["record"]._names, state.step)),
        "object": tally,
        "by step": {**old["by step"], state.step: (None, float("nan"), b"\\x00")},
    }
    return ax.with_slot(state, "mine", new), out


def opened(state, tx):
    """The slot at the start."""
    blank = {
        "loss": [],
        "sums": torch.zeros((), dtype=torch.float64),
        "record": odd.Settings(0.0),
        "object": odd.Tally(),
        "by step": {},
    }
    return ax.with_slot(state, "mine", blank)


def made(kind, dtype):
    """A function that makes a model."""

    def make():
        torch.manual_seed(1)
        return kind().to(dtype)

    return make


SKIP = ax.transform("left_out", before=skip)


@attrs.frozen
class Run:
    """One way to train, which is resumed from each of its batches."""

    model: type = Net
    loss: object = masked
    optim: object = grouped
    dtype: torch.dtype = torch.float64
    first: ax.Transform = SKIP
    schedule: object = curve


MINE = ax.transform("mine", start=opened, after=remember)
RUNS = {
    "noisy": Run(Noisy, noisy),
    "fp16": Run(Short, masked, halves, torch.float32, ax.with_precision("fp16")),
    "exact": Run(Net, masked, pair),
}


def started(env, kind, run, *more):
    """The chain and its first state."""
    tx = ax.chain(
        ax.shard_loader(env, seed=3),
        ax.shard_model(env, kind, "layers.*"),
        run.first,
        ax.clip(0.9),
        ax.with_schedule(run.schedule),
        MINE,
        *more,
    )
    return tx, ax.init(tx, made(run.model, run.dtype), run.optim)


def go_on(tx, state, run, each=lambda state: None):
    """Train to the end; losses and the last state. `each` sees the state of a batch."""
    step, losses = ax.step(tx, run.loss), []
    for batch in ax.feed(tx, saving.loader(), start=state, stop=BATCHES):
        state, out = step(state, batch)
        losses.append(float(out.loss))
        each(state)
    return losses, state


def uninterrupted(env, kind, run):
    """The judge: losses and the last state, with no save anywhere."""
    ax.seed(env, 7, per_rank=True)
    return go_on(*started(env, kind, run), run)


def saved(env, kind, run, folder):
    """The same run, saved before the first batch and after each: losses and URLs."""
    ax.seed(env, 7, per_rank=True)
    tx, state = started(env, kind, run)
    save, urls = ax.save_state(env, folder), []
    urls.append(save(state))
    losses, _ = go_on(tx, state, run, lambda state: urls.append(save(state)))
    return losses, urls


def resumed(env, kind, run, url, **how):
    """The run from a checkpoint on, in a process whose streams stand elsewhere."""
    ax.seed(env, 1000 + env.rank)
    tx, state = started(env, kind, run, ax.load_state(env, url, **how))
    return go_on(tx, state, run)


def stops(env, kind, name, folder):
    """Where resumed runs differ from the uninterrupted one: [] if nowhere."""
    run = RUNS[name]
    losses, last = uninterrupted(env, kind, run)
    wanted = odd.described(last, odd.local)
    assert (last.skipped > 0, last.position) == (True, BATCHES)
    again, urls = saved(env, kind, run, f"{folder}/{kind}-{name}")
    faults = [] if again == losses else ["saving changed the run"]
    for k, url in enumerate(urls):
        tail, end = resumed(env, kind, run, url)
        differing = odd.differing(wanted, odd.described(end, odd.local))
        if tail != losses[k:] or differing:
            faults.append((k, tail, losses[k:], differing))
    return faults


PLACES = [(1, "ddp"), (2, "ddp"), (2, "fsdp2")]
# a sum over three ranks has an order, which torch's ddp changed after a first step
WHERE = [(*place, name) for place in PLACES for name in ("noisy", "fp16")]


@pytest.mark.parametrize(("world", "kind", "name"), [*WHERE, (3, "ddp", "noisy")])
def test_a_resumed_run_is_the_same_to_the_bit(world, kind, name, tmp_path):
    """Stopped at any batch of two epochs: losses, weights, optimizers, slots, rates."""
    faults = testing.run(world, timeout=120)(stops)(kind, name, tmp_path)
    assert faults == [[]] * world


SCHEDULES = {
    "cosine": lambda o: rates.CosineAnnealingLR(o, BATCHES),
    "steps": lambda o: rates.MultiStepLR(o, [1, 3, 3], 0.5),
    "plateau": lambda o: rates.ReduceLROnPlateau(o, patience=0, threshold=0.3),
    "one cycle": lambda o: rates.OneCycleLR(o, 0.02, BATCHES),
    "in turn": lambda o: rates.SequentialLR(
        o, [rates.ConstantLR(o, 0.3, 2), rates.ExponentialLR(o, 0.7)], [3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_torch_schedulers_go_on_where_they_stood(name, tmp_path):
    """Stopped at any batch: rates, counters and milestones, in their own types."""
    RUNS[name] = Run(Net, masked, grouped, schedule=SCHEDULES[name])
    assert stops(ax.Env(), "ddp", name, tmp_path) == []


HOMES = {1: ("ddp",), 2: ("ddp",), 3: ("fsdp2", "ddp"), 4: ("fsdp2",)}
TRIED = (0, 3)  # batches after which runs move; for the others see test_l5_restore


def leaving(env, folder):
    """A run on these ranks to its end, and saves of it: losses, weights and URLs."""
    losses, last = uninterrupted(env, "fsdp2", RUNS["exact"])
    _, urls = saved(env, "fsdp2", RUNS["exact"], folder)
    return losses, saving.weights(last), urls


def arriving(env, judge, **how):
    """How far runs that move to these ranks end from the one that did not."""
    losses, weights, urls = judge
    gaps = {}
    for kind in HOMES[env.world]:
        for k in TRIED:
            tail, last = resumed(env, kind, RUNS["exact"], urls[k], **how)
            gaps[kind, k] = apart((losses[k:], weights), (tail, saving.weights(last)))
    return gaps


def apart(one, other):
    """The largest difference in losses and weights, of numbers beyond 1 a part."""
    (losses, weights), (others, found) = one, other
    assert (len(losses), weights.keys()) == (len(others), found.keys())
    pairs = [(weights[n], found[n]) for n in weights]
    pairs.append((torch.tensor(losses), torch.tensor(others)))
    return max(float(((a - b).abs() / a.abs().clamp(min=1)).max()) for a, b in pairs)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A run of two ranks under fsdp2, with its losses, last weights and saves."""
    return testing.run(2)(leaving)(tmp_path_factory.mktemp("moving"))[0]


@pytest.mark.parametrize("world", HOMES)
def test_a_run_that_moves_is_the_same_to_rounding(judge, world):
    """From 2 ranks under fsdp2 to other ranks and engines: the data goes on, too."""
    for gaps in testing.run(world, timeout=100)(arriving)(judge):
        assert len(gaps) == len(HOMES[world]) * len(TRIED)
        assert all(gap < ROUNDING for gap in gaps.values()), gaps


def test_control_a_run_that_is_not_restored_is_another(judge):
    """Without load_state the losses are those of a start."""
    losses, _, _ = judge
    fresh, _ = uninterrupted(ax.Env(), "ddp", RUNS["exact"])
    assert fresh[:4] == pytest.approx(losses[:4], abs=ROUNDING)
    assert fresh[:4] != pytest.approx(losses[4:], abs=1e-3)


@pytest.mark.parametrize(
    ("left", "only"),
    [
        ("optimizers", ("model.**", "slots.**", "step", "skipped")),
        ("the position", ("model.**", "optim.**", "slots.**")),
        ("weights", ("optim.**", "slots.**", "step", "skipped")),
    ],
)
def test_control_what_is_left_out_makes_another_run(judge, left, only):
    """Each part that is restored counts: without it the run ends elsewhere."""
    losses, weights, urls = judge
    tx, state = started(
        ax.Env(), "ddp", RUNS["exact"], ax.load_state(ax.Env(), urls[4], only=only)
    )
    tail, last = go_on(tx, state, RUNS["exact"])
    end = saving.weights(last)
    assert max(float((end[n] - weights[n]).abs().max()) for n in end) > 1e-6
    assert (len(tail) == len(losses[4:])) == (left != "the position")


@pytest.mark.parametrize("left", ["random", "slots.mine"])
def test_control_streams_and_slots_count_too(left, tmp_path):
    """Without its random streams, or its slot, a run is not the same to the bit."""
    run, env = RUNS["noisy"], ax.Env()
    losses, last = uninterrupted(env, "ddp", run)
    _, urls = saved(env, "ddp", run, str(tmp_path))
    tail, end = resumed(env, "ddp", run, urls[4], only=lambda name, _: name != left)
    differing = odd.differing(odd.described(last), odd.described(end))
    assert "slots.mine" in differing
    if left == "random":
        assert tail != losses[4:]
    else:
        assert (tail, differing) == (losses[4:], ["slots.mine"])
