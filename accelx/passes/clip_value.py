"""Gradient entries that are too large are cut off."""

from __future__ import annotations

from typing import Any

import attrs

from accelx.records import Out, Pass, Rules, Transform, code


@attrs.frozen(repr=False)
class ClipValue:
    """Spec of clip_value."""

    limit: float

    def __repr__(self) -> str:
        return code("clip_value", self)


def clip_value(limit: float) -> Transform:
    """Clamp each entry of the whole gradients to [-limit, limit].

    As torch.nn.utils.clip_grad_value_, after averaging and unscaling. Not neutral.
    Raises ValueError if `limit` is not positive.
    """
    if not isinstance(limit, int | float) or not limit > 0:  # type: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"clip_value wants a positive limit, got {limit!r}; write clip_value(0.5)"
        )

    def before(state: Any, out: Out) -> tuple[Any, Out]:
        from accelx import _torch

        grads = [p.grad for _, p in state.trained if p.grad is not None]
        local = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
        if local:
            _torch.clamp_(local, limit)
        return state, out

    rules = Rules(after=("clip",), why="Out.norm is the norm from before any clipping")
    return Transform(
        (Pass("clip_value", ClipValue(limit), before=before, rules=rules),)
    )
