"""Where a stream of bytes is cut into blocks of one length, each in its own memory."""

from __future__ import annotations

import io
from collections.abc import Generator, Iterable, Iterator

from typing_extensions import Buffer

from accelx.errors import StorageError


def views(url: str, parts: Iterable[Buffer], size: int) -> Iterator[memoryview]:
    """The parts as flat bytes, without the empty ones.

    Raises StorageError as soon as they come to more than `size` bytes, or at their end
    to fewer. `url` says in its text which object was to be written.
    """
    came = 0
    for part in parts:
        view = memoryview(part)
        came += view.nbytes
        if came > size:
            break
        if view.nbytes:  # a view with a zero in its shape cannot be cast
            yield view.cast("B")
    if came != size:
        raise StorageError(
            f"{url} wants {size} bytes, but its parts came to {came}"
            f"{' or more' * (came > size)}; pass the size that they have"
        )


def blocks(
    url: str, parts: Iterable[Buffer], size: int, length: int
) -> Generator[bytes]:
    """The bytes as blocks of `length`, the last one shorter; one empty block for none.

    Each is a copy, since a part is valid only until the next, and the only one:
    `getvalue` hands out what the buffer holds.
    """
    block = io.BytesIO()
    for part in views(url, parts, size):
        view = part
        while len(view):
            room = length - block.tell()
            block.write(view[:room])
            view = view[room:]
            if block.tell() == length:
                yield block.getvalue()
                block = io.BytesIO()
    if block.tell() or not size:
        yield block.getvalue()
