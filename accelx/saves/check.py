"""What a manifest may say at all: every field is looked at before it is used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accelx.errors import CheckpointError, DamagedError
from accelx.saves.boxes import Box, Ints, tile
from accelx.saves.dtypes import KINDS

MOST = 2**63 - 1  # bytes, elements, indices
DIMS = 64  # torch's own limit
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")  # a file in the same folder
HEX = re.compile(r"[0-9a-f]{32}")
LONG = 4096  # characters of a tensor's name

MANIFEST: dict[str, type] = {
    "accelx": int,
    "about": dict,
    "chunk": int,
    "parts": list,
    "layouts": list,
    "tensors": list,
    "aliases": dict,
    "values": dict,
    "base": dict,
}
INDEX: dict[str, type] = {"accelx": int, "header": list, "slices": list}


def damaged(what: str, came: str) -> DamagedError:
    """The error for a file that says what cannot be."""
    return DamagedError(
        f"{what} wants to describe a checkpoint, got {came}; it is damaged or was "
        "tampered with: take another checkpoint"
    )


def record(raw: Any, what: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """An object with at least these fields, of these types."""
    if not isinstance(raw, dict):
        raise damaged(what, f"a {type(raw).__name__} in place of an object")
    for name, kind in fields.items():
        if type(raw.get(name)) is not kind:
            raise damaged(what, f"{name}={str(raw.get(name))[:80]}")
    return raw  # type: ignore[reportUnknownVariableType]


def version(number: int, known: int, what: str) -> None:
    """Refuse a format that is newer than this accelx."""
    if number > known:
        raise CheckpointError(
            f"{what} is of format {number}, and this accelx reads up to {known}; "
            "install a newer accelx"
        )
    if number < 1:
        raise damaged(what, f"format {number}")


def whole_number(raw: Any, what: str, most: int = MOST) -> int:
    """An integer from 0 to `most`; a bool is none."""
    if type(raw) is not int or not 0 <= raw <= most:
        raise damaged(what, f"the number {str(raw)[:40]}")
    return raw


def file_name(raw: Any, what: str) -> str:
    """The name of a file in the checkpoint's own folder: no path, no way out of it."""
    if not isinstance(raw, str) or not NAME.fullmatch(raw):
        raise damaged(what, f"the file name {str(raw)[:80]!r}")
    return raw


def hex_digest(raw: Any, what: str) -> str:
    """One digest."""
    if not isinstance(raw, str) or not HEX.fullmatch(raw):
        raise damaged(what, f"the digest {str(raw)[:80]!r}")
    return raw


def of_length(raw: Any, length: int, what: str) -> list[Any]:
    """A list of exactly `length`."""
    if not isinstance(raw, list) or len(raw) != length:  # type: ignore[reportUnknownArgumentType]
        raise damaged(what, f"{str(raw)[:80]} in place of {length} values")
    return raw  # type: ignore[reportUnknownVariableType]


def part(raw: Any, what: str) -> tuple[str, int, str, int, str]:
    """file, size, index, index's size, index's digest."""
    file, size, index, index_size, digest = of_length(raw, 5, what)
    return (
        file_name(file, what),
        whole_number(size, what),
        file_name(index, what),
        whole_number(index_size, what),
        hex_digest(digest, what),
    )


def distinct(names: Sequence[str], what: str) -> None:
    """Refuse a file that is named twice."""
    if len(set(names)) != len(names):
        raise damaged(what, "one file in two places")


def layout(raw: Any, parts: int, what: str) -> Iterable[tuple[Ints, Ints, int]]:
    """lo, hi and part of each slice."""
    if not isinstance(raw, list):
        raise damaged(what, f"the layout {str(raw)[:80]}")
    for one in raw:  # type: ignore[reportUnknownVariableType]
        if not isinstance(one, list) or len(one) % 2 == 0 or len(one) > 2 * DIMS + 1:  # type: ignore[reportUnknownArgumentType]
            raise damaged(what, f"the slice {str(one)[:80]}")  # type: ignore[reportUnknownArgumentType]
        numbers = [whole_number(n, what) for n in one]  # type: ignore[reportUnknownVariableType]
        if numbers[-1] >= parts:
            raise damaged(what, f"a slice in part {numbers[-1]} of {parts}")
        dims = len(numbers) // 2
        yield tuple(numbers[:dims]), tuple(numbers[dims:-1]), numbers[-1]


def tensor_name(raw: Any, what: str) -> str:
    """A name, of a length that a person could read."""
    if not isinstance(raw, str) or not 0 < len(raw) <= LONG:
        raise damaged(what, f"the name {str(raw)[:80]!r}")
    return raw


