"""Batches of one shape train and measure as ragged ones do, and never in silence."""

import math
import time
import warnings

import attrs
import pytest
import torch
import torchmetrics
from sklearn.metrics import accuracy_score
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax
from accelx.cut import cut
from accelx.gradients import plain_mean
from accelx.loader import as_loader, batches
from accelx.rows import Rows, Waited, row_weights, rows_of, stamp
from accelx.testing import run
from tests.laws import training as t

pytestmark = pytest.mark.multi
SIZE = 7  # of a full batch; t.ROWS are 5, 1 and 7
LIMIT = 1e-11


def padded(env, batch, times=1):
    """This rank's rows and repeats of one: ceil(SIZE / world), or somewhat more."""
    total = len(batch[0])
    low, high = t.even(total, env.rank, env.world)
    length = times * math.ceil(math.ceil(SIZE / env.world) / times)
    rows = [*range(low, high)] or [0]
    rows += rows[-1:] * (length - len(rows))
    return stamp([x[rows] for x in batch], Rows(high - low, total, padded=True))


def per_row(model, batch):
    """A mean over rows, as a Mean that leaves out rows that pad."""
    w = row_weights(batch).double()
    return ax.Mean((t.each(model, batch[0]).mean(1) * w).sum(), w.sum())


def per_token(model, batch):
    """A mean over tokens."""
    mask = batch[1] * row_weights(batch)[:, None]
    return ax.Mean((t.each(model, batch[0]) * mask).sum(), mask.sum())


def careless(model, batch):
    """Counts every row that is there: what must not be written."""
    each = t.each(model, batch[0]).mean(1)
    return ax.Mean(each.sum(), len(each))


def trained(env, kind, loss, times):
    tx = t.pipeline(env, kind, *([ax.accumulate(times)] if times > 1 else []))
    state = ax.init(tx, t.made(), t.grouped)
    step, trace = ax.step(tx, loss), []
    for batch in t.batches():
        state, out = step(state, padded(env, batch, times))
        trace.append(t.Step(float(out.loss), out.norm.item(), t.weights(state.model)))
    return trace


def gaps(env, kinds, judges):
    """How far each padded run is from the judge; the careless one last."""
    found = {}
    for kind in kinds:
        for name, loss in (("row", per_row), ("token", per_token)):
            for times in (1, 2):
                run = trained(env, kind, loss, times)
                gap = t.apart(judges[name], run, env.rank, env.world)
                found[kind, name, times] = gap
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ax.NeutralityWarning)
            run = trained(env, kind, careless, 1)
        found[kind, "careless"] = t.apart(judges["row"], run, env.rank, env.world)
    return found


@t.quiet_views
@pytest.mark.parametrize(
    ("world", "kinds"), [(1, ("plain",)), (2, ("ddp", "fsdp2")), (3, ("ddp", "fsdp2"))]
)
def test_a_padded_run_is_the_run_of_one_process(world, kinds):
    """L4 in float64, in one and two microbatches, with batches of 5, 1 and 7 rows.

    The judge is a loop by hand over whole batches; the control, which counts rows that
    pad, is far from it.
    """
    judges = {
        "row": t.by_hand(t.made(), t.bare, t.grouped, t.batches()),
        "token": t.by_hand(t.made(), t.masked, t.grouped, t.batches()),
    }
    for found in run(world)(gaps)(kinds, judges):
        for key, gap in found.items():
            assert (gap > 1e-4) if key[1] == "careless" else (gap < LIMIT), (key, gap)


def test_a_plain_mean_is_refused_at_the_first_batch():
    """Also where that batch is full, and no row pads as yet; measure as well."""
    env = ax.Env()
    full = padded(env, t.batches((SIZE,))[0])
    state = ax.init(ax.identity, t.made(), t.grouped)
    for n in (1, SIZE):
        with pytest.raises(ax.LossError, match=r"w = ax\.row_weights\(batch\)"):
            ax.step(ax.accumulate(n), t.bare)(ax.fork(state), full)
    with pytest.raises(ax.LossError, match="got a plain mean"):
        ax.measure(ax.identity, t.bare)(state, full)
    assert "ax.Mean" in str(plain_mean("the loss"))
    unmarked = [x.clone() for x in full]
    assert ax.step(ax.identity, t.bare)(state, unmarked)[1].stepped


def test_a_weight_that_counts_rows_that_pad_is_pointed_out():
    """As many as the batch has rows here, though not all are real."""
    short = padded(ax.Env(), t.batches((5,))[0])
    state = ax.init(ax.identity, t.made(), t.grouped)
    with pytest.warns(ax.NeutralityWarning, match="is 7, .* but 2 of them only pad"):
        ax.step(ax.identity, careless)(ax.fork(state), short)
    ax.step(ax.identity, per_row)(state, short)  # any warning is an error


def test_aux_of_rows_that_pad_is_left_out():
    """A tensor with one row a sample comes back with the real rows, cut or not."""
    batch = t.batches((5,))[0]
    short = padded(ax.Env(), batch, times=2)

    def loss(model, batch):
        return per_row(model, batch), {"first": batch[0][:, 0], "loss": ax.Mean(1.0, 1)}

    for n in (1, 2, 4):
        state = ax.init(ax.accumulate(n), t.made(), t.grouped)
        _, out = ax.step(ax.accumulate(n), loss)(state, short)
        assert torch.equal(out.aux["first"], batch[0][:, 0])


