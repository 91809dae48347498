"""What would give a wrong number without a word is refused, or gives the right one."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax
from accelx import deferred
from accelx.rows import mark
from accelx.testing import run

pytestmark = pytest.mark.multi
X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()


class Two(nn.Module):
    """Two layers, of which forward may use either."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(2, 1).double(), nn.Linear(2, 1).double()

    def forward(self, x, use="ab"):
        return sum(getattr(self, name)(x) for name in use)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def part(env, x=X):
    size = len(x) // env.world
    return mark(x[env.rank * size :][:size].clone(), size, len(x))


def square(model, x):
    return model(x).square().mean()


def refused(env, kind, loss, *passes, error=ax.AccelxError, unused="error"):
    tx = ax.chain(ax.shard_model(env, kind, unused=unused), *passes)
    state = ax.init(tx, Two, sgd)
    with pytest.raises(error) as caught:
        ax.step(tx, loss)(state, part(env))
    return str(caught.value)


def bypassed(model, x):
    return (model.a(x) + model.b(x)).square().mean()


def by_rank(env):
    return lambda model, x: model(x, "a" if env.main else "b").square().mean()


def on_two_ranks(env):
    texts = {"bypass": refused(env, "ddp", bypassed)}
    turns = iter(["ab", "a"])

    def late(model, x):
        return model(x, next(turns)).square().mean()

    texts["late"] = refused(env, "ddp", late, ax.accumulate(2))
    texts["mixed"] = refused(env, "fsdp2", by_rank(env), unused="allow")
    return texts


def test_ranks_that_would_train_apart_are_refused():
    """A loss beside the model's call, a weight left out at the end, one a rank."""
    for texts in run(2)(on_two_ranks)():
        assert "write model(...) in the loss" in texts["bypass"]
        assert "b.weight" in texts["late"]
        assert "only some ranks used a.weight" in texts["mixed"]


def whole_batches(env):
    tx = ax.chain(ax.shard_loader(env), ax.shard_model(env))
    state = ax.init(tx, Two, sgd)
    step, loader = ax.step(tx, square), DataLoader(X, 3)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for batch in ax.feed(tx, loader):
            state, _ = step(state, batch)
        fed = len(found)
        for batch in loader:
            state, _ = step(state, batch)
    return fed, [str(w.message) for w in found]


def test_whole_batches_on_each_rank_are_pointed_out():
    """Iterating the loader in place of ax.feed doubles every sample; feed is silent."""
    for fed, messages in run(2)(whole_batches)():
        assert fed == 0
        assert len(messages) == 1
        assert "ax.feed(tx, loader)" in messages[0]


def forked(env):
    out = {}
    for kind in ("ddp", "fsdp2"):
        tx = ax.shard_model(env, kind)
        state = ax.init(tx, Two, sgd)
        state.model.a.eval()
        state.model.a.note = 3
        twin = ax.fork(state)
        out[kind] = (twin.model.a.training, twin.model.b.training, twin.model.a.note)
    return out


def test_a_fork_has_the_modes_and_attributes_of_now():
    """Not those of when the model was placed."""
    for out in run(2)(forked)():
        assert out == {"ddp": (False, True, 3), "fsdp2": (False, True, 3)}


def test_a_fork_keeps_optimizer_hooks():
    """Also those that torch's own copy leaves out."""
    tx = ax.shard_model(ax.Env())
    state = ax.init(tx, Two, sgd)
    calls = []
    state.optim.register_step_post_hook(lambda *a: calls.append(1))
    ax.step(tx, square)(copy.deepcopy(state), X)
    ax.step(tx, square)(state, X)
    assert calls == [1, 1]


def test_a_number_beside_the_batch_takes_no_mark():
    """A 0-dim tensor ahead of the data leaves the microbatches' weights alone."""
    heat = torch.tensor(2.0).double()
    outs = []
    for n in (1, 3):
        tx = ax.chain(ax.shard_model(ax.Env()), ax.accumulate(n))
        state = ax.init(tx, Two, sgd)
        step = ax.step(tx, lambda m, h, x: (m(x) / h).square().mean())
        for _ in range(2):
            state, out = step(state, heat, X[:5])
        outs.append((float(out.loss), state.model.a.weight.detach()))
    assert outs[0][0] == pytest.approx(outs[1][0], abs=1e-12)
    torch.testing.assert_close(outs[0][1], outs[1][1], atol=1e-12, rtol=0)


