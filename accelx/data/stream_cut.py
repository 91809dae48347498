"""How a batch that came whole is cut into each rank's rows."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from torch import Tensor

from accelx import tree
from accelx.errors import DataError
from accelx.rows import leading


def rows_in(batch: Any, ranks: int) -> int:
    """Rows of a whole batch: of its first tensor, or entries of its first list.

    Raises DataError where several ranks would have nothing to divide.
    """
    found = leading(batch)
    found = _entries(batch) if found is None else found
    if found or ranks == 1:
        return found or 1
    raise DataError(
        f"a stream of whole batches on {ranks} ranks wants batches with rows to "
        f"divide, got {type(batch).__name__} without a row; give batches of tensors or "
        "lists, or a dataset of rows with batch_size="
    )


def cut(batch: Any, counts: tuple[int, ...]) -> list[Any]:
    """A batch for each rank; for a rank without rows the first row of the batch.

    On one rank it is the batch itself. Tensors are views. A list with one entry a row,
    texts or tensors of any lengths, is cut between them; one of tensors that have all
    rows is a list of columns. Raises DataError for a tensor with other rows.
    """
    if len(counts) == 1:
        return [batch]
    rows = sum(counts)
    spans = [(end - n, end) if n else (0, 1) for n, end in _ends(counts)]

    def whole(node: Any) -> bool:
        return isinstance(node, Tensor) or _per_row(node, rows)

    flat = tree.flatten(batch, whole)
    each = [_cut(path, leaf, rows, spans) for path, leaf in flat]
    return [
        tree.unflatten(batch, (parts[i] for parts in each), whole)
        for i in range(len(counts))
    ]


def _ends(counts: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip(counts, accumulate(counts), strict=True))


def _cut(path: str, leaf: Any, rows: int, spans: list[tuple[int, int]]) -> list[Any]:
    if isinstance(leaf, Tensor) and leaf.dim() and leaf.size(0) != rows:
        raise DataError(
            f"a batch of {rows} rows is cut over {len(spans)} ranks, but batch{path} "
            f"has shape {tuple(leaf.shape)}; give it {rows} rows, make it 0-dim, or a "
            "list with one entry a row"
        )
    if isinstance(leaf, Tensor) and not leaf.dim():
        return [leaf.view_as(leaf) for _ in spans]  # each takes its own mark
    if isinstance(leaf, Tensor) or _per_row(leaf, rows):
        return [leaf[low:high] for low, high in spans]
    return [leaf] * len(spans)


def _per_row(node: Any, rows: int) -> bool:
    if not isinstance(node, list) or len(node) != rows:  # type: ignore[reportUnknownArgumentType]
        return False
    inner = tree.leaves(node)
    return not inner or not all(_column(leaf, rows) for leaf in inner)


def _column(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.size(0) == rows


def _entries(node: Any) -> int | None:
    if isinstance(node, list):
        return len(node)  # type: ignore[reportUnknownArgumentType]
    if not tree.children(node):
        return None
    level = tree.flatten(node, lambda inner: inner is not node)
    found = (_entries(one) for _, one in level)
    return next((n for n in found if n is not None), None)
