"""Gradients whose norm is too large are made shorter."""

from __future__ import annotations

import math
from typing import Any

import attrs

from accelx.records import Out, Pass, Rules, Transform, amend, code


@attrs.frozen(repr=False)
class Clip:
    """Spec of clip."""

    norm: float

    def __repr__(self) -> str:
        return code("clip", self)


def clip(norm: float) -> Transform:
    """Scale whole gradients so that their global 2-norm is at most `norm`.

    The norm is taken over every parameter on every rank, after averaging and unscaling;
    `Out.norm` is the norm from before clipping, () in the gradients' dtype, the same on
    all ranks. A norm that is not finite skips the step on all ranks alike, and
    `Out.skipped` says so; looking at it waits for the device. `clip(float("inf"))` only
    measures. Not neutral. Raises ValueError if `norm` is not positive.
    Pascanu, Mikolov, Bengio 2013, section 3.2.
    """
    if not isinstance(norm, int | float) or not norm > 0:  # type: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"clip wants a positive norm, got {norm!r}; write clip(1.0)")

    def before(state: Any, out: Out) -> tuple[Any, Out]:
        from accelx.engines.placed import engine_of

        limit = None if math.isinf(norm) else norm
        found = engine_of(state).clip(state, limit)
        out = amend(out, norm=found)
        if not math.isfinite(float(found)):
            out = amend(out, skipped=f"the gradients' norm is {float(found)}")
        return state, out

    rules = (
        Rules(once=True, why="the smaller of two norms is the one that counts"),
        Rules(
            after=("loss_scale",), why="a scaled loss is judged before it is clipped"
        ),
    )
    return Transform((Pass("clip", Clip(norm), before=before, rules=rules),))
