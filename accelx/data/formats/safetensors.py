"""safetensors: all tensors of a file have one leading dimension, its rows.

A block is a range of rows of about 1 MiB, of which each chosen tensor's bytes are read.
The index is made of headers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import attrs
import torch
from torch import Tensor

from accelx import storage
from accelx.data.formats.format import (
    RUN,
    Block,
    Columns,
    File,
    FlawedError,
    Format,
    Row,
    Scan,
    pick,
    read,
    told,
)

LARGEST = 100_000_000  # bytes of a header, the format's own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
}


@attrs.frozen
class _Stored:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file

    @property
    def row(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])


@attrs.frozen(eq=False)
class Tensors:
    """The rows of one block."""

    tensors: dict[str, Tensor]
    rows: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def take(self, rows: Sequence[int]) -> list[Row]:
        """Copies of these rows: {name: tensor without the leading dimension}."""
        return [{k: v[i].clone() for k, v in self.tensors.items()} for i in rows]


def scan(file: File, careful: bool) -> Scan:
    """Ranges of rows, from the header."""
    del careful
    stored = _header(file)
    rows = {
        name: each.shape[0] if each.shape else None for name, each in stored.items()
    }
    if len(set(rows.values())) != 1 or None in rows.values():
        raise FlawedError(f"its tensors have no leading dimension in common: {rows}")
    (total,) = {each.shape[0] for each in stored.values()}
    row = max(1, sum(each.row for each in stored.values()))
    step = max(1, RUN // row)
    cuts = [(at, min(at + step, total)) for at in range(0, total, step)]
    blocks = tuple(Block(at, to, to - at, (to - at) * row) for at, to in cuts)
    schema = tuple(
        sorted((n, f"{e.dtype} {list(e.shape[1:])}") for n, e in stored.items())
    )
    return Scan(blocks, schema=schema)


def _header(file: File) -> dict[str, _Stored]:
    with told("its header"):
        size = int.from_bytes(read(file, 0, min(8, file.size)), "little")
        if not 0 < size <= min(LARGEST, file.size - 8):
            raise FlawedError(f"its header would have {size} bytes")
        header = json.loads(bytes(read(file, 8, 8 + size)))
        header.pop("__metadata__", None)
        found = {name: _stored(name, each, 8 + size) for name, each in header.items()}
    last = max(
        (e.start + e.shape[0] * e.row for e in found.values() if e.shape), default=0
    )
    if last > file.size:
        raise FlawedError(f"it is cut short: {last} bytes are wanted, of {file.size}")
    return found


def _stored(name: str, told_of: dict[str, Any], base: int) -> _Stored:
    kind, (start, stop) = told_of["dtype"], told_of["data_offsets"]
    if kind not in DTYPES:
        raise FlawedError(f"torch has no dtype for {kind} of the tensor {name!r}")
    stored = _Stored(DTYPES[kind], tuple(told_of["shape"]), base + start)
    if stop - start != stored.dtype.itemsize * math.prod(stored.shape):
        raise FlawedError(
            f"the bytes of the tensor {name!r} are not those of its shape"
        )
    return stored


_kept = lru_cache(maxsize=64)(_header)  # no handle, so that a fork may keep it


def load(file: File, block: Block, columns: Columns) -> Tensors:
    """Rows `block.start` to `block.stop` of the chosen tensors."""
    stored = pick(dict(_kept(file)), columns, file)
    found: dict[str, Tensor] = {}
    with storage.reading(file.store, file.name) as read_into:
        for name, each in stored.items():
            data = bytearray(block.rows * each.row)
            read_into(each.start + block.start * each.row, memoryview(data))
            found[name] = _tensor(data, each, block.rows)
    return Tensors(found, block.rows)


def _tensor(data: bytearray, stored: _Stored, rows: int) -> Tensor:
    shape = (rows, *stored.shape[1:])
    if not data:
        return torch.empty(shape, dtype=stored.dtype)
    return torch.frombuffer(data, dtype=stored.dtype).view(shape)


FORMAT = Format("safetensors", (".safetensors",), scan, load)
