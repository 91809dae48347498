"""Whether what lies in a store is what was saved, to the byte. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from accelx import storage
from accelx.errors import DamagedError
from accelx.saves.manifest import Index, Manifest, read_index
from accelx.saves.strict import digest
from accelx.storage import Store

THREADS = {True: 2, False: 8}  # a local disk; a store far away
Fill = Callable[[int, memoryview], None]  # from a byte of a file into memory


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


def problems(store: Store, manifest: Manifest) -> Iterator[str]:
    """Whatever is not as it was saved, by every byte of every file."""
    for number, part in enumerate(manifest.parts):
        try:
            index = open_index(store, manifest, number, True)
            with storage.reading(store, part.file) as read:
                yield from _in_part(store, manifest, part.file, index, read)
        except (DamagedError, OSError) as error:
            yield str(error)


def _in_part(
    store: Store, manifest: Manifest, file: str, index: Index, read: Fill
) -> Iterator[str]:
    where = f"{store.url}/{file}"
    header = memoryview(bytearray(index.header_size))
    read(0, header)
    if digest(header) != index.header_digest:
        yield damage(where, "the header", 0, index.header_size)
    jobs: Sequence[tuple[str, int, int, str]] = [
        (manifest.names[tensor], at.offset + k * manifest.chunk, at.offset + at.size, d)
        for (tensor, _), at in index.slices.items()
        for k, d in enumerate(at.digests)
    ]

    def look(job: tuple[str, int, int, str]) -> str | None:
        name, start, end, wanted = job
        stop = min(start + manifest.chunk, end)
        chunk = memoryview(bytearray(stop - start))
        read(start, chunk)
        return None if digest(chunk) == wanted else damage(where, name, start, stop)

    with ThreadPoolExecutor(THREADS[store.local], "accelx-verify") as pool:
        yield from filter(None, pool.map(look, jobs))
