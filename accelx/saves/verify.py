"""Whether what lies in a store is what was saved, to the byte. Without torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import attrs

from accelx import storage
from accelx.errors import DamagedError
from accelx.saves.manifest import Index, Manifest, Part, read_index
from accelx.saves.strict import digest
from accelx.storage import Store

THREADS = {True: 2, False: 8}  # a local disk; a store far away
Fill = Callable[[int, memoryview], None]  # from a byte of a file into memory


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_index(store: Store, manifest: Manifest, part: int, checked: bool) -> Index:
    """The index of a part."""
    one = manifest.parts[part]
    what = f"{store.url}/{one.index}"
    data = storage.read(store, one.index, one.index_size)
    if checked and digest(data) != one.index_digest:
        raise DamagedError(
            f"{what} wants to have the digest that the manifest says, got another; "
            "the checkpoint is damaged: take another"
        )
    return read_index(data, manifest, part, what)


def damage(file: str, name: str, start: int, stop: int) -> str:
    """What to say of bytes that are not those that were saved."""
    return (
        f"{file} wants to hold the bytes that were saved, but those of {name} at "
        f"{start} to {stop} have another digest; the checkpoint is damaged: take "
        "another, as load_state(..., fallback=True) does"
    )


def _lost(file: str, name: str, start: int, stop: int) -> str:
    return (
        f"{file} wants to hold {name} at {start} to {stop}, but ends before; the "
        "checkpoint is damaged: take another"
    )


@attrs.frozen
class Fault:
    """Bytes of a file that are lost, or are not those that were saved."""

    file: str  # its name in the checkpoint's folder
    tensor: str  # "" where it is no single one
    start: int
    stop: int
    text: str


def problems(store: Store, manifest: Manifest) -> Iterator[str]:
    """Whatever is not as it was saved, by every byte of every file."""
    return (fault.text for fault in faults(store, manifest))


def faults(
    store: Store, manifest: Manifest, told: Callable[[int], None] = lambda size: None
) -> Iterator[Fault]:
    """Each chunk of each file that is not as it was saved, in the files' order.

    `told` hears of each read how many bytes it took, from several threads.
    """
    there = storage.sizes(store)
    for number, part in enumerate(manifest.parts):
        held = there.get(part.file)
        if held != part.size:
            yield _other_size(store, part, held)
        try:
            index = open_index(store, manifest, number, True)
            told(part.index_size)
        except (DamagedError, OSError) as error:
            yield Fault(part.index, "", 0, part.index_size, str(error))
            continue
        if held is None:
            continue
        try:
            with storage.reading(store, part.file) as fill:
                read = _reader(fill, held, told)
                yield from _in_part(store, manifest, part.file, index, read)
        except OSError as error:  # of the store, not of one chunk
            yield Fault(part.file, "", 0, part.size, str(error))


def _other_size(store: Store, part: Part, held: int | None) -> Fault:
    came = "nothing" if held is None else f"{held} bytes"
    text = (
        f"{store.url}/{part.file} wants to have {part.size} bytes, got {came}; the "
        "checkpoint is damaged: take another"
    )
    return Fault(part.file, "", min(held or 0, part.size), part.size, text)


def _reader(
    fill: Fill, held: int, told: Callable[[int], None]
) -> Callable[[int, int], bytearray | None]:
    def read(start: int, stop: int) -> bytearray | None:
        """Those bytes of the file; None where it ends before."""
        if stop > held:
            return None
        data = bytearray(stop - start)
        fill(start, memoryview(data))
        told(len(data))
        return data

    return read


def _in_part(
    store: Store,
    manifest: Manifest,
    file: str,
    index: Index,
    read: Callable[[int, int], bytearray | None],
) -> Iterator[Fault]:
    jobs: list[tuple[str, int, int, str]] = [
        ("", 0, index.header_size, index.header_digest)
    ]
    for (tensor, _), at in index.slices.items():
        end = at.offset + at.size
        for k, wanted in enumerate(at.digests):
            start = at.offset + k * manifest.chunk
            stop = min(start + manifest.chunk, end)
            jobs.append((manifest.names[tensor], start, stop, wanted))

    def look(job: tuple[str, int, int, str]) -> Fault | None:
        name, start, stop, wanted = job
        data = read(start, stop)
        if data is not None and digest(data) == wanted:
            return None
        say = _lost if data is None else damage
        text = say(f"{store.url}/{file}", name or "the header", start, stop)
        return Fault(file, name, start, stop, text)

    with ThreadPoolExecutor(THREADS[store.local], "accelx-verify") as pool:
        yield from filter(None, pool.map(look, jobs))
