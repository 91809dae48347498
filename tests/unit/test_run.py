"""init, the halves of a step, and a model looked at from outside, on one process."""

import pytest
import torch

import accelx as ax
from tests.laws import training as t

ENV = ax.Env()
DATA = t.batches()
TX = t.pipeline(ENV, "plain")


def start(**options):
    """A fresh state."""
    return ax.init(TX, t.made(), t.grouped, **options)


def test_a_step_is_apply_after_grads():
    """To the bit, in weights and report."""
    one, other = start(), start()
    for batch in DATA:
        one, out = ax.step(TX, t.masked)(one, t.part(ENV, batch))
        other, half = ax.grads(TX, t.masked)(other, t.part(ENV, batch))
        assert not half.stepped
        assert half.norm is None
        other, whole = ax.apply(TX)(other, half)
        assert (out.loss, out.norm, out.stepped) == (whole.loss, whole.norm, True)
    assert t.same(t.weights(one.model), t.weights(other.model))


def test_the_same_run_twice_is_the_same_to_the_bit():
    """Nothing is left over from one run for the next."""
    first, second = (t.train(TX, ENV, t.made(), t.bare, t.pair, DATA) for _ in range(2))
    assert all(t.same(a.weights, b.weights) for a, b in zip(first, second, strict=True))


def test_a_model_may_be_given_without_an_optimizer():
    """For a teacher or an evaluation: grads work, and nothing moves it."""
    state = ax.init(ax.identity, t.made())
    assert state.optimizers == ()
    with pytest.raises(ValueError, match="0 optimizers"):
        state.optim  # noqa: B018
    before = t.weights(state.model)
    state, out = ax.grads(ax.identity, t.bare)(state, t.part(ENV, DATA[0]))
    assert all(p.grad is not None for _, p in state.trained)
    assert t.same(before, t.weights(state.model))
    with pytest.raises(ax.PlacementError, match=r"ax\.apply wants an optimizer"):
        ax.apply(ax.identity)(state, out)


def test_a_step_takes_any_arguments():
    """Whatever follows the state goes to the loss."""

    def loss(model, batch, scale, other):
        return t.bare(model, batch) * scale * other["by"]

    _state, out = ax.step(TX, loss)(start(), t.part(ENV, DATA[0]), 2.0, {"by": 3.0})
    first = t.by_hand(t.made(), t.bare, t.grouped, DATA[:1])[0]
    assert float(out.loss) == pytest.approx(6 * first.loss, abs=1e-12)


@pytest.mark.parametrize("mine", [ax.identity, ax.with_precision("bf16")])
def test_an_autocast_around_several_steps_sees_each_update(mine):
    """torch casts a weight once inside of it: by hand it would go on with the first."""
    x = torch.randn(8, 4)

    def losses(tx, around):
        torch.manual_seed(0)
        make = lambda: torch.nn.Linear(4, 2)  # noqa: E731
        state = ax.init(tx, make, lambda m: torch.optim.SGD(m.parameters(), 0.1))
        step, found = ax.step(tx, lambda m, x: m(x).float().square().mean()), []
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            for _ in range(3):
                state, out = step(state, x)
                found.append(float(out.loss))
        return found

    wanted = losses(ax.with_precision("bf16"), False)
    assert len(set(wanted)) == 3
    assert losses(mine, True) == wanted
    assert losses(ax.identity, False) != wanted  # the control


def test_one_step_function_serves_several_states():
    """A pipeline has no memory of its own."""
    step = ax.step(TX, t.bare)
    states = [start(), start()]
    for batch in DATA:
        states = [step(s, t.part(ENV, batch))[0] for s in states]
    assert t.same(*(t.weights(s.model) for s in states))


def test_states_print_what_they_are():
    """The model's class, optimizers, steps and slots."""
    state, _ = ax.step(TX, t.bare)(start(), t.part(ENV, DATA[0]))
    assert repr(state).startswith("State(Net, optimizers=(AdamW), step=1, skipped=0")
    assert "with_schedule" in repr(state)


def test_frozen_lets_gradients_through_and_none_in():
    """The input of a critic gets the gradient that torch gives it."""
    state = ax.init(ax.identity, torch.nn.Linear(3, 1).double())
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    with ax.frozen(state) as model:
        model(x).sum().backward()
    assert torch.equal(x.grad, state.model.weight.detach().expand(2, 3))
    assert all(p.grad is None and p.requires_grad for p in state.model.parameters())


def test_measure_leaves_state_modes_and_gradients():
    """An evaluation between steps is not seen by them."""
    state = start()
    found = ax.measure(TX, t.masked)(state, t.part(ENV, DATA[0]))
    assert isinstance(found, ax.Mean)
    assert state.model.training
    assert all(p.grad is None for p in state.model.parameters())
    assert state.step == 0
    first = t.by_hand(t.made(), t.masked, t.grouped, DATA[:1])[0]
    assert float(found.value) == pytest.approx(first.loss, abs=1e-12)