def measured(env, judge_rows):
    """Accuracy of rows that were gathered, and of rows as they are here."""
    state = ax.init(t.placing(env, "ddp"), t.made(), t.grouped)
    gathered, raw = (
        torchmetrics.classification.MulticlassAccuracy(
            t.TOKENS, average="micro", sync_on_compute=False
        )
        for _ in "ab"
    )
    rows, total = [], ax.Mean(0.0, 0.0)
    judge = ax.measure(t.placing(env, "ddp"), per_row)
    for batch in t.batches():
        mine = padded(env, batch)
        total = total + judge(state, mine)
        with ax.evaluating(state) as model:
            guess = model(mine[0]).argmax(-1)
        want = mine[0].roll(-1, dims=1)
        raw.update(guess, want)
        everyone = ax.gather_rows(env, {"guess": guess, "want": want}, mine)
        gathered.update(everyone["guess"], everyone["want"])
        texts = ax.gather_rows(env, [str(x) for x in mine[0].tolist()], mine)
        rows += texts
    assert rows == judge_rows
    return gathered.compute().item(), raw.compute().item(), ax.reduce(env, total).value


@pytest.mark.parametrize("world", [2, 3])
def test_torchmetrics_on_gathered_rows_is_that_of_one_process(world):
    """Accuracy is scikit-learn's over the dataset; that of ranks' own rows is not."""
    model = t.made()().eval()
    batches = t.batches()
    with torch.no_grad():
        guess = torch.cat([model(b[0]).argmax(-1) for b in batches])
        losses = torch.cat([t.each(model, b[0]).mean(1) for b in batches])
    want = torch.cat([b[0].roll(-1, dims=1) for b in batches])
    wanted = accuracy_score(want.flatten(), guess.flatten())
    rows = [str(row) for b in batches for row in b[0].tolist()]
    found = run(world)(measured)(rows)
    for accuracy, _, loss in found:
        assert accuracy == pytest.approx(wanted, abs=1e-6)
        assert float(loss) == pytest.approx(losses.mean().item(), abs=1e-12)
    assert any(abs(raw - wanted) > 1e-3 for _, raw, _ in found)


def test_a_padded_batch_keeps_one_shape_through_the_cut():
    """Every rank, full batch or not, and every microbatch: one shape."""
    shapes = set()
    for batch in t.batches():
        for rank in range(3):
            mine = padded(ax.Env(rank, 3), batch, times=2)
            parts = [args[0] for args in cut((mine,), 2, 3)]
            shapes |= {tuple(x.shape) for part in parts for x in part}
            real = sum(rows_of(part).rows for part in parts)
            assert real == rows_of(mine).rows
    assert shapes == {(2, t.LENGTH)}


def test_the_time_that_data_took_is_in_the_report():
    """What the loader's mark says, once; of a batch from elsewhere, nothing."""
    waited = Waited()
    state = ax.init(ax.accumulate(2), t.made(), t.grouped)
    step = ax.step(ax.accumulate(2), t.bare)
    for k, batch in enumerate(t.batches((4, 4))):
        waited.seconds += 0.25 + k
        stamp(batch, Rows(4, 4, waited=waited))
        state, out = step(state, batch)
        assert out.times["data"] == 0.25 + k
        assert out.times.keys() == {"data", "grads", "update"}
    waited.seconds = 2.0
    state, out = ax.grads(ax.identity, t.bare)(state, batch)
    assert out.times["data"] == 2.0
    state, out = ax.apply(ax.identity)(state, out)
    assert out.times.keys() == {"data", "grads", "update"}
    _, out = step(state, [x.clone() for x in batch])
    assert "data" not in out.times
    assert (
        attrs.evolve(out, times={"data": 1.0}) == out
    )  # reports are equal all the same


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_loader_of_static_shapes_gives_one_shape_and_each_row_once(world):
    """The real rows of all ranks, in order, are those of the ragged batches."""
    data = TensorDataset(torch.arange(23))
    whole = as_loader(DataLoader(data, SIZE, shuffle=True))
    parts = [
        [*batches(attrs.evolve(whole, rank=r, world=world, static_shapes=True))]
        for r in range(world)
    ]
    assert {x.shape for part in parts for (x,) in part} == {(math.ceil(SIZE / world),)}
    for step, (wanted,) in enumerate(batches(whole)):
        mine = [part[step] for part in parts]
        real = [batch[0][row_weights(batch).bool()] for batch in mine]
        assert torch.equal(torch.cat(real), wanted)
        assert all(rows_of(batch).padded for batch in mine)
        assert {rows_of(batch).total for batch in mine} == {len(wanted)}


class Slow(TensorDataset):
    """Items that take their time."""

    def __getitem__(self, i):
        time.sleep(0.01)
        return super().__getitem__(i)


def test_feed_measures_how_long_a_step_waited_for_data():
    """No less than the items slept, and none of the time that the loop slept.

    Bounds that hold on any machine: sleeping takes at least what was asked.
    """
    state = ax.init(ax.identity, torch.nn.Linear(1, 1), t.grouped)
    step = ax.step(ax.identity, lambda m, b: m(b[0]).mean())
    waits, began = [], time.perf_counter()
    for batch in ax.feed(ax.identity, DataLoader(Slow(torch.ones(9, 1)), 3)):
        state, out = step(state, batch)
        waits.append(out.times["data"])
        time.sleep(0.1)
    assert len(waits) == 3
    assert min(waits) >= 0.03
    assert sum(waits) <= time.perf_counter() - began - 0.3
