"""How findings read on a screen and in a letter: plain text, in columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from accelx.checkpoints.tables import plain

KINDS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def columns(heads: str, rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table; `>name` is on the right. Nothing is cut."""
    names = heads.split()
    cells = [[name.lstrip(">") for name in names]]
    cells += [[plain(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]

    def one(row: list[str]) -> str:
        parts = zip(names, row, widths, strict=True)
        placed = [
            cell.rjust(w) if name.startswith(">") else cell.ljust(w)
            for name, cell, w in parts
        ]
        return "  ".join(placed).rstrip()

    return [one(row) for row in cells]


def facts(title: str, known: Iterable[tuple[str, object]]) -> list[str]:
    """A titled list of what is known, the values under one another."""
    pairs = [(name, plain(str(value))) for name, value in known]
    if not pairs:
        return []
    width = max(len(name) for name, _ in pairs)
    return [title, *(f"  {name:<{width}}  {value}" for name, value in pairs), ""]


def duration(seconds: float) -> str:
    """In the unit that leaves few digits: 0.0123 is 12.3 ms."""
    unit, length = next((k for k in KINDS if abs(seconds) >= k[1]), KINDS[-1])
    return f"{seconds / length:.3g} {unit}"
