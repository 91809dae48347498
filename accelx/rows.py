"""How many rows of a batch are real, carried as an attribute on the batch's tensors.

So the batch stays of the user's own type, and a row that only pads is known as such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor

from accelx import tree
from accelx.errors import DataError
from accelx.state import State

B = TypeVar("B")
_BARE = frozenset((str, bytes, int, float, bool, type(None)))  # texts: 0.4 us each


@attrs.define(eq=False)
class Waited:
    """How long a process waited for batches of one loader since a step last asked."""

    seconds: float = 0.0

    def take(self) -> float:
        """The seconds so far; the count starts again at 0."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@attrs.frozen
class Rows:
    """The real rows of one global batch."""

    rows: int  # on this rank, the first ones; 0 where it only got rows that pad
    total: int  # over all ranks
    # of a loader whose batches have one shape: rows that pad may follow the real ones,
    # so a plain mean over rows is refused, of a full batch too
    padded: bool = False
    # of the loader's, the same for all its batches; says nothing about this batch
    waited: Waited | None = attrs.field(default=None, eq=False, repr=False)
    # of a microbatch: the rows of others are not here
    cut: bool = attrs.field(default=False, eq=False, repr=False)


def mark(batch: B, rows: int, total: int) -> B:
    """Write `Rows(rows, total)` on every tensor of `batch`, and return the same batch.

    Effect: sets one attribute on the tensors; containers are left as they are.
    A batch without a tensor is returned unmarked, unless `rows` is 0: a placeholder
    that cannot be told from data raises DataError.
    """
    return stamp(batch, Rows(rows, total))


def stamp(batch: B, record: Rows) -> B:
    """`mark` with a record that was made before, for loops where it stays the same.

    A tensor with the mark of another batch, which holds it as well, is given as a view.
    """
    try:
        stamped = _stamp(batch, record)
    except _HeldElsewhere:
        batch = tree.map_leaves(lambda leaf: _apart(leaf, record), batch)
        stamped = _stamp(batch, record)
    if stamped:
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
    first = _with_rows(args)
    return None if first is None else first.size(0)


def _with_rows(nodes: Iterable[Any]) -> Tensor | None:
    for node in nodes:
        if type(node) in _BARE:
            continue
        if isinstance(node, Tensor):
            found = node if node.dim() else None
        else:
            found = _with_rows(_children(node))
        if found is not None:
            return found
    return None


def row_weights(batch: object) -> Tensor:
    """1 for each real row of `batch` and 0 for each that only pads: (L,) float32.

    L is `size(0)` of the batch's first tensor with a dimension, on whose device they
    are; the real rows are the first. A batch without a mark has real rows alone. With
    them a loss is right under padding:
    `ax.Mean((per_row * w).sum(), w.sum())`. Raises DataError without such a tensor, and
    where the batch has other rows than it says.
    """
    first, marked = _with_rows((batch,)), rows_of(batch)
    if first is None:
        raise DataError(
            "row_weights wants a batch with rows, got "
            f"{type(batch).__name__} without a tensor that has a dimension; give it "
            "what ax.feed yielded, or compute weights of your own"
        )
    length = first.size(0)
    real = length if marked is None else marked.rows
    pads = marked is not None and (marked.padded or not marked.rows)
    if real > length or (real < length and not pads):
        raise DataError(
            f"the batch says that it has {real} rows here, but its tensors have "
            f"{length}; do not drop rows after ax.feed, and where collate_fn makes "
            "several of an item, return their weights beside them"
        )
    return (torch.arange(length, device=first.device) < real).float()


def look(
    nodes: Iterable[Any], size: int | None = None
) -> tuple[Rows | None, int | None]:
    """The first mark in `nodes`, or else the first `size(0)`: one walk, at each step.

    `size` is that of what was looked at before.
    """
    for node in nodes:
        if isinstance(node, Tensor):
            if size is None and node.ndim:
                size = node.shape[0]  # 0.3 us less than size(0)
            found = getattr(node, "_accelx_rows", None)
        elif (kind := type(node)) in _BARE:
            continue
        else:  # the usual containers without another call: 0.3 us each
            inner = node if kind is list or kind is tuple else _children(node)
            found, size = look(inner, size) if inner else (_own(node), size)
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


class _HeldElsewhere(Exception):  # noqa: N818 it never leaves this file
    """A tensor carries the mark of a batch of other rows."""


def _stamp(node: Any, record: Rows) -> bool:
    if isinstance(node, Tensor):
        _write(node, record)
        return True
    found = False
    for child in _children(node):
        kind = type(child)
        if kind is Tensor:  # a call less a tensor: 0.3 us
            if child.__dict__.setdefault("_accelx_rows", record) is not record:
                _write(child, record)
            found = True
        elif kind not in _BARE and _stamp(child, record):
            found = True
    return found


def _write(tensor: Tensor, record: Rows) -> None:
    if getattr(tensor, "_accelx_rows", record) != record:
        raise _HeldElsewhere
    tensor._accelx_rows = record  # type: ignore[attr-defined]


def _apart(leaf: Any, record: Rows) -> Any:
    """The leaf, or where it has another mark, a view of it, which has none."""
    if not isinstance(leaf, Tensor) or getattr(leaf, "_accelx_rows", record) == record:
        return leaf
    return leaf.view_as(leaf) if leaf.requires_grad else leaf.detach()


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
