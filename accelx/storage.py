"""Where bytes of a save lie: one folder at a URL, on a disk or in an object store."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial

from typing_extensions import Buffer

from accelx import storage_local as local, storage_remote as remote
from accelx.errors import AccelxError, StorageError
from accelx.storage_at import Store as Store, at as at, inside as inside, path_of


@contextmanager
def _worded(store: Store, verb: str, name: str = "") -> Generator[None]:
    """What the system says of a local folder, as the error that every store raises."""
    try:
        yield
    except (AccelxError, FileNotFoundError):
        raise
    except OSError as error:
        where = f"{store.url}/{name}" if name else store.url
        failure = StorageError(
            f"to {verb} {where} was wanted, but the system said {error}; look at the "
            "folder, its rights and the space on its disk"
        )
        failure.errno = error.errno
        raise failure from error


def write(store: Store, name: str, parts: Iterable[Buffer], size: int) -> None:
    """Write `size` bytes as one new object, and wait until the store has them.

    A part is valid until the next is asked for. No object is left if one fails.
    Raises StorageError if the parts come to another size, or the store fails.
    """
    if store.local:
        with _worded(store, "write", name):
            local.write(path_of(store, name), parts, size)
    else:
        remote.write(store, name, parts, size)


def read(store: Store, name: str, limit: int) -> bytes:
    """The whole object, of at most `limit` bytes.

    Raises FileNotFoundError if there is none, StorageError if it is larger.
    """
    if store.local:
        with _worded(store, "read", name):
            return local.read(path_of(store, name), limit)
    return remote.read(store, name, limit)


@contextmanager
def reading(store: Store, name: str) -> Generator[Callable[[int, memoryview], None]]:
    """A function `read_into(offset, out)` that fills `out` from byte `offset`.

    Many threads may call it at once. It raises StorageError if the object ends before.
    """
    if store.local:
        with _worded(store, "read", name):
            fd = local.open_(path_of(store, name))
        try:
            yield partial(_fill, store, name, fd)
        finally:
            os.close(fd)
    else:
        with remote.reading(store, name) as fill:
            yield fill


def _fill(store: Store, name: str, fd: int, offset: int, out: memoryview) -> None:
    with _worded(store, "read", name):
        local.fill(fd, path_of(store, name), offset, out)


def sizes(store: Store) -> dict[str, int | None]:
    """What lies in the folder now: name -> bytes, None for a folder.

    Empty if there is no such folder.
    """
    if store.local:
        with _worded(store, "list"):
            return local.sizes(store.root)
    return remote.sizes(store)


def remove(store: Store, name: str) -> None:
    """Remove one object, if it is there."""
    if store.local:
        with _worded(store, "remove", name):
            local.remove(path_of(store, name))
    else:
        remote.remove(store, name)


def remove_folder(store: Store, first: Sequence[str] = ()) -> None:
    """Remove the folder with all that it holds, if it is there.

    The objects `first` go before all others, so that a folder of which a part is left
    has lost them.
    """
    if store.local:
        with _worded(store, "remove"):
            local.remove_folder(store.root, first)
    else:
        remote.remove_folder(store, first)
