"""How many rows of a batch are real, carried as an attribute on the batch's tensors.

So the batch stays of the user's own type, and a row that only pads is known as such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import attrs
from torch import Tensor

from accelx.errors import DataError

B = TypeVar("B")


@attrs.frozen
class Rows:
    """The real rows of one global batch."""

    rows: int  # on this rank; 0 where this rank only got a placeholder row
    total: int  # over all ranks


def mark(batch: B, rows: int, total: int) -> B:
    """Write `Rows(rows, total)` on every tensor of `batch`, and return the same batch.

    Effect: sets one attribute on the tensors; containers are left as they are.
    A batch without a tensor is returned unmarked, unless `rows` is 0: a placeholder
    that cannot be told from data raises DataError.
    """
    return stamp(batch, Rows(rows, total))


def stamp(batch: B, record: Rows) -> B:
    """`mark` with a record that was made before, for loops where it stays the same."""
    if not _stamp(batch, record) and record.rows == 0:
        raise DataError(
            "a batch must hold a tensor to say that its row is only a placeholder, got "
            f"{type(batch).__name__} without one on a rank that has none of the "
            f"{record.total} rows; return a tensor (such as an index) from collate_fn, "
            "or use drop_last=True with a batch_size of at least the number of ranks"
        )
    return batch


def rows_of(*args: object) -> Rows | None:
    """The first mark in `args`; None where no tensor carries one."""
    return look(args)[0]


def leading(*args: object) -> int | None:
    """`size(0)` of the first tensor in `args` with a dimension; None without one."""
    return look(args)[1]


def look(args: Iterable[Any]) -> tuple[Rows | None, int | None]:
    """The first mark in `args` and the first `size(0)`, in one walk: a step does it."""
    return _look(args, None)


def _look(nodes: Iterable[Any], size: int | None) -> tuple[Rows | None, int | None]:
    for node in nodes:
        if isinstance(node, Tensor):
            if size is None and node.dim():
                size = node.size(0)
            found = getattr(node, "_accelx_rows", None)
        else:
            kind = type(node)  # the usual containers without another call: 0.3 us each
            inner = node if kind is list or kind is tuple else _children(node)
            found, size = _look(inner, size)
        if found is not None:
            return found, size
    return None, size


def _stamp(node: Any, record: Rows) -> bool:
    if isinstance(node, Tensor):
        node._accelx_rows = record  # type: ignore[attr-defined]
        return True
    found = False
    for child in _children(node):
        if type(child) is Tensor:  # a call less a tensor: 0.3 us
            child._accelx_rows = record  # type: ignore[attr-defined]
            found = True
        elif _stamp(child, record):
            found = True
    return found


def _children(node: Any) -> Iterable[Any]:
    if type(node) is list or isinstance(node, (list, tuple)):
        return node  # type: ignore[return-value]
    if type(node) is dict:
        return node.values()  # type: ignore[return-value]
    if isinstance(node, (str, bytes, int, float)) or node is None:
        return ()
    if isinstance(node, Mapping):
        return node.values()  # type: ignore[return-value]
    if isinstance(node, type):
        return ()
    if dataclasses.is_dataclass(node):
        return [getattr(node, field.name) for field in dataclasses.fields(node)]
    if attrs.has(type(node)):
        return [getattr(node, field.name) for field in attrs.fields(type(node))]
    return ()
