"""What comes out of a loss: one mean, its aux, and rows that count or do not."""

import copy

import numpy as np
import pytest
import torch

import accelx as ax
from accelx import testing
from accelx.gradients import read
from accelx.gradients_read import as_total
from accelx.rows import mark
from tests.laws import training as t

ENV = ax.Env()


def test_aux_is_reported_without_its_graph():
    """Whatever tree it is, nothing in it keeps the graph alive."""
    tx = ax.identity
    state = ax.init(tx, t.made(), t.grouped)

    def loss(model, batch):
        each = t.each(model, batch[0])
        return each.mean(), {
            "rows": each.mean(1),
            "m": ax.Mean(each.sum(), each.numel()),
        }

    _, out = ax.step(tx, loss)(state, t.part(ENV, t.batches()[0]))
    assert not out.aux["rows"].requires_grad
    assert not out.aux["m"].total.requires_grad
    assert not out.loss.requires_grad
    assert out.aux["m"].value == pytest.approx(out.loss.item())


@pytest.mark.multi
def test_aux_means_are_over_all_ranks_and_microbatches():
    """The same on any number of ranks: Means reduced, rows those of this rank."""

    def loss(model, batch):
        each = t.each(model, batch[0])
        return each.mean(), (
            ax.Mean((each * batch[1]).sum(), batch[1].sum()),
            each[:, 0],
        )

    def rank(env):
        tx = ax.chain(ax.shard_model(env), ax.accumulate(3))
        _, out = ax.step(tx, loss)(ax.init(tx, t.made(), t.grouped), t.part(env, batch))
        return float(out.aux[0].value), float(out.aux[0].weight), out.aux[1]

    batch = t.batches()[0]
    model = t.made()()
    _, (mean, rows) = loss(model, batch)
    for world in (1, 2, 3):
        found = testing.run(world)(rank)()
        for value, weight, _ in found:
            assert value == pytest.approx(mean.value.item(), abs=1e-12)
            assert weight == batch[1].sum()
        assert torch.allclose(torch.cat([x[2] for x in found]), rows, atol=1e-12)


def test_means_add_and_divide_once():
    """Mean.of, + and value; nothing counted is nan."""
    assert (ax.Mean(1.0, 2) + ax.Mean(5.0, 4)).value == 1.0
    assert ax.Mean.of(3.0, 4).total == 12.0
    assert ax.Mean(0.0, 0).value != ax.Mean(0.0, 0).value


@pytest.mark.parametrize(
    "weight", [torch.tensor(2), torch.tensor([2.0]), 2, 2.0, np.float32(2)]
)
def test_a_weight_may_be_a_number_or_any_tensor(weight):
    """Integers and floats alike, for the same gradient."""
    tx = ax.identity
    state = ax.init(tx, lambda: torch.nn.Linear(1, 1, bias=False).double(), None)
    batch = torch.ones(2, 1, dtype=torch.float64)
    _, out = ax.grads(tx, lambda m, x: ax.Mean(m(x).sum(), weight))(state, batch)
    assert float(out.weight) == 2


def test_read_takes_three_forms():
    """A tensor, a Mean, and either with aux."""
    one, mean = torch.ones(()), ax.Mean(torch.ones(()), 1)
    assert read(one) == (one, None)
    assert read(mean) == (mean, None)
    assert read((one, 3)) == (one, 3)
    assert read((mean, {"a": 1})) == (mean, {"a": 1})


@pytest.mark.parametrize("wrong", [torch.ones(1), [1], 1.0, None, (1, 2, 3), "loss"])
def test_read_refuses_the_rest(wrong):
    """With what came and what to return."""
    with pytest.raises(ax.LossError, match=r"return loss|loss\.mean\(\)"):
        read(wrong)


def test_read_says_where_the_loss_is():
    """In a dict under its name; and of a complex number which part to take."""
    one = torch.ones(())
    with pytest.raises(ax.LossError, match=r'got dict; write `return out\["loss"\]`'):
        read({"loss": one, "logits": one})
    for wrong, look in ((one + 0j, read), (ax.Mean(one + 0j, 1), as_total)):
        with pytest.raises(ax.LossError, match=r"got torch\.complex64; write loss\.re"):
            look(wrong)


def squares(kind):
    """Losses of one kind each."""

    def loss(model, batch):
        each = model(batch).square().sum(1)
        means = {"mean": each.mean(), "total": ax.Mean(each.sum(), len(each))}
        return {**means, "aux": (means["mean"], each)}[kind]

    return loss


def ran(tx, loss, *, marked):
    """Weights and reports of three steps on one rank."""
    torch.manual_seed(0)
    state = ax.init(
        tx, torch.nn.Linear(3, 2), lambda m: torch.optim.SGD(m.parameters())
    )
    step, outs = ax.step(tx, loss), []
    for _ in range(3):
        batch = torch.randn(5, 3)
        state, out = step(state, mark(batch, 5, 5) if marked else batch)
        outs.append((float(out.loss), float(out.weight), out.stepped, out.skipped))
    return state.model.weight.detach(), outs


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("kind", ["mean", "total", "aux"])
def test_the_short_way_of_one_rank_is_the_long_one_to_the_bit(kind, marked):
    """A pass that wraps the gradients and does nothing sends them the long way."""
    long = ax.transform("look", backward=lambda grads: grads)
    weight, outs = ran(ax.shard_model(ENV), squares(kind), marked=marked)
    other, others = ran(
        ax.chain(ax.shard_model(ENV), long), squares(kind), marked=marked
    )
    assert torch.equal(weight, other)
    assert outs == others
    control, _ = ran(long, lambda m, b: 2 * squares("mean")(m, b), marked=marked)
    assert not torch.equal(weight, control)


@pytest.mark.parametrize("passes", [[], [ax.transform("look", backward=lambda g: g)]])
def test_a_loss_that_is_complex_is_refused_in_a_step(passes):
    """Its gradient is that of two numbers; the short way and the long one."""
    tx = ax.chain(ax.shard_model(ENV), *passes)
    state = ax.init(
        tx, torch.nn.Linear(3, 2), lambda m: torch.optim.SGD(m.parameters())
    )
    with pytest.raises(ax.LossError, match=r"got torch\.complex64; write loss\.real"):
        ax.step(tx, lambda m, b: m(b).mean() * 1j)(state, torch.ones(4, 3))


def test_a_loss_may_return_one_thing_after_another():
    """A mean, a Mean, a mean again: each update is torch's own."""
    tx, batch = ax.identity, torch.randn(4, 3)
    kinds = iter(["mean", "total", "mean"])
    state = ax.init(
        tx, torch.nn.Linear(3, 2), lambda m: torch.optim.SGD(m.parameters())
    )
    model = copy.deepcopy(state.model)
    optimizer = torch.optim.SGD(model.parameters())
    step = ax.step(tx, lambda m, b: squares(next(kinds))(m, b))
    for _ in range(3):
        state, _ = step(state, batch)
        squares("mean")(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.allclose(state.model.weight, model.weight, atol=1e-6)


def test_a_report_that_a_pass_has_seen_is_not_written_into():
    """What it kept says that no update was made yet."""
    seen = []

    def keep(state, out):
        seen.append(out)
        return state, out

    tx = ax.transform("keep", before=keep)
    state = ax.init(
        tx, torch.nn.Linear(3, 2), lambda m: torch.optim.SGD(m.parameters())
    )
    _, out = ax.step(tx, squares("mean"))(state, torch.ones(4, 3))
    assert out.stepped
    assert not seen[0].stepped
