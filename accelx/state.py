"""What is trained, as a value that is used once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import FunctionType, MappingProxyType
from typing import TYPE_CHECKING, Any

import attrs

from accelx.errors import PlacementError, SpentStateError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class _Slots(dict[str, Any]):
    """Slots that say why one is not there."""

    def __missing__(self, name: str) -> Any:
        there = ", ".join(self) or "no slots"
        raise PlacementError(
            f"the state wants a slot {name!r}, and has {there}: it was made by another "
            "chain than the one that reads it; give ax.init, ax.feed and ax.step the "
            "same tx, or set the slot by ax.with_slot"
        )


def slots_of(slots: Mapping[str, Any]) -> Mapping[str, Any]:
    """A view of a copy of `slots` that nobody can write."""
    return MappingProxyType(_Slots(slots))


_NO_SLOTS = slots_of({})


class Transient:
    """Base of what a pass keeps in its slot for this process only: it is not saved."""

    __slots__ = ()


class Occasional:
    """Base of a slot that is saved only while it is not `empty`, and may be missing."""

    __slots__ = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to save."""
        raise NotImplementedError


def is_saved(slot: object) -> bool:
    """Whether a checkpoint holds this slot."""
    if isinstance(slot, Occasional):
        return not slot.empty
    return not isinstance(slot, Transient)


@attrs.frozen(eq=False, repr=False, slots=True)
class State:
    """Model, optimizers, step, a slot for each pass that remembers. Used once (L7).

    A step spends the state that it is given and returns the next one. PyTorch updates
    in place, so a spent state has nothing of its own left: reading it raises
    SpentStateError. `fork` makes a second, independent one.
    """

    model: Any  # nn.Module; before it is placed, what `init` was given
    optimizers: tuple[Any, ...] = ()
    step: int = 0  # updates made
    skipped: int = 0  # batches that made no update
    slots: Mapping[str, Any] = _NO_SLOTS
    trained: tuple[tuple[str, Any], ...] = ()  # names and parameters with gradients
    still: tuple[Any, ...] = ()  # parameters without, which must stay so
    pending: bool = False  # whether gradients of `grads` wait for `apply`
    spent: str | None = None  # what used it

    @property
    def optim(self) -> Optimizer:
        """The optimizer, where there is exactly one."""
        if len(self.optimizers) != 1:
            raise ValueError(
                f"this state has {len(self.optimizers)} optimizers, not one; "
                "write state.optimizers[i]"
            )
        return self.optimizers[0]

    @property
    def position(self) -> int:
        """Batches used so far, where the data goes on: `step` plus `skipped`."""
        return self.step + self.skipped

    def __getattr__(self, name: str) -> Any:
        # Reached only for a field that `spend` took away, or a name that never was.
        if name in _FIELDS:
            raise SpentStateError(
                f"wanted `.{name}` of a state that {self.spent} has already used; use "
                "the state that it returned (`state, out = step(state, batch)`), or "
                "keep a copy with `ax.fork(state)` before the step"
            )
        raise AttributeError(f"State has no attribute {name!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return fork(self)

    def __repr__(self) -> str:
        if self.spent is not None:
            return f"State(spent by {self.spent})"
        kinds = ", ".join(type(o).__name__ for o in self.optimizers)
        slots = ", ".join(self.slots)
        return (
            f"State({type(self.model).__name__}, optimizers=({kinds}), "
            f"step={self.step}, skipped={self.skipped}, slots=({slots}))"
        )


_FIELDS = (
    "model",
    "optimizers",
    "step",
    "skipped",
    "slots",
    "trained",
    "still",
    "pending",
)


class _Open(State):
    """A State while it is written: stores into a frozen one take three times as long.

    Without fields of its own, so that it becomes a State by its class alone.
    """

    __slots__ = ()
    __setattr__ = object.__setattr__
    __delattr__ = object.__delattr__


_new, _set = object.__new__, object.__setattr__


def check_state(name: str, state: object) -> None:
    """Refuse a model, or anything else, where a state is wanted."""
    if not isinstance(state, State):
        raise TypeError(
            f"ax.{name} wants a State, got {type(state).__name__}; write "
            "state = ax.init(tx, model, optim) and give it that"
        )
    if state.spent is not None:
        raise SpentStateError(
            f"ax.{name} was given a state that {state.spent} has already used; go on "
            "with the state that it returned (`state, out = step(state, batch)`), or "
            "keep a copy with `ax.fork(state)` before the step"
        )


def spend(state: State, by: str) -> None:
    """Take everything out of `state`; from now on reading it raises SpentStateError."""
    gone: Any = state
    _set(gone, "__class__", _Open)
    gone.spent = by
    del gone.model, gone.optimizers, gone.step, gone.skipped
    del gone.slots, gone.trained, gone.still, gone.pending
    gone.__class__ = State


def stepped(state: State, made: bool) -> State:
    """The next state: one update more, or one batch that made none."""
    # written out: attrs.evolve takes 4 us, and a step has few to give
    after: Any = _new(_Open)
    after.model, after.optimizers = state.model, state.optimizers
    after.step, after.skipped = state.step + made, state.skipped + (not made)
    after.slots, after.trained, after.still = state.slots, state.trained, state.still
    after.pending, after.spent = False, None
    after.__class__ = State
    return after


def with_slot(state: State, name: str, value: Any) -> State:
    """The state with slot `name` set to `value`."""
    return attrs.evolve(state, slots=slots_of({**state.slots, name: value}))


def trainable(model: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Names and parameters that get gradients, tied ones once."""
    return tuple((n, p) for n, p in model.named_parameters() if p.requires_grad)


def frozen_in(model: nn.Module) -> tuple[Any, ...]:
    """Parameters that get no gradients."""
    return tuple(p for p in model.parameters() if not p.requires_grad)


def duplicated(
    optimizers: tuple[Any, ...], slots: dict[str, Any], memo: dict[int, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Deep copies that hold what `memo` says in place of the old weights.

    A copy of a torch optimizer leaves out what its class has added to it; not this one.
    """
    copied, new_slots = copy.deepcopy((optimizers, slots), memo)
    for new, old in zip(copied, optimizers, strict=True):
        for name, value in vars(old).items():
            if name.endswith("_hooks"):
                setattr(new, name, copy.copy(value))
            # a function there is a scheduler's wrapper around the old one's step
            if name not in vars(new) and not isinstance(value, FunctionType):
                setattr(new, name, copy.deepcopy(value, memo))
    return copied, new_slots


def fork(state: State) -> State:
    """An independent copy: the next step of one does not touch the other (L7).

    Copies weights, optimizer state, gradients and slots: memory doubles. Both states
    stand at the same step. Raises SpentStateError on a spent state.
    """
    placed = state.slots.get("shard_model")
    if placed is not None and placed.fork is not None:
        return placed.fork(state)
    memo: dict[int, Any] = {}
    model = copy.deepcopy(state.model, memo)
    optimizers, slots = duplicated(state.optimizers, dict(state.slots), memo)
    pairs = zip(state.model.parameters(), model.parameters(), strict=True)
    for theirs, ours in pairs:  # deepcopy leaves the gradients of weights out
        if theirs.grad is not None:
            ours.grad = theirs.grad.detach().clone()
    return attrs.evolve(
        state,
        model=model,
        optimizers=optimizers,
        slots=slots_of(slots),
        trained=trainable(model),
        still=frozen_in(model),
    )
