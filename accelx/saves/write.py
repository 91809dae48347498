"""How one rank's slices become a safetensors file and its index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import attrs
from torch import Tensor

from accelx import storage
from accelx.saves.boxes import Ints
from accelx.saves.dtypes import KINDS
from accelx.saves.manifest import CHUNK, Index, Part, Where, write_index
from accelx.saves.memory import BLOCK, chunks, flat, pieces
from accelx.saves.strict import digest, hasher
from accelx.storage import Store

LENGTH = 8  # bytes that a safetensors header's length takes, before it
ALIGN = 64  # bytes of a cache line: reading what begins at one takes 0.8 of the time


@attrs.frozen(eq=False)
class Slab:
    """One slice to write."""

    name: str
    tensor: int  # its number in the manifest
    piece: int  # its number in the tensor's layout
    dtype: str
    shape: Ints
    held: Tensor  # its elements, or their bytes

    @property
    def data(self) -> Tensor:
        """The bytes, (n,) uint8; a view where they lie in a row."""
        return flat(self.held)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.held.nbytes


def write_part(store: Store, number: int, slabs: Sequence[Slab]) -> Part:
    """Write this rank's slices and their index. Durable, and checked, on return.

    Digests are taken of the memory that is written. Nothing is copied, so the memory
    must not change meanwhile.
    """
    file, index = f"rank-{number:05d}.safetensors", f"rank-{number:05d}.json"
    slabs = sorted(slabs, key=lambda slab: slab.size % ALIGN > 0)  # whole lines first
    head = header(slabs)
    size = len(head) + sum(slab.size for slab in slabs)
    digests = list[tuple[str, ...]]()
    storage.write(store, file, _parts(head, slabs, digests), size)
    data = write_index(_index(head, slabs, digests))
    storage.write(store, index, [data], len(data))
    return Part(file, size, index, len(data), digest(data))


def _parts(
    head: bytes, slabs: Sequence[Slab], digests: list[tuple[str, ...]]
) -> Iterator[memoryview]:
    """The bytes of the file; once a slab is taken, its digests.

    Blocks are cut at multiples of BLOCK in the file: each is then written in 0.8 of the
    time, by ext4 of Linux 6.18.
    """
    yield memoryview(head)
    at = len(head)
    for slab in slabs:
        taken = list[str]()
        for chunk in chunks(slab.data, CHUNK):
            told = hasher()
            for block in pieces(chunk, BLOCK, at):
                told.update(block)
                yield block
            taken.append(told.hexdigest())
            at += len(chunk)
        digests.append(tuple(taken))


def header(slabs: Sequence[Slab]) -> bytes:
    """The safetensors header, length included, of slices laid end to end."""
    fields: dict[str, object] = {"__metadata__": {"format": "accelx"}}
    at = 0
    for slab in slabs:
        kind = KINDS[slab.dtype]
        shape = [*slab.shape, *([kind.codes] if kind.codes > 1 else [])]
        key = slab.name
        while key in fields:
            key = f"{key}#{slab.piece}"
        end = at + slab.size
        fields[key] = {"dtype": kind.code, "shape": shape, "data_offsets": [at, end]}
        at = end
    return framed(fields)


def framed(fields: Mapping[str, object]) -> bytes:
    """A safetensors header that says `fields`, with its length before it."""
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH + len(text)) % ALIGN)
    return len(text).to_bytes(LENGTH, "little") + text


def _index(
    head: bytes, slabs: Sequence[Slab], digests: Sequence[tuple[str, ...]]
) -> Index:
    slices: dict[tuple[int, int], Where] = {}
    at = len(head)
    for slab, each in zip(slabs, digests, strict=True):
        slices[slab.tensor, slab.piece] = Where(at, slab.size, each)
        at += slab.size
    return Index(len(head), digest(head), slices)
