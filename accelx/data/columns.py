"""A batch of a `datasets.Dataset` from the columns that it reads.

Its `__getitems__` reads columns and makes a dict of each row, of which collating makes
columns again: 32 rows of 64 numbers and a label take a fifth of a batch's time so.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from accelx import _torch
from accelx.data.collate import collated

_FORMATS = (None, "torch", "numpy", "custom")  # others read no mapping of columns
_NUMBERS = "?bhilqBHIefdFD"  # not uint64, of whose scalars torch makes no tensor


def reads_columns(dataset: Any) -> bool:
    """Whether `__getitems__` is that of `datasets.Dataset`; imports nothing."""
    hub = sys.modules.get("datasets")
    own = getattr(getattr(hub, "Dataset", None), "__getitems__", None)
    used = getattr(getattr(dataset, "__getitems__", None), "__func__", None)
    return own is not None and used is own and dataset.format["type"] in _FORMATS


def gathered(columns: Any, n: int) -> Any:
    """The batch that `default_collate` makes of the rows of `columns`, to the bit.

    None where they are not `n` rows of lists, tensors or arrays, one by one.
    """
    if not isinstance(columns, Mapping) or not columns or _torch.moded():
        return None
    each: dict[str, Any] = dict(columns.items())  # type: ignore[reportUnknownArgumentType]
    if not all(_rows(column) == n for column in each.values()):
        return None
    return {name: _column(column) for name, column in each.items()}


def rows(columns: Any) -> list[Any]:
    """The rows of `columns`, as `datasets.Dataset.__getitems__` makes them."""
    n = len(columns[next(iter(columns))])
    return [{name: column[i] for name, column in columns.items()} for i in range(n)]


def _rows(column: Any) -> int | None:
    if type(column) is list:
        return len(column)  # type: ignore[reportUnknownArgumentType]
    held = type(column) is Tensor or _array(column)
    return len(column) if held and column.ndim else None


def _array(column: Any) -> bool:
    return type(column) is getattr(sys.modules.get("numpy"), "ndarray", None)


def _column(column: Any) -> Any:
    """What `default_collate` makes of a column's rows; of memory of its own."""
    whole = _numbers(column) if _array(column) else column
    if type(whole) is Tensor and _plain(whole):
        return whole.clone(memory_format=torch.contiguous_format)
    return collated([column[i] for i in range(len(column))])


def _numbers(column: Any) -> Any:
    """An array of numbers as a tensor, anything else as it is."""
    if column.dtype.char not in _NUMBERS:
        return column
    try:
        return torch.from_numpy(column)
    except (TypeError, ValueError):  # such as big-endian numbers, a negative stride
        return column


def _plain(column: Tensor) -> bool:
    odd = column.is_nested or column.requires_grad or column.is_conj()
    return column.layout is torch.strided and not (odd or column.is_neg())
