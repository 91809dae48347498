"""A file at any URL as Python's readers want it: seekable, and read by ranges."""

from __future__ import annotations

import io
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from accelx import storage
from accelx.data.formats.format import File, ReadInto

GAP = 2**20  # bytes: ranges that are closer are one request


class Ranged(io.RawIOBase):
    """Bytes of `file`: those of `pieces` from memory, others by a request each time."""

    def __init__(
        self, file: File, read_into: ReadInto, pieces: Sequence[tuple[int, bytearray]]
    ) -> None:
        super().__init__()
        self._size = file.size
        self._read_into = read_into
        self._pieces = pieces
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go there: nothing is read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: object) -> int:
        """Fill as much of the buffer as the file has."""
        view = memoryview(buffer).cast("B")  # pyright: ignore[reportArgumentType]
        out = view[: max(0, min(view.nbytes, self._size - self._at))]
        if out.nbytes and not self._from_memory(out):
            self._read_into(self._at, out)
        self._at += out.nbytes
        return out.nbytes

    def _from_memory(self, out: memoryview) -> bool:
        for start, data in self._pieces:
            at = self._at - start
            if at >= 0 and at + out.nbytes <= len(data):
                out[:] = memoryview(data)[at : at + out.nbytes]
                return True
        return False


@contextmanager
def ranged(
    file: File, ranges: Sequence[tuple[int, int]] = (), buffer: int = 0
) -> Generator[io.RawIOBase | io.BufferedReader]:
    """`file`, opened; `ranges` are read now, `buffer` bytes ahead later on."""
    with storage.reading(file.store, file.name) as read_into:
        pieces: list[tuple[int, bytearray]] = []
        for start, stop in merged(ranges):
            data = bytearray(stop - start)
            read_into(start, memoryview(data))
            pieces.append((start, data))
        raw = Ranged(file, read_into, pieces)
        yield io.BufferedReader(raw, buffer) if buffer else raw


def merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges in order, those that are close made one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start - found[-1][1] <= GAP:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found
