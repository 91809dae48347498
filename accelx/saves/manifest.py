"""What a checkpoint holds: every tensor, how it is cut, and where each slice lies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import attrs

from accelx.saves import check
from accelx.saves.boxes import Box, Ints
from accelx.saves.dtypes import KINDS
from accelx.saves.strict import dumps, loads

VERSION = 1
CHUNK = 4 << 20  # bytes under one digest: what a core's cache holds, and little to redo
MANIFEST = "manifest.json"


@attrs.frozen
class Piece:
    """One slice of a tensor, and the number of the part that holds it."""

    box: Box
    part: int


Layout = tuple[Piece, ...]  # each element of a tensor in exactly one of them


@attrs.frozen
class Entry:
    """One tensor."""

    dtype: str  # torch's name, such as "bfloat16"
    shape: Ints
    layout: int  # number in Manifest.layouts
    number: int  # place in the order of the manifest

    @property
    def width(self) -> int:
        """Bytes an element."""
        return KINDS[self.dtype].width


@attrs.frozen
class Part:
    """What one rank wrote: a safetensors file, and the index of its slices."""

    file: str
    size: int  # bytes
    index: str
    index_size: int  # bytes
    index_digest: str


@attrs.frozen
class Where:
    """Where a slice lies in its part's file."""

    offset: int  # bytes from the start of the file
    size: int  # bytes
    digests: tuple[str, ...]  # of each CHUNK bytes, the last may be shorter


@attrs.frozen
class Index:
    """The slices of one part: (number of the tensor, of the piece) -> where."""

    header_size: int  # bytes before the first slice
    header_digest: str
    slices: Mapping[tuple[int, int], Where]


@attrs.frozen(slots=False)
class Manifest:
    """Everything but the bytes. Equal on all ranks, whatever their number."""

    about: Mapping[str, Any]  # step, skipped, world, time, versions
    parts: tuple[Part, ...]
    layouts: tuple[Layout, ...]
    tensors: Mapping[str, Entry]
    aliases: Mapping[str, str]  # a tied name -> the name it is stored under
    values: Mapping[str, Any]  # all that is no tensor, as typed JSON
    base: Mapping[str, tuple[str, Ints, str]]  # not stored: dtype, shape, fingerprint
    chunk: int = CHUNK

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, by number."""
        return tuple(self.tensors)

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    @cached_property
    def held(self) -> tuple[tuple[int, int], ...]:
        """Of each part: how many slices it holds, and their bytes."""
        users, widths = Counter[int](), Counter[int]()
        for entry in self.tensors.values():
            users[entry.layout] += 1
            widths[entry.layout] += entry.width
        held = [[0, 0] for _ in self.parts]
        for number, layout in enumerate(self.layouts):
            for piece in layout:
                held[piece.part][0] += users[number]
                held[piece.part][1] += piece.box.volume * widths[number]
        return tuple((count, size) for count, size in held)


def write_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON."""
    return dumps(
        {
            "accelx": VERSION,
            "about": manifest.about,
            "chunk": manifest.chunk,
            "parts": [list(attrs.astuple(part)) for part in manifest.parts],
            "layouts": [
                [[*p.box.lo, *p.box.hi, p.part] for p in layout]
                for layout in manifest.layouts
            ],
            "tensors": [
                [name, e.dtype, e.shape, e.layout]
                for name, e in manifest.tensors.items()
            ],
            "aliases": manifest.aliases,
            "values": manifest.values,
            "base": manifest.base,
        },
        ordered=False,
    )


def read_manifest(data: bytes, what: str) -> Manifest:
    """The manifest that `data` holds. `what` names it in errors.

    Nothing is believed: every name, number, shape and slice is checked, and each
    tensor's slices must cover it exactly once. Raises DamagedError.
    """
    raw = check.record(loads(data, what), what, check.MANIFEST)
    check.version(raw["accelx"], VERSION, what)
    parts = tuple(Part(*check.part(p, what)) for p in raw["parts"])
    check.distinct([n for p in parts for n in (p.file, p.index)], what)
    layouts = tuple(_layout(lay, len(parts), what) for lay in raw["layouts"])
    tensors: dict[str, Entry] = {}
    sound: set[tuple[int, Ints]] = set()
    for number, one in enumerate(raw["tensors"]):
        name, dtype, shape, layout = check.tensor(one, len(layouts), what)
        if name in tensors:
            raise check.damaged(what, f"the tensor {name!r} twice")
        if (layout, shape) not in sound:
            check.covers([p.box for p in layouts[layout]], shape, name, what)
            sound.add((layout, shape))
        tensors[name] = Entry(dtype, shape, layout, number)
    aliases = check.aliases(raw["aliases"], tensors, what)
    base = {
        check.tensor_name(name, what): check.base(one, what)
        for name, one in raw["base"].items()
    }
    check.about(raw["about"], what)
    check.values(raw["values"], what)
    chunk = check.chunk(raw["chunk"], what)
    manifest = Manifest(
        raw["about"], parts, layouts, tensors, aliases, raw["values"], base, chunk
    )
    for part, (_, size) in zip(parts, manifest.held, strict=True):
        check.room(part.file, part.size, size, what)
    return manifest


def _layout(raw: Any, parts: int, what: str) -> Layout:
    return tuple(
        Piece(Box(lo, hi), part) for lo, hi, part in check.layout(raw, parts, what)
    )


def write_index(index: Index) -> bytes:
    """The index of a part as JSON."""
    slices = [
        [tensor, piece, at.offset, "".join(at.digests)]
        for (tensor, piece), at in index.slices.items()
    ]
    header = [index.header_size, index.header_digest]
    return dumps({"accelx": VERSION, "header": header, "slices": slices})


def read_index(data: bytes, manifest: Manifest, part: int, what: str) -> Index:
    """The index in `data`, checked against the manifest. Raises DamagedError."""
    raw = check.record(loads(data, what), what, check.INDEX)
    check.version(raw["accelx"], VERSION, what)
    header_size, header_digest = check.header(raw["header"], what)
    slices: dict[tuple[int, int], Where] = {}
    for one in raw["slices"]:
        tensor, piece, offset, digests = check.place(one, len(manifest.tensors), what)
        entry = manifest.tensors[manifest.names[tensor]]
        pieces = manifest.layouts[entry.layout]
        if piece >= len(pieces) or pieces[piece].part != part:
            raise check.damaged(what, f"a slice {piece} of tensor {tensor}")
        if (tensor, piece) in slices:
            raise check.damaged(what, f"slice {piece} of tensor {tensor} twice")
        size = pieces[piece].box.volume * entry.width
        each = check.digests(digests, -(-size // manifest.chunk), what)
        slices[tensor, piece] = Where(offset, size, each)
    if len(slices) != manifest.held[part][0]:
        raise check.damaged(what, f"{len(slices)} of {manifest.held[part][0]} slices")
    spans = [(0, header_size), *((w.offset, w.size) for w in slices.values())]
    check.end_to_end(spans, manifest.parts[part].size, what)
    return Index(header_size, header_digest, slices)
