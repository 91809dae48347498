"""What is known of a file, and what every format says of it: blocks, flaws, rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import attrs

from accelx import storage
from accelx.errors import AccelxError, DataError
from accelx.storage_at import filesystem

Row = dict[str, Any]
ReadInto = Callable[[int, memoryview], None]  # offset, buffer to fill
Ranges = tuple[tuple[int, int], ...]  # start, stop
RUN = 2**20  # bytes of a block, where the format has no blocks of its own


@attrs.frozen
class File:
    """One file of a dataset."""

    store: storage.Store  # the folder
    name: str  # in the folder
    size: int  # bytes
    heads: Ranges = ()  # see Scan

    @property
    def url(self) -> str:
        """To print."""
        return storage.inside(self.store, self.name).url


@attrs.frozen
class Block:
    """What is read at once, and holds at least one row.

    `start` and `stop` are bytes of the file, or what else its format counts in.
    """

    start: int
    stop: int
    rows: int
    nbytes: int  # in memory, about


@attrs.frozen
class Flaw:
    """A part of a file that cannot be read."""

    what: str
    rows: int | None = None  # that are lost with it; None where nobody can know


@attrs.frozen
class Scan:
    """What the index says of a file."""

    blocks: tuple[Block, ...]
    flaws: tuple[Flaw, ...] = ()
    schema: tuple[tuple[str, str], ...] = ()  # name, kind; () where rows are free
    heads: Ranges = ()  # bytes of the file that are read before a block


class Part(Protocol):
    """The rows of one block, in memory."""

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory, about."""
        ...

    def take(self, rows: Sequence[int]) -> list[Row]:
        """The rows at these places, new for each call."""
        ...


def here(file: File) -> File:
    """The file by the filesystem of this process and thread, for other threads."""
    fs = filesystem(file.store)
    return attrs.evolve(file, store=attrs.evolve(file.store, fs=fs, pid=os.getpid()))


Columns = tuple[str, ...] | None


@attrs.frozen
class Format:
    """How files of one kind are read.

    `scan(file, careful)` finds the blocks; careful, it also finds what `load` or
    `take` would stumble over, where that costs more than the blocks do. `load(file,
    block, columns)` reads one.
    """

    name: str
    suffixes: tuple[str, ...]
    scan: Callable[[File, bool], Scan]
    load: Callable[[File, Block, Columns], Part]


class FlawedError(DataError):
    """A file does not hold what its format says."""


def read(file: File, start: int, stop: int) -> bytearray:
    """The bytes from `start` to `stop`, of a remote file by several requests at once.

    Raises FlawedError where the file has not as many.
    """
    if not 0 <= start <= stop <= file.size:
        raise FlawedError(f"bytes {start} to {stop} are wanted, but it has {file.size}")
    out = bytearray(stop - start)
    if out:
        with storage.reading(file.store, file.name) as read_into:
            read_into(start, memoryview(out))
    return out


@contextmanager
def told(what: str) -> Generator[None]:
    """Whatever a reader says of bytes that are no such file, as a FlawedError.

    What the store says stays as it is: a file that was not read is not corrupt.
    """
    try:
        yield
    except (AccelxError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FlawedError(f"{what}: {said}") from error


def pick(row: Row, columns: Columns, file: File) -> Row:
    """The chosen columns of a row, in the order chosen."""
    if columns is None:
        return row
    missing = [name for name in columns if name not in row]
    if missing:
        raise DataError(
            f"columns {list(columns)} are wanted of each row, but one of {file.url} "
            f"has {sorted(map(str, row))}; choose among those that all rows have"
        )
    return {name: row[name] for name in columns}
