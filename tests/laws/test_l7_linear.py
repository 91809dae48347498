"""L7: a spent state cannot be read, and a fork goes on as the state would have."""

from functools import cache

import pytest
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader

import accelx as ax
from accelx import testing
from tests.laws import training as t

pytestmark = [pytest.mark.multi, t.quiet_views]
each_kind = pytest.mark.parametrize("kind", t.KINDS)
FIELDS = ("model", "optimizers", "step", "skipped", "slots", "optim", "position")
DATA = t.batches(rows=(5, 4, 3, 6))


@each_kind
def test_a_fork_takes_the_step_that_the_state_would_take(kind):
    """step(fork(s), b) is step(s, b) to the bit, and so is what follows."""

    def rank(env):
        tx = t.pipeline(env, kind, ax.accumulate(2))
        step = ax.step(tx, t.masked)
        state, _ = step(ax.init(tx, t.made(), t.grouped), t.part(env, DATA[0]))
        twin = ax.fork(state)
        before = t.weights(state.model)
        for batch in DATA[1:]:
            twin, ours = step(twin, t.part(env, batch))
        assert t.same(before, t.weights(state.model))  # the first has not moved
        assert not t.same(before, t.weights(twin.model))  # and the other has
        for batch in DATA[1:]:
            state, theirs = step(state, t.part(env, batch))
        assert t.same(t.weights(state.model), t.weights(twin.model))
        assert ours.loss == theirs.loss
        assert ours.norm == theirs.norm
        assert (state.step, twin.step) == (4, 4)
        judge = t.by_hand(t.made(), t.masked, t.grouped, DATA)[-1]
        run = t.Step(float(ours.loss), ours.norm.item(), t.weights(twin.model))
        assert t.apart([judge], [run], env.rank, env.world) < 1e-12

    testing.run(t.ranks(kind))(rank)()


@each_kind
def test_a_fork_of_a_fork_between_grads_and_apply_keeps_the_gradients(kind):
    """Gradients that wait for apply are copied too."""

    def rank(env):
        tx = t.pipeline(env, kind)
        state = ax.init(tx, t.made(), t.grouped)
        state, out = ax.grads(tx, t.bare)(state, t.part(env, DATA[0]))
        twin = ax.fork(ax.fork(state))
        state, _ = ax.apply(tx)(state, out)
        twin, _ = ax.apply(tx)(twin, out)
        assert t.same(t.weights(state.model), t.weights(twin.model))
        assert twin.step == 1

    testing.run(t.ranks(kind))(rank)()


@cache
def judged(history):
    """The weights after these batches, from the start, by hand."""
    data = [DATA[k] for k in history]
    return t.by_hand(t.made(), t.bare, t.grouped, data)[-1].weights


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 3)), max_size=8))
def test_any_tree_of_forks_and_steps_is_as_many_runs(moves):
    """Each state alive is where its own batches alone lead."""
    env = ax.Env()
    tx = t.pipeline(env, "plain")
    step = ax.step(tx, t.bare)
    alive = [((), ax.init(tx, t.made(), t.grouped))]
    for which, move in moves:
        history, state = alive[which % len(alive)]
        if move < 0:
            alive.append((history, ax.fork(state)))
        else:
            state, _ = step(state, t.part(env, DATA[move]))
            alive[which % len(alive)] = ((*history, move), state)
    for history, state in alive:
        if history:
            found, wanted = t.weights(state.model), judged(history)
            gaps = [(found[n] - wanted[n]).abs().max() for n in found]
            assert max(gaps) < 1e-12
        assert state.step == len(history)


def spent_states():
    """A state used by each function that uses one up, by its name."""
    tx = t.pipeline(ax.Env(), "plain")
    batch = t.part(ax.Env(), DATA[0])
    by_step, by_grads, by_apply = (ax.init(tx, t.made(), t.grouped) for _ in range(3))
    ax.step(tx, t.bare)(by_step, batch)
    ax.grads(tx, t.bare)(by_grads, batch)
    by_apply, out = ax.grads(tx, t.bare)(by_apply, batch)
    ax.apply(tx)(by_apply, out)
    return {"step": by_step, "grads": by_grads, "apply": by_apply}


@pytest.mark.parametrize("by", ["step", "grads", "apply"])
def test_a_spent_state_cannot_be_read(by):
    """Every field says what used it and how to fork; printing it is allowed."""
    state = spent_states()[by]
    used = "grads at step 0" if by == "grads" else "step 0"
    for field in FIELDS:
        with pytest.raises(ax.SpentStateError, match=rf"{used}.*ax\.fork\(state\)"):
            getattr(state, field)
    assert used in repr(state)


USES = {
    "step": lambda s, tx, b: ax.step(tx, t.bare)(s, b),
    "grads": lambda s, tx, b: ax.grads(tx, t.bare)(s, b),
    "apply": lambda s, tx, b: ax.apply(tx)(s, ax.Out(0.0, 1)),
    "fork": lambda s, tx, b: ax.fork(s),
    "frozen": lambda s, tx, b: ax.frozen(s).__enter__(),
    "evaluating": lambda s, tx, b: ax.evaluating(s).__enter__(),
    "measure": lambda s, tx, b: ax.measure(tx, t.bare)(s, b),
    "feed": lambda s, tx, b: ax.feed(tx, DataLoader(b[0], batch_size=1), start=s),
}


@pytest.mark.parametrize("use", USES)
def test_a_spent_state_cannot_be_used_again(use):
    """What takes a state refuses a spent one with the remedy, before doing anything."""
    tx = t.pipeline(ax.Env(), "plain")
    with pytest.raises(ax.SpentStateError, match="fork"):
        USES[use](spent_states()["step"], tx, t.part(ax.Env(), DATA[0]))


def test_control_a_fresh_state_reads():
    """What is refused above is fine before the state was used."""
    state = ax.init(t.pipeline(ax.Env(), "plain"), t.made(), t.grouped)
    for field in FIELDS:
        assert getattr(state, field) is not None
    with pytest.raises(AttributeError, match="modle"):
        state.modle  # noqa: B018
