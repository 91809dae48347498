"""docs/parallel.md's table of pairs, as data."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "parallel.md"
Pair = tuple[str, str]


def rows(text: str, head: str) -> list[list[str]]:
    """The cells of the table whose first heading is `head`, headings first."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |"))
    found: list[list[str]] = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        found.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return [found[0], *found[2:]]


def pairs() -> dict[Pair, str]:
    """What the table says of each pair: a mark."""
    heads, *lines = rows(PAGE.read_text(), "with")
    return {
        (name, other): cell
        for name, *cells in lines
        for other, cell in zip(heads[1:], cells, strict=True)
        if cell
    }


def marks(head: str) -> dict[str, str]:
    """A legend: mark -> its second column."""
    return {mark: cells[0] for mark, *cells in rows(PAGE.read_text(), head)[1:]}


def tests() -> dict[str, str]:
    """mark -> file::test of a pair that is tried."""
    return marks("tried in")


def refusals() -> dict[str, str]:
    """mark -> words of the error of a pair that is refused."""
    return {mark: re.sub(r"`", "", words) for mark, words in marks("refused").items()}
