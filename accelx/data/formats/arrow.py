"""Arrow IPC, file or stream: a block is a record batch.

The index is made of the headers. A block is read as a small stream of its own: the
schema, the dictionaries that stand before the batch, and the batch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import IO, cast

from accelx.data.formats import tables
from accelx.data.formats.format import (
    Block,
    Columns,
    File,
    Flaw,
    FlawedError,
    Format,
    Scan,
    read,
    told,
)
from accelx.data.formats.messages import BATCH, DICTIONARY, SCHEMA, Message, messages
from accelx.data.formats.ranged import ranged

AHEAD = 2**16  # bytes that are read at once: headers are short, bodies passed over
END = b"\xff\xff\xff\xff\0\0\0\0"


def scan(file: File, careful: bool) -> Scan:
    """The record batches."""
    del careful
    found, flaws = list[Message](), list[Flaw]()
    try:
        with ranged(file, buffer=AHEAD) as opened:
            found.extend(messages(cast(IO[bytes], opened), file.size))
    except FlawedError as error:
        flaws.append(Flaw(str(error)))
    if not found or found[0].kind != SCHEMA:
        raise FlawedError(flaws[0].what if flaws else "it does not begin by a schema")
    with told("its schema"):
        start = bytes(read(file, found[0].start, found[0].stop))
        made = tables.one_table(start + END, file.url)
    blocks = tuple(
        Block(each.start, each.stop, each.rows, each.stop - each.start)
        for each in found
        if each.kind == BATCH and each.rows
    )
    heads = tuple((m.start, m.stop) for m in found if m.kind in (SCHEMA, DICTIONARY))
    schema = tables.kinds(made.schema, file.url)
    return Scan(blocks, tuple(flaws), schema, heads)


@lru_cache(maxsize=64)  # bytes without a handle, so that a fork may keep them
def _heads(file: File) -> tuple[tuple[int, bytes], ...]:
    """The schema and the dictionaries, each with the byte where it begins."""
    return tuple((at, bytes(read(file, at, stop))) for at, stop in file.heads)


def load(file: File, block: Block, columns: Columns) -> tables.Table:
    """The rows of one record batch."""
    with told(f"the record batch at byte {block.start}"):
        head = b"".join(data for at, data in _heads(file) if at < block.start)
        batch = bytes(read(file, block.start, block.stop))
        made = tables.one_table(head + batch + END, file.url)
    return tables.table_of(made, columns, file)


FORMAT = Format("arrow", (".arrow", ".feather", ".ipc"), scan, load)
