"""The learning rate as a function of updates made, never of ranks or microbatches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs

from accelx.records import Out, Pass, Rules, Transform, code


@attrs.frozen(repr=False)
class WithSchedule:
    """Spec of with_schedule."""

    fn: Callable[[Any], Any]

    def __repr__(self) -> str:
        return code("with_schedule", self)


def with_schedule(fn: Callable[[Any], Any]) -> Transform:
    """Set learning rates once per update, on any number of ranks.

    `fn` is either a function of the step (updates made before this one, from 0) to a
    factor of each group's own learning rate, such as `warmup_cosine(200, 10_000)`; or a
    function of an optimizer to a torch scheduler, such as
    `lambda o: CosineAnnealingLR(o, 10_000)`, which is made for each optimizer and
    stepped after each update; ReduceLROnPlateau is given `Out.loss`. A skipped step
    moves neither. Not neutral. Raises TypeError if `fn` returns neither a number nor a
    scheduler; the step raises ValueError for a factor below 0, infinite or nan.
    """
    if not callable(fn):
        raise TypeError(
            "with_schedule wants a function of the step or of an optimizer, got "
            f"{fn!r}; write with_schedule(lambda step: 1.0), or lambda o: StepLR(o, 30)"
        )
    why = (
        "two schedules would each set the learning rate; multiply their factors in one"
    )
    return Transform(
        (
            Pass(
                "with_schedule",
                WithSchedule(fn),
                start=lambda state, tx: _open(state, fn),
                before=lambda state, out: _set(state, out, fn),
                after=_advance,
                rules=Rules(once=True, why=why),
            ),
        )
    )


@attrs.frozen
class Schedule:
    """The slot: rates of each optimizer's groups, or torch's schedulers instead."""

    base: tuple[tuple[float, ...], ...] = ()
    schedulers: tuple[Any, ...] = ()


def _open(state: Any, fn: Callable[[Any], Any]) -> Any:
    from accelx.state import with_slot

    if _of_steps(fn):
        base = tuple(
            tuple(float(g["lr"]) for g in o.param_groups) for o in state.optimizers
        )
        return with_slot(state, "with_schedule", Schedule(base=base))
    made = tuple(fn(o) for o in state.optimizers)
    for one in made:
        if not hasattr(one, "step") or not hasattr(one, "state_dict"):
            raise TypeError(
                "with_schedule wants fn(step) to be a number or fn(optimizer) a torch "
                f"scheduler, got {type(one).__name__}; write lambda o: StepLR(o, 30)"
            )
    return with_slot(state, "with_schedule", Schedule(schedulers=made))


def _of_steps(fn: Callable[[Any], Any]) -> bool:
    """Whether `fn` takes a step: one of an optimizer has no use for the number 0."""
    try:
        return isinstance(fn(0), int | float)
    except (TypeError, AttributeError):
        return False


def _set(state: Any, out: Out, fn: Callable[[Any], Any]) -> tuple[Any, Out]:
    slot: Schedule = state.slots["with_schedule"]
    if slot.base:
        factor = fn(state.step)
        if not 0 <= factor < math.inf:
            raise ValueError(
                "with_schedule wants fn(step) to be a factor of at least 0, got "
                f"{factor} for step {state.step}; write max(0.0, ...), or a curve that "
                "ends, such as warmup_linear(200, 10_000)"
            )
        for optimizer, base in zip(state.optimizers, slot.base, strict=True):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                _assign(group, rate * factor)
    return state, out


def _assign(group: dict[str, Any], rate: float) -> None:
    """Set the group's rate; a tensor rate, as compiled optimizers want, stays one."""
    if hasattr(group["lr"], "fill_"):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _advance(state: Any, out: Out) -> tuple[Any, Out]:
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    for scheduler in state.slots["with_schedule"].schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(float(out.loss))
        else:
            scheduler.step()
    return state, out
