"""How bytes reach any store that fsspec speaks to, and come back from it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from typing_extensions import Buffer

from accelx.errors import StorageError
from accelx.storage_at import Store, filesystem, path_of, protocols
from accelx.storage_blocks import blocks
from accelx.storage_retry import PassingError, attempt
from accelx.storage_s3 import speaks, upload

BLOCK = 32 * 2**20  # bytes; the file's own buffer holds as much again
RANGE = 8 * 2**20  # bytes of one read
READERS = 8  # ranges of one read at the same time


def write(store: Store, name: str, parts: Iterable[Buffer], size: int) -> None:
    """Write `size` bytes as one new object, and look whether the store has them all."""
    fs = filesystem(store)
    if store.root.startswith("/"):  # buckets have no folders to make
        attempt(store, name, "write", lambda: fs.makedirs(store.root, exist_ok=True))
    if speaks(fs):
        upload(store, name, parts, size)
    elif size <= BLOCK:
        (block,) = blocks(f"{store.url}/{name}", parts, size, BLOCK)
        _put(store, name, block)
    else:
        _stream(store, name, parts, size)
    try:
        found = _size(store, name)
    except FileNotFoundError:
        found = None
    if found != size:
        raise StorageError(
            f"{store.url}/{name} wants {size} bytes, but the store has {found}; "
            "remove it and write it again"
        )


def _put(store: Store, name: str, block: bytes) -> None:
    fs = filesystem(store)
    gcs = {"gs", "gcs"} & set(protocols(fs))
    digest = {"consistency": "md5"} if gcs else {}
    path = path_of(store, name)
    try:
        attempt(
            store,
            name,
            "write",
            lambda: fs.pipe_file(path, block, **digest),
        )
    except BaseException as error:
        _discard(store, name, error)
        raise


def _stream(store: Store, name: str, parts: Iterable[Buffer], size: int) -> None:
    fs = filesystem(store)
    path = path_of(store, name)
    file = attempt(store, name, "write", lambda: fs.open(path, "wb", block_size=BLOCK))
    try:
        for block in blocks(f"{store.url}/{name}", parts, size, BLOCK):
            attempt(store, name, "write", _Push(file, block))
        # Once: a file whose `close` failed calls itself closed the next time.
        attempt(store, name, "write", file.close, again=False)
    except BaseException as error:
        _drop(store, name, file, error)
        raise


class _Push:
    """Give a block to a file; again, send only what the file has kept of it."""

    def __init__(self, file: Any, block: bytes) -> None:
        self.file = file
        self.block = block
        self.given = False

    def __call__(self) -> None:
        from fsspec.spec import AbstractBufferedFile

        if self.given and isinstance(self.file, AbstractBufferedFile):
            self.file.flush()
            return
        self.given = True
        self.file.write(self.block)


def _drop(store: Store, name: str, file: Any, why: BaseException) -> None:
    """End a file that is not to become an object; its `close` would make it one."""
    from fsspec.spec import AbstractBufferedFile

    buffered = isinstance(file, AbstractBufferedFile)
    try:
        end = file.discard if buffered else file.close
        attempt(store, name, "abort writing", end, again=False)
    except OSError as error:
        why.add_note(f"What was sent of it may still be stored: {error}")
    finally:
        if buffered:
            file.closed = True
    _discard(store, name, why)


def _discard(store: Store, name: str, why: BaseException) -> None:
    """Remove what a failed write may have left."""
    try:
        remove(store, name)
    except OSError as error:
        why.add_note(f"A part of it may be stored: {error}")


def _size(store: Store, name: str) -> int:
    fs = filesystem(store)
    path = path_of(store, name)

    def ask() -> int:
        fs.invalidate_cache(store.root)
        return fs.info(path)["size"]

    return attempt(store, name, "read", ask)


def read(store: Store, name: str, limit: int) -> bytes:
    """The object's bytes, at most `limit`."""
    fs = filesystem(store)
    path = path_of(store, name)
    size = _size(store, name)
    if size > limit:
        raise StorageError(
            f"{store.url}/{name} wants at most {limit} bytes, but has {size}; "
            "look whether another program wrote it"
        )
    if not size:
        return b""  # an empty range is an error to S3

    def fetch() -> bytes:
        return _whole(store, name, fs.cat_file(path, start=0, end=size), 0, size)

    return attempt(store, name, "read", fetch)


def _whole(store: Store, name: str, data: bytes, offset: int, size: int) -> bytes:
    if len(data) != size:
        raise StorageError(
            f"{store.url}/{name} wants {size} bytes at {offset}, but gave {len(data)}; "
            "it was cut short: read an older save"
        )
    return data


@contextmanager
def reading(store: Store, name: str) -> Generator[Callable[[int, memoryview], None]]:
    """A function that fills a buffer from an offset; threads may share it."""
    fs = filesystem(store)
    path = path_of(store, name)

    def fill(offset: int, out: memoryview) -> None:
        end = offset + len(out)

        def fetch() -> None:
            data = fs.cat_file(path, start=offset, end=end)
            out[:] = _whole(store, name, data, offset, len(out))

        attempt(store, name, "read", fetch)

    with ThreadPoolExecutor(READERS, thread_name_prefix="accelx-read") as pool:

        def read_into(offset: int, out: memoryview) -> None:
            view = out.cast("B") if out.nbytes else out
            starts = range(0, view.nbytes, RANGE)
            if len(starts) == 1:
                fill(offset, view)
                return
            pieces = [(offset + at, view[at : at + RANGE]) for at in starts]
            for future in [pool.submit(fill, *piece) for piece in pieces]:
                future.result()

        yield read_into


def sizes(store: Store) -> dict[str, int | None]:
    """What lies in the folder: name -> bytes, None for a folder."""
    fs = filesystem(store)

    def ask() -> list[dict[str, Any]]:
        fs.invalidate_cache(store.root)
        return fs.ls(store.root or "/", detail=True)

    try:
        found = attempt(store, "", "list", ask)
    except FileNotFoundError:
        return {}
    own = store.root.strip("/")
    paths = {info["name"].strip("/"): info for info in found}
    return {
        path.rpartition("/")[2]: None if info["type"] == "directory" else info["size"]
        for path, info in paths.items()
        if path != own  # some stores keep an empty object that marks the folder
    }


def remove(store: Store, name: str) -> None:
    """Remove an object, if it is there."""
    call = partial(filesystem(store).rm_file, path_of(store, name))
    with suppress(FileNotFoundError):
        attempt(store, name, "remove", call)


def remove_folder(store: Store, first: Sequence[str]) -> None:
    """Remove a folder, the objects `first` before all others."""
    if "/" not in store.root:
        raise ValueError(
            f"a folder in a bucket was wanted, but {store.url} is the bucket; "
            "remove that with the store's own tools"
        )
    for name in first:
        remove(store, name)
    fs = filesystem(store)

    def clear() -> None:
        fs.invalidate_cache(store.root)
        fs.rm(store.root, recursive=True)
        fs.invalidate_cache(store.root)
        if left := fs.find(store.root):  # s3fs passes over what it may not remove
            raise PassingError(
                f"{store.url} was to be removed, but {len(left)} objects are left; "
                "look whether its credentials may remove them"
            )

    with suppress(FileNotFoundError):
        attempt(store, "", "remove", clear)
