"""What a safetensors file holds that anybody may have written, and where it lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs

from accelx import storage
from accelx.errors import CheckpointError, DamagedError
from accelx.saves.boxes import Ints, whole
from accelx.saves.check import DIMS, LONG, MOST, NAME
from accelx.saves.dtypes import KINDS, NAMES
from accelx.saves.manifest import Entry, Index, Layout, Manifest, Part, Piece, Where
from accelx.saves.strict import loads
from accelx.saves.verify import THREADS
from accelx.storage import Store

LENGTH = 8  # bytes that say how long a header is
LIMIT = 100_000_000  # bytes of a header: what the format's own library takes
FIELDS = {"dtype", "shape", "data_offsets"}


@attrs.frozen
class Held:
    """One tensor of a file."""

    dtype: str  # torch's name
    shape: Ints
    at: Where


@attrs.frozen
class File:
    """A safetensors file, by its header."""

    name: str
    size: int  # bytes
    header_size: int  # bytes before the first tensor
    tensors: Mapping[str, Held]


def read_header(data: bytes, size: int, what: str) -> dict[str, Held]:
    """The tensors of a file of `size` bytes that begins with `data`, length and header.

    Nothing is believed: names, dtypes, shapes and byte ranges are checked, and the
    ranges must be the whole file, each byte once. Raises DamagedError, and
    CheckpointError for a dtype that torch has not.
    """
    raw = _object(data[LENGTH:], what)
    raw.pop("__metadata__", None)
    held = {name: _tensor(name, one, len(data), what) for name, one in raw.items()}
    end = len(data)
    for offset, length in sorted((h.at.offset, h.at.size) for h in held.values()):
        if offset != end:
            raise _malformed(what, f"a tensor at byte {offset}, where {end} is next")
        end += length
    if end != size:
        raise _malformed(what, f"tensors up to byte {end} of {size}")
    return held


def _object(data: bytes, what: str) -> dict[str, Any]:
    try:
        raw = loads(data, "its JSON")
    except DamagedError as error:
        raise _malformed(what, "what is no plain JSON") from error
    if not isinstance(raw, dict):
        raise _malformed(what, f"a {type(raw).__name__} in place of an object")
    return raw  # type: ignore[reportUnknownVariableType]


def _malformed(what: str, came: str) -> DamagedError:
    return DamagedError(
        f"{what} wants to say what safetensors files hold, got {came}; it is damaged "
        "or was tampered with: fetch it again"
    )


def _tensor(name: str, raw: Any, start: int, what: str) -> Held:
    if not 0 < len(name) <= LONG:
        raise _malformed(what, f"the name {name[:80]!r}")
    if not isinstance(raw, dict) or set(raw) != FIELDS:  # type: ignore[reportUnknownArgumentType]
        raise _malformed(what, f"{str(raw)[:80]} for {name[:80]!r}")
    code = raw["dtype"]
    if not isinstance(code, str) or code not in NAMES:
        raise CheckpointError(
            f"{what} wants dtypes that torch has, but {name[:80]!r} is "
            f"{str(code)[:40]}; write it again with one of {', '.join(sorted(NAMES))}"
        )
    dtype = NAMES[code]
    shape = _numbers(raw["shape"], name, what)
    begin, end = _numbers(raw["data_offsets"], name, what, 2)
    bytes_ = [KINDS[dtype].width, *(max(n, 1) for n in shape)]
    size = math.prod(shape) * KINDS[dtype].width
    if math.prod(bytes_) > MOST or end - begin != size:
        came = f"bytes {begin} to {end} for {name[:80]!r}, {code} {list(shape)}"
        raise _malformed(what, came)
    return Held(dtype, shape, Where(start + begin, size, ()))


def _numbers(raw: Any, name: str, what: str, count: int | None = None) -> Ints:
    fine = isinstance(raw, list) and len(raw) <= DIMS and count in (None, len(raw))  # type: ignore[reportUnknownArgumentType]
    if not fine or not all(type(n) is int and 0 <= n <= MOST for n in raw):
        raise _malformed(what, f"the numbers {str(raw)[:80]} for {name[:80]!r}")
    return tuple(raw)


def read_map(data: bytes, what: str) -> dict[str, str]:
    """Which file each tensor lies in, by an index such as transformers writes.

    Raises DamagedError for what is none, or names a file of another folder.
    """
    files = _object(data, what).get("weight_map")
    if not isinstance(files, dict):
        raise _malformed(what, f"the weight_map {str(files)[:80]}")
    for name, file in files.items():  # type: ignore[reportUnknownVariableType]
        if not isinstance(file, str) or not NAME.fullmatch(file):
            raise _malformed(what, f"{name[:80]!r} in the file {str(file)[:80]!r}")
    return files  # type: ignore[reportUnknownVariableType]


def read_files(
    store: Store, names: Sequence[str], sizes: Mapping[str, Any]
) -> list[File]:
    """The files of those names, by their headers. `sizes` is what lies in the folder.

    Reads a header's bytes and no more. Raises CheckpointError for a file that is not
    there.
    """
    with ThreadPoolExecutor(THREADS[store.local], "accelx-header") as pool:
        return list(pool.map(lambda name: _file(store, name, sizes.get(name)), names))


def _file(store: Store, name: str, size: int | None) -> File:
    what = f"{store.url}/{name}"
    if size is None:
        raise CheckpointError(
            f"wanted {what}, which an index beside it names, found none; fetch all "
            "files of the index"
        )
    if size < LENGTH:
        raise _malformed(what, f"{size} bytes")
    with storage.reading(store, name) as read:
        length = int.from_bytes(_bytes(read, 0, LENGTH), "little")
        if not 2 <= length <= min(LIMIT, size - LENGTH):
            raise _malformed(what, f"a header of {length} bytes in {size}")
        data = _bytes(read, 0, LENGTH + length)
    return File(name, size, len(data), read_header(data, size, what))


def _bytes(read: Callable[[int, memoryview], None], start: int, count: int) -> bytes:
    made = bytearray(count)
    read(start, memoryview(made))
    return bytes(made)


def as_parts(
    files: Sequence[File], homes: Mapping[str, str] | None, what: str
) -> tuple[Manifest, dict[int, Index]]:
    """The files as the parts of a manifest without digests, and their indices.

    `homes` says which file to take a tensor from; `what` says so, in errors.
    """
    part_of = {file.name: number for number, file in enumerate(files)}
    if homes is None:
        homes = {name: file.name for file in files for name in file.tensors}
    layouts: dict[Layout, int] = {}
    entries: dict[str, Entry] = {}
    slices: dict[int, dict[tuple[int, int], Where]] = {n: {} for n in part_of.values()}
    for number, (name, home) in enumerate(homes.items()):
        part = part_of[home]
        held = files[part].tensors.get(name)
        if held is None:
            raise DamagedError(
                f"{what} wants {name[:80]!r} in {home}, which holds no such tensor; "
                "fetch both again"
            )
        pieces = (Piece(whole(held.shape), part),) if 0 not in held.shape else ()
        layout = layouts.setdefault(pieces, len(layouts))
        entries[name] = Entry(held.dtype, held.shape, layout, number)
        slices[part][number, 0] = held.at
    parts = tuple(Part(file.name, file.size, "", 0, "") for file in files)
    manifest = Manifest({}, parts, tuple(layouts), entries, {}, {}, {})
    sizes = enumerate(file.header_size for file in files)
    return manifest, {n: Index(size, "", slices[n]) for n, size in sizes}