def extent(raw: Any, dtype: Any, what: str) -> Ints:
    """The shape of a tensor of `dtype`, whose bytes can be counted."""
    if not isinstance(raw, list) or len(raw) > DIMS:  # type: ignore[reportUnknownArgumentType]
        raise damaged(what, f"the shape {str(raw)[:80]}")  # type: ignore[reportUnknownArgumentType]
    if not isinstance(dtype, str) or dtype not in KINDS:
        raise damaged(what, f"the dtype {str(dtype)[:80]!r}")
    shape = tuple(whole_number(n, what) for n in raw)  # type: ignore[reportUnknownVariableType]
    size = KINDS[dtype].width
    for n in shape:
        size *= max(n, 1)
        if size > MOST:
            raise damaged(what, f"a tensor of shape {str(shape)[:80]}")
    return shape


def tensor(raw: Any, layouts: int, what: str) -> tuple[str, str, Ints, int]:
    """name, dtype, shape, layout."""
    name, dtype, shape, number = of_length(raw, 4, what)
    tensor_name(name, what)
    shape = extent(shape, dtype, what)
    if whole_number(number, what) >= layouts:
        raise damaged(what, f"layout {number} of {layouts}")
    return name, dtype, shape, number


def covers(boxes: Sequence[Box], shape: Ints, name: str, what: str) -> None:
    """Refuse slices that overlap, leave something out, or lie outside."""
    why = tile(boxes, shape)
    if why is not None:
        raise damaged(what, f"slices of {name!r} {list(shape)} that do not fit: {why}")


def aliases(
    raw: Mapping[str, Any], tensors: Mapping[str, Any], what: str
) -> dict[str, str]:
    """Names that stand for a tensor that is there."""
    for name, target in raw.items():
        tensor_name(name, what)
        if not isinstance(target, str) or target not in tensors or name in tensors:
            raise damaged(what, f"the alias {name[:80]!r} of {str(target)[:80]!r}")
    return dict(raw)


def base(raw: Any, what: str) -> tuple[str, Ints, str]:
    """dtype, shape and fingerprint of a tensor that is not stored."""
    dtype, shape, fingerprint = of_length(raw, 3, what)
    return dtype, extent(shape, dtype, what), hex_digest(fingerprint, what)


def about(raw: Mapping[str, Any], what: str) -> None:
    """Where the run stood, and on how many ranks."""
    for name in ("step", "skipped", "position", "world"):
        whole_number(raw.get(name), what)
    if not raw["world"]:
        raise damaged(what, "a run on no rank")


def values(raw: Mapping[str, Any], what: str) -> None:
    """The counters. What else is there is looked at by who decodes it."""
    for name in ("step", "skipped"):
        whole_number(raw.get(name), what)


def room(file: str, size: int, held: int, what: str) -> None:
    """Refuse slices that are larger than their file: memory is made by their shapes."""
    if held > size:
        raise damaged(what, f"slices of {held} bytes in {file}, which has {size}")


def chunk(raw: int, what: str) -> int:
    """Bytes under one digest: enough to be few, not more than memory holds."""
    if not 1 << 10 <= raw <= 1 << 30:
        raise damaged(what, f"chunks of {raw} bytes")
    return raw


def header(raw: Any, what: str) -> tuple[int, str]:
    """Size and digest of a file's header."""
    size, digest = of_length(raw, 2, what)
    return whole_number(size, what), hex_digest(digest, what)


def place(raw: Any, tensors: int, what: str) -> tuple[int, int, int, Any]:
    """Number of the tensor, of its piece, offset, digests."""
    number, piece, offset, digests_ = of_length(raw, 4, what)
    if whole_number(number, what) >= tensors:
        raise damaged(what, f"tensor {number} of {tensors}")
    return number, whole_number(piece, what), whole_number(offset, what), digests_


def digests(raw: Any, count: int, what: str) -> tuple[str, ...]:
    """`count` digests that were written one after the other."""
    if not isinstance(raw, str) or len(raw) != 32 * count:
        raise damaged(what, f"digests {str(raw)[:40]!r} in place of {count}")
    each = tuple(raw[i : i + 32] for i in range(0, len(raw), 32))
    for one in each:
        hex_digest(one, what)
    return each


def end_to_end(spans: Iterable[tuple[int, int]], size: int, what: str) -> None:
    """Refuse byte ranges (offset, size) that are not the whole file, end to end."""
    end = 0
    for offset, length in sorted(spans):
        if offset != end:
            raise damaged(what, f"a slice at byte {offset}, where {end} is next")
        end += length
    if end != size:
        raise damaged(what, f"slices up to byte {end} of {size}")
