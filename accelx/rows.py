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
from accelx.state import State

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
    if _stamp(batch, record):
        return batch
    if hasattr(batch, "__dict__"):  # an object of the user's own, tensors inside
        object.__setattr__(batch, "_accelx_rows", record)
    elif record.rows != record.total:
        raise DataError(
            "a batch must hold a tensor, or be an object that takes an attribute, to "
            f"say how many of its rows are real ({record.rows} of {record.total} "
            f"here), got {type(batch).__name__}; return a tensor beside it (such as "
            "the index) from collate_fn"
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
            found, size = _look(inner, size) if inner else (_own(node), size)
        if found is not None:
            return found, size
    return None, size


def _own(node: Any) -> Rows | None:
    found = getattr(node, "_accelx_rows", None)
    return found if isinstance(found, Rows) else None


def one_mark(args: Iterable[Any]) -> None:
    """Refuse arguments that come from batches of different sizes."""
    marks = {mark for mark in (look((arg,))[0] for arg in args) if mark is not None}
    if len(marks) > 1:
        sizes = " and ".join(str(mark.total) for mark in marks)
        raise DataError(
            f"one step weighs all its rows alike, but got batches of {sizes} rows; "
            "take them from one loader, or give each its own ax.grads and then "
            "ax.apply once"
        )


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
    if isinstance(node, (type, State)):
        return ()
    if dataclasses.is_dataclass(node):
        return [getattr(node, field.name) for field in dataclasses.fields(node)]
    if attrs.has(type(node)):
        return [getattr(node, field.name) for field in attrs.fields(type(node))]
    return ()
