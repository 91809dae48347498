"""JSON Lines: an object a line; a block is a run of lines of about 1 MiB.

Blank lines are no rows. A compressed file has no ranges that could be read alone, so
that it is refused by its suffix.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import attrs

from accelx import storage
from accelx.data.formats.format import (
    Block,
    Columns,
    File,
    Flaw,
    FlawedError,
    Format,
    Row,
    Scan,
    pick,
    read,
)
from accelx.data.formats.runs import Runs

CHUNK = 8 * 2**20  # bytes that the scan reads at once


@attrs.frozen(eq=False)
class Lines:
    """Lines that are parsed when they are asked for: text is smaller than objects."""

    file: File
    start: int  # byte in the file
    lines: list[bytes]
    columns: Columns

    @property
    def rows(self) -> int:
        """How many lines there are."""
        return len(self.lines)

    @property
    def nbytes(self) -> int:
        """Bytes of the text."""
        return sum(map(len, self.lines))

    def take(self, rows: Sequence[int]) -> list[Row]:
        """The objects of these lines."""
        return [pick(self._parsed(row), self.columns, self.file) for row in rows]

    def _parsed(self, row: int) -> Row:
        try:
            return parsed(self.lines[row])
        except FlawedError as error:
            raise FlawedError(
                f"line {row + 1} after byte {self.start}: {error}"
            ) from None


def parsed(line: bytes) -> Row:
    """The object that a line holds. Raises FlawedError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FlawedError(f"{_brief(line)} is no JSON ({error})") from None
    if not isinstance(row, dict):
        raise FlawedError(f"{_brief(line)} is no JSON object, {{...}}")
    return row


def _brief(line: bytes) -> str:
    text = line.strip().decode(errors="replace")
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def scan(file: File, careful: bool) -> Scan:
    """Find the lines. Careful, each is parsed, and one that fails is left out."""
    runs, flaws = Runs(), list[Flaw]()
    for number, (start, line) in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        if careful:
            try:
                parsed(line)
            except FlawedError as error:
                runs.cut()
                flaws.append(Flaw(f"line {number}: {error}", rows=1))
                continue
        runs.add(start, start + len(line))
    runs.cut()
    return Scan(tuple(runs.blocks), tuple(flaws))


def _lines(file: File) -> Iterator[tuple[int, bytes]]:
    """Each line with the byte that it begins at; its end is left on."""
    rest, start = b"", 0
    with storage.reading(file.store, file.name) as read_into:
        for at in range(0, file.size, CHUNK):
            chunk = bytearray(min(CHUNK, file.size - at))
            read_into(at, memoryview(chunk))
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield start, line + b"\n"
                start += len(line) + 1
    yield start, bytes(rest)


def load(file: File, block: Block, columns: Columns) -> Lines:
    """The lines of one block."""
    text = bytes(read(file, block.start, block.stop))
    lines = [line for line in text.split(b"\n") if line.strip()]
    return Lines(file, block.start, lines, columns)


FORMAT = Format("jsonl", (".jsonl", ".ndjson"), scan, load)
