"""Where the messages of an Arrow file or stream lie, from their headers alone.

Both kinds are a row of messages: a mark, the length of the metadata, the metadata (a
FlatBuffer, padded to 8 bytes) and a body. pyarrow shows none of this without reading
the bodies, which are the data. Arrow columnar format 1.0, "Serialization and
Interprocess Communication", with Message.fbs; the mark came with Arrow 0.15.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

import attrs

from accelx.data.formats.format import FlawedError

MAGIC = b"ARROW1"
MARK = 0xFFFFFFFF
SCHEMA, DICTIONARY, BATCH = 1, 2, 3
LARGEST = 2**28  # bytes of metadata: more is no message


@attrs.frozen
class Message:
    """One message's bytes in the file, and what it is."""

    start: int
    stop: int
    kind: int
    rows: int  # of a record batch


def messages(file: IO[bytes], size: int) -> Iterator[Message]:
    """All messages, up to the mark of the end.

    Raises FlawedError, after those before, where the file is damaged or cut short.
    """
    head = file.read(8)
    at = 8 if head[:6] == MAGIC else 0
    while at + 8 <= size:
        file.seek(at)
        mark, length = struct.unpack("<Ii", file.read(8))
        if mark != MARK or not 0 <= length <= LARGEST:
            raise FlawedError(f"there is no message at byte {at}")
        if length == 0:
            _check_end(file, size, head)
            return
        metadata = file.read(length)
        kind, rows, body = _fields(metadata, at)
        stop = at + 8 + length + body
        if stop > size:
            break
        yield Message(at, stop, kind, rows)
        at = stop
    raise FlawedError(f"it is cut short at byte {min(at, size)}, before its end mark")


def _check_end(file: IO[bytes], size: int, head: bytes) -> None:
    file.seek(max(0, size - 6))
    if head[:6] == MAGIC and file.read(6) != MAGIC:
        raise FlawedError(f"it is cut short at byte {size}, within its footer")


def _fields(metadata: bytes, at: int) -> tuple[int, int, int]:
    """Kind, rows and length of the body."""
    try:
        message = struct.unpack_from("<I", metadata)[0]
        kind = _scalar(metadata, message, 1, "<B")
        body = _scalar(metadata, message, 3, "<q")
        rows = 0
        if kind == BATCH and (field := _field(metadata, message, 2)):
            batch = field + struct.unpack_from("<I", metadata, field)[0]
            rows = _scalar(metadata, batch, 0, "<q")
    except struct.error:
        raise FlawedError(f"the metadata of the message at byte {at}") from None
    if body < 0 or rows < 0 or body % 8:
        raise FlawedError(f"the lengths of the message at byte {at}")
    return kind, rows, body


def _field(data: bytes, table: int, slot: int) -> int:
    """Where a field of a FlatBuffers table lies; 0 where it has its default."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    entry = 4 + 2 * slot
    if vtable < 0 or entry >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    offset = struct.unpack_from("<H", data, vtable + entry)[0]
    return table + offset if offset else 0


def _scalar(data: bytes, table: int, slot: int, kind: str) -> int:
    where = _field(data, table, slot)
    return struct.unpack_from(kind, data, where)[0] if where else 0
