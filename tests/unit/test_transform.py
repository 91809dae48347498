"""A user's own function is a pass like any other."""

import pytest
import torch

import accelx as ax
from tests.laws import training as t

ENV = ax.Env()
BATCH = t.part(ENV, t.batches()[0])


def log(calls, name):
    """A pass that writes down when each of its arrows runs."""

    def arrow(kind):
        def run(state, other):
            calls.append(f"{name}.{kind}")
            return state if isinstance(other, ax.Transform) else (state, other)

        return run

    def around(kind):
        def wrap(inner):
            def outer(*args):
                calls.append(f"{name}.{kind}>")
                result = inner(*args)
                calls.append(f"<{name}.{kind}")
                return result

            return outer

        return wrap

    kinds = ("place", "start", "before", "after")
    return ax.transform(
        name,
        forward=around("forward"),
        backward=around("backward"),
        **{kind: arrow(kind) for kind in kinds},
    )


def sgd(model):
    """SGD over all of it."""
    return torch.optim.SGD(model.parameters(), 0.1)


def test_every_arrow_runs_at_its_time_from_left_to_right():
    """place, start, then in a step: backward around forward, before, after."""
    calls = []
    tx = ax.chain(log(calls, "a"), log(calls, "b"))
    state = ax.init(tx, t.made(), sgd)
    assert calls == ["a.place", "b.place", "a.start", "b.start"]
    del calls[:]
    ax.step(tx, t.bare)(state, BATCH)
    assert calls == [
        *("b.backward>", "a.backward>", "b.forward>", "a.forward>"),
        *("<a.forward", "<b.forward", "<a.backward", "<b.backward"),
        *("a.before", "b.before", "a.after", "b.after"),
    ]


def test_a_pass_sees_the_whole_chain_when_it_is_placed():
    """Also what stands to its right."""
    seen = []

    def place(state, tx):
        seen.append(tx.find("clip"))
        return state

    ax.init(ax.chain(ax.transform("look", place=place), ax.clip(2.0)), t.made())
    assert seen[0].norm == 2.0
    assert ax.clip(1.0).find("look") is None


def test_feed_is_composed_from_left_to_right():
    """Each pass gets the Loader that the one before it made."""
    seen = []

    def note(name):
        def feed(loader):
            assert isinstance(loader, ax.Loader)
            seen.append(name)
            return loader

        return ax.transform(name, feed=feed)

    data = torch.utils.data.TensorDataset(torch.arange(4.0))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    found = list(ax.feed(ax.chain(note("a"), note("b")), loader))
    assert seen == ["a", "b"]
    assert [x[0].tolist() for x in found] == [[0, 1], [2, 3]]


def test_a_pass_remembers_in_a_slot_of_its_own():
    """A counter that a step carries from state to state, and that fork copies."""
    from accelx.state import with_slot

    def count(state, out):
        return with_slot(state, "count", state.slots["count"] + 1), out

    tx = ax.transform(
        "count", start=lambda state, tx: with_slot(state, "count", 0), after=count
    )
    state = ax.init(tx, t.made(), sgd)
    step = ax.step(tx, t.bare)
    state, _ = step(state, BATCH)
    twin = ax.fork(state)
    for _ in range(2):
        state, _ = step(state, BATCH)
    assert (state.slots["count"], twin.slots["count"]) == (3, 1)


def test_before_may_change_gradients_and_skip():
    """Whole gradients may be changed; a reason in Out.skipped stops the update."""

    def halve(state, out):
        for p in state.model.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)
        return state, out

    def refuse(state, out):
        import attrs

        return state, attrs.evolve(out, skipped="not today")

    def run(tx):
        state = ax.init(tx, t.made(), sgd)
        before = t.weights(state.model)
        state, out = ax.step(tx, t.bare)(state, BATCH)
        after = t.weights(state.model)
        return out, {n: after[n] - before[n] for n in after}

    _, whole = run(ax.identity)
    _, half = run(ax.transform("halve", before=halve))
    gaps = [(whole[n] - 2 * half[n]).abs().max() for n in whole]
    assert max(gaps) < 1e-12
    out, none = run(ax.transform("refuse", before=refuse))
    assert out.skipped == "not today"
    assert not out.stepped
    assert all(not x.any() for x in none.values())
    assert any(x.any() for x in whole.values())


def test_a_factory_called_alone_acts():
    """shard_model(env)(module) returns the same module, placed."""
    model = t.made()()
    assert ax.shard_model(ENV)(model) is model


def test_a_chain_does_not_act_alone():
    """What is called must be one pass."""
    with pytest.raises(TypeError, match="put it in a chain"):
        ax.chain(ax.shard_model(ENV), ax.clip(1.0))(t.made()())
