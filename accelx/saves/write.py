"""How one rank's slices become a safetensors file and its index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import attrs
from torch import Tensor

from accelx import storage
from accelx.saves.boxes import Ints
from accelx.saves.dtypes import KINDS
from accelx.saves.manifest import CHUNK, Index, Part, Where, write_index
from accelx.saves.memory import chunks
from accelx.saves.strict import digest
from accelx.storage import Store

ALIGN = 8  # bytes: what a safetensors header is padded to


@attrs.frozen(eq=False)
class Slab:
    """One slice to write."""

    name: str
    tensor: int  # its number in the manifest
    piece: int  # its number in the tensor's layout
    dtype: str
    shape: Ints
    data: Tensor  # (n,) uint8

    @property
    def size(self) -> int:
        """Bytes."""
        return self.data.numel()


def write_part(
    store: Store, number: int, slabs: Sequence[Slab], neighbours: int = 1
) -> Part:
    """Write this rank's slices and their index. Durable, and checked, on return.

    Digests are taken of the memory that is written, beside the writing where the
    `neighbours` on this machine, this rank counted in, leave a core for it. Nothing is
    copied, so the memory must not change meanwhile.
    """
    file, index = f"rank-{number:05d}.safetensors", f"rank-{number:05d}.json"
    head = header(slabs)
    size = len(head) + sum(slab.size for slab in slabs)
    taken: list[list[Future[str]]] = [[] for _ in slabs]
    spare = cores() > neighbours
    with ThreadPoolExecutor(1, "accelx-digest") as pool:

        def parts() -> Iterator[memoryview]:
            yield memoryview(head)
            for slab, mine in zip(slabs, taken, strict=True):
                for chunk in chunks(slab.data, CHUNK):
                    mine.append(_beside(pool if spare else None, chunk))
                    yield chunk

        storage.write(store, file, parts(), size)
        digests = [tuple(one.result() for one in mine) for mine in taken]
    data = write_index(_index(head, slabs, digests))
    storage.write(store, index, [data], len(data))
    return Part(file, size, index, len(data), digest(data))


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _beside(pool: ThreadPoolExecutor | None, chunk: memoryview) -> Future[str]:
    """The digest of `chunk`, taken in the pool, or here where there is none."""
    if pool is not None:
        with suppress(RuntimeError):  # a program that ends: Python 3.12 has no threads
            return pool.submit(digest, chunk)
    taken = Future[str]()
    taken.set_result(digest(chunk))
    return taken


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
    text += b" " * (-len(text) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def _index(
    head: bytes, slabs: Sequence[Slab], digests: Sequence[tuple[str, ...]]
) -> Index:
    slices: dict[tuple[int, int], Where] = {}
    at = len(head)
    for slab, each in zip(slabs, digests, strict=True):
        slices[slab.tensor, slab.piece] = Where(at, slab.size, each)
        at += slab.size
    return Index(len(head), digest(head), slices)
