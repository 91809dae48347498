"""One global batch in several smaller passes: less memory, the same numbers."""

from __future__ import annotations

import warnings
from typing import Any

import attrs

from accelx.errors import NeutralityWarning
from accelx.records import Pass, Rules, Transform, code


@attrs.frozen(repr=False)
class Accumulate:
    """Spec of accumulate."""

    n: int

    def __repr__(self) -> str:
        return code("accumulate", self)


def accumulate(n: int) -> Transform:
    """Cut each batch into `n` microbatches and add up their gradients.

    A memory dial: the step, its loss and its gradients are those of the whole batch
    (L4), for a loss that is a mean over rows, and for a `Mean` under any mask. The
    batch is cut along dimension 0 of its tensors and along lists with one entry a row;
    0-dim tensors, numbers and the like go to every microbatch. One reduction over ranks
    a step. Raises ValueError if n < 1, DataError for a tensor that has neither the
    batch's rows nor no dimension, and for batches of static shapes whose rows `n` does
    not divide. Batch normalisation sees microbatches, and other buffers that forward
    changes move once for each: a NeutralityWarning says so.
    """
    if not isinstance(n, int) or n < 1:  # type: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"accumulate wants a whole number of at least 1, got {n!r}; write 1 or more"
        )

    def backward(grads: Any) -> Any:
        looked = list[bool]()  # once is enough

        def accumulated(state: Any, *args: Any) -> tuple[Any, Any]:
            from accelx.engines.buffers import marks, say_cut

            before = {} if looked else marks(state.model)
            state, out = _added(grads, n, state, args)
            if not looked:
                looked.append(True)
                say_cut(state.model, before, n)
            return state, out

        return accumulated if n > 1 else grads

    rules = Rules(
        once=True, why="a batch is cut once; keep one, with the n that you mean"
    )
    return Transform(
        (
            Pass(
                "accumulate",
                Accumulate(n),
                start=lambda state, tx: _look(state, n),
                backward=backward,
                rules=rules,
                neutral=True,
            ),
        )
    )


def _added(grads: Any, n: int, state: Any, args: Any) -> tuple[Any, Any]:
    """The gradients of each microbatch, one after another; what they report, added."""
    from accelx.cut import add, cut
    from accelx.engines.placed import engine_of
    from accelx.env_part import rows_env

    placed = state.slots.get("shard_model")
    ranks = 1 if placed is None else rows_env(placed.env).world
    parts = cut(args, n, ranks)
    outs = list[Any]()
    with engine_of(state).quiet(state):
        for part in parts[:-1]:
            state, out = grads(state, *part)
            outs.append(out)
    state, out = grads(state, *parts[-1])
    return state, add([*outs, out])


def _look(state: Any, n: int) -> Any:
    """Point out layers whose numbers depend on how a batch is cut."""
    from accelx.engines.placed import across

    names = across(state.model) if n > 1 else []
    if names:
        warnings.warn(
            f"{', '.join(names[:5])} normalise over the rows of one microbatch, so "
            f"accumulate({n}) changes numbers; write GroupNorm or LayerNorm, or leave "
            "accumulate out",
            NeutralityWarning,
            stacklevel=2,
        )
    return state
