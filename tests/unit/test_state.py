"""A state: what it tells, how it is spent, what goes wrong when it is mistaken."""

import copy

import attrs
import pytest
import torch
from torch import nn

import accelx as ax
from accelx.state import duplicated, frozen_in, spend, stepped, trainable


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def fresh(tx=ax.identity):
    torch.manual_seed(0)
    return ax.init(tx, nn.Linear(2, 1), sgd)


def square(model, x):
    return model(x).square().mean()


def test_a_state_prints_what_it_holds():
    """Names and counts, no tensors; once spent, by what."""
    state = fresh(ax.with_schedule(ax.warmup_linear(1, 4)))
    assert repr(state) == (
        "State(Linear, optimizers=(SGD), step=0, skipped=0, slots=(with_schedule))"
    )
    spend(state, "a test")
    assert repr(state) == "State(spent by a test)"


@pytest.mark.parametrize(
    "field", ["model", "optimizers", "step", "skipped", "slots", "trained", "optim"]
)
def test_no_field_of_a_spent_state_can_be_read(field):
    """Each raises, names the field's user and the way out."""
    state = fresh()
    spend(state, "step 7")
    with pytest.raises(ax.SpentStateError, match=r"step 7 has already used.*ax\.fork"):
        getattr(state, field)


@pytest.mark.parametrize("made", [fresh, lambda: stepped(fresh(), made=True)])
def test_no_field_can_be_written(made):
    """Neither before it is spent nor after; it is a State and nothing else."""
    state = made()
    for _ in range(2):
        assert type(state) is ax.State
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            state.step = 3
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            del state.slots
        if state.spent is None:
            spend(state, "a test")


def test_a_name_that_never_was_is_an_attribute_error():
    """A slip of the pen is not a spent state."""
    with pytest.raises(AttributeError, match="no attribute 'modle'"):
        _ = fresh().modle


def test_the_position_counts_batches_and_the_step_updates():
    """A skipped batch moves the data and nothing else."""
    state = stepped(stepped(fresh(), made=True), made=False)
    assert (state.step, state.skipped, state.position) == (1, 1, 2)


def test_one_optimizer_has_a_short_name_and_two_have_not():
    """`optim` is refused where it would have to choose."""
    two = ax.init(
        ax.identity,
        nn.Linear(2, 1),
        lambda m: [torch.optim.SGD([m.weight], 0.1), torch.optim.SGD([m.bias], 0.1)],
    )
    assert type(fresh().optim) is torch.optim.SGD
    with pytest.raises(ValueError, match=r"2 optimizers.*state\.optimizers\[i\]"):
        _ = two.optim


def test_a_slot_is_set_in_a_state_of_its_own():
    """The other state keeps what it had; slots cannot be written in place."""
    state = fresh()
    other = ax.with_slot(state, "mine", 3)
    assert (dict(state.slots), dict(other.slots)) == ({}, {"mine": 3})
    with pytest.raises(TypeError):
        other.slots["mine"] = 4
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        other.step = 4


def test_trainable_and_frozen_parameters_are_told_apart():
    """Together they are all, each once."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    assert [n for n, _ in trainable(model)] == ["1.weight", "1.bias"]
    assert len(frozen_in(model)) == 2


class Counting(torch.optim.SGD):
    """An optimizer with something of its own, which torch's copy leaves out."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.calls = [0]

    def step(self, closure=None):
        self.calls[0] += 1
        return super().step(closure)


def test_a_copy_of_an_optimizer_has_what_its_class_added():
    """And holds the copy's weights; torch's own deep copy is the control."""
    model = nn.Linear(2, 1)
    old = Counting(model.parameters(), 0.1)
    assert not hasattr(copy.deepcopy(old), "calls")
    memo = {}
    twin = copy.deepcopy(model, memo)
    ((new,), _) = duplicated((old,), {}, memo)
    new.step()
    assert (old.calls, new.calls) == ([0], [1])
    assert new.param_groups[0]["params"][0] is twin.weight


def test_a_deep_copy_of_a_state_is_a_fork():
    """One step of each, from one start, ends alike and apart."""
    state = fresh()
    twin = copy.deepcopy(state)
    step = ax.step(ax.identity, square)
    state, _ = step(state, torch.ones(3, 2))
    assert not torch.equal(state.model.weight, twin.model.weight)
    twin, _ = step(twin, torch.ones(3, 2))
    assert torch.equal(state.model.weight, twin.model.weight)


@pytest.mark.parametrize("name", ["step", "grads", "measure", "apply"])
def test_arguments_in_another_order_say_which_comes_first(name):
    """`ax.step(loss, tx)` is told from `ax.step(tx, loss)`."""
    make = getattr(ax, name)
    with pytest.raises(TypeError, match=rf"ax\.{name} wants a transform first.*square"):
        make(square) if name == "apply" else make(square, ax.identity)


@pytest.mark.parametrize("lend", [ax.frozen, ax.evaluating])
def test_a_model_in_place_of_a_state_is_refused(lend):
    """The way to a state is in the message."""
    with pytest.raises(TypeError, match=r"wants a State, got Linear; write state ="):
        lend(nn.Linear(1, 1)).__enter__()


@pytest.mark.parametrize("make", [ax.shard_model, ax.shard_loader])
def test_a_forgotten_env_is_asked_for(make):
    """Before it is taken for one."""
    with pytest.raises(TypeError, match=r"wants an Env first, got Linear.*ax\.connect"):
        make(nn.Linear(1, 1))
