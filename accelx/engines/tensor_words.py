"""The words of a tensor-parallel plan, checked without torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from accelx.errors import PlacementError

POSITIONAL = (  # under which ranks hold a part of the positions each
    *("sequence", "row_scatter", "embedding_scatter"),
    *("scatter", "gather", "sequence_gather"),
)
STYLES = (
    *("column", "row", "embedding", "column_gather", "row_whole", "loss", "partial"),
    *POSITIONAL,
)
TRANSFORMERS = {  # what its configs call them; None: whole on each rank, as by default
    "colwise": "column",
    "rowwise": "row",
    "rowwise_split_input": "row_whole",
    "colwise_gather_output": "column_gather",
    "colwise_rep": "column_gather",
    "embedding_rowwise": "embedding",
    "replicated_with_grad_allreduce": "partial",
    "replicate": None,
}


def words(style: Any) -> tuple[Any, ...]:
    """A style as its words; a ParallelStyle of torch is one by itself."""
    return tuple(style.split("+")) if isinstance(style, str) else (style,)


def check_style(style: Any) -> None:
    """Refuse what is no style. Raises PlacementError."""
    for word in words(style):
        _check(word)


def _check(style: Any) -> None:
    if not isinstance(style, str):
        if callable(getattr(style, "_apply", None)):  # torch's ParallelStyle
            return
        style = type(style).__name__
    if style not in STYLES:
        near = difflib.get_close_matches(TRANSFORMERS.get(style) or style, STYLES, 1)
        raise PlacementError(
            f"shard_tensors wants a style out of {', '.join(map(repr, STYLES))}, or a "
            f"ParallelStyle of torch, got {style!r}; write {(near or ['column'])[0]!r}"
        )


def cuts_logits(styles: Iterable[Any]) -> bool:
    """Whether some output may stay cut, for `cross_entropy`."""
    return any(not isinstance(s, str) or "loss" in words(s) for s in styles)