def test_batches_of_two_sizes_in_one_step_are_refused():
    """One weight cannot be both's."""
    state = ax.init(ax.identity, Two, sgd)
    step = ax.step(ax.identity, lambda m, x, y: m(x).mean() + m(y).mean())
    with pytest.raises(ax.DataError, match=r"batches of .* rows"):
        step(state, mark(X[:2].clone(), 2, 2), mark(X.clone(), 6, 6))


def test_gradients_and_weights_from_elsewhere_are_refused():
    """Another loss's gradients, and weights unfrozen after init."""
    state = ax.init(ax.identity, Two, sgd)
    state.model(X).mean().backward()
    with pytest.raises(ax.PlacementError, match="frozen"):
        ax.step(ax.identity, square)(state, X)
    model = Two()
    model.b.requires_grad_(False)
    state = ax.init(ax.identity, model, sgd)
    model.b.requires_grad_(True)
    with pytest.raises(ax.PlacementError, match=r"frozen at ax\.init"):
        ax.step(ax.identity, square)(state, X)


def test_a_half_precision_loss_does_not_overflow_by_its_rows():
    """100 over 1000 rows is 100, in any number of microbatches."""
    tx = ax.chain(ax.shard_model(ax.Env()), ax.accumulate(2))
    state = ax.init(tx, lambda: nn.Linear(1, 1), sgd)
    step = ax.step(tx, lambda m, x: (m(x) * 0 + 100).half().mean())
    _, out = step(state, torch.ones(1000, 1))
    assert float(out.loss) == 100.0


def spread(model, batch):
    """nan where there is one row."""
    (x,) = batch
    return ax.Mean((x - x.mean(0)).sum() / torch.tensor(len(x) - 1.0), 1.0)


def evaluated(env):
    tx = ax.chain(ax.shard_loader(env), ax.shard_model(env))
    state = ax.init(tx, Two)
    judge = ax.measure(tx, spread)
    number = ax.measure(tx, lambda m, b: {"acc": float(len(b[0]))})
    five, one = (DataLoader(TensorDataset(X[:n]), 4) for n in (5, 1))
    total = sum((judge(state, b) for b in ax.feed(tx, five)), start=ax.Mean(0.0, 0))
    (tail,) = (number(state, b) for b in ax.feed(tx, one))
    return float(ax.reduce(env, total).weight), float(ax.reduce(env, tail["acc"]).value)


def test_a_placeholder_counts_for_nothing_even_where_it_is_nan():
    """Its spread is nan, and a number of its own is none of the batch's."""
    for weight, acc in run(2)(evaluated)():
        assert weight == 3.0  # two ranks of the first batch, one of the second
        assert acc == 1.0


def inputs(env):
    class Time(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(1, 1)

        def forward(self, t):
            self.seen = t.dtype
            return self.l(torch.sin(t))

    tx = ax.chain(ax.with_precision("bf16"), ax.shard_model(env, "fsdp2"))
    state = ax.init(tx, Time(), sgd)
    state, _ = ax.step(tx, square)(state, part(env, torch.full((4, 1), 999.0)))
    return state.model.seen


def test_inputs_keep_their_digits_under_bf16():
    """Autocast casts at each product; a timestep of 999 must not become 1000 before."""
    assert run(2)(inputs)() == [torch.float32] * 2


def test_a_model_built_in_slices_keeps_its_other_tensors():
    """Plain attributes have their data, and list operations are done again right."""

    def factory():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
        model.freqs = torch.arange(900.0) / 10
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), 0.1)
        return model

    model, recorder = deferred.build(factory, budget=2000)
    whole = factory()
    assert torch.equal(model.freqs, whole.freqs)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(recorder.full(ours), theirs)
