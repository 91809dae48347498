"""What a comparison of layouts found, and how it reads on a screen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs

WHATS = ("loss", "gradient", "norm", "parameter")  # in the order in which they part


def allowed(what: str, tol: float) -> float:
    """The largest gap that is rounding: an optimizer such as Adam magnifies it."""
    return tol * 10 if what == "parameter" else tol


@attrs.frozen
class Layout:
    """Where a run takes place: ranks, the placing of the model, the cuts of a batch."""

    ranks: int
    kind: str
    micro: int

    def __str__(self) -> str:
        cut = f", {self.micro} microbatches" if self.micro > 1 else ""
        if self.ranks == 1:
            return f"1 rank{cut}"
        return f"{self.ranks} ranks, {self.kind}{cut}"


@attrs.frozen
class Parting:
    """The first time that one kind of number is not that of one process."""

    what: str  # one of WHATS
    step: int  # counted from 0
    rank: int
    name: str  # of the parameter, "" for a loss or a norm
    wanted: float  # one process; of a tensor the entry that lies farthest apart
    got: float
    gap: float  # relative: see `check_equivalence`

    def __str__(self) -> str:
        whose = f" {self.name}" if self.what == "parameter" else ""
        whose = f" of {self.name}" if self.what == "gradient" else whose
        return (
            f"step {self.step}: {self.what}{whose} is {self.got:.8g} on rank "
            f"{self.rank}, wanted {self.wanted:.8g}"
        )


@attrs.frozen
class Row:
    """One layout: how far it lies from one process, and where it parts."""

    layout: Layout
    gaps: Mapping[str, float]  # what -> the largest gap over steps and ranks
    partings: tuple[Parting, ...] = ()  # the first of each kind, the earliest first
    error: str = ""  # why it did not run to its end

    @property
    def equal(self) -> bool:
        """Whether this is the run of one process."""
        return not (self.partings or self.error)


@attrs.frozen(repr=False)
class Report:
    """What `check_equivalence` found. Prints as a table."""

    rows: tuple[Row, ...]
    causes: tuple[str, ...]  # of a difference, where one was found
    steps: int
    tol: float
    notes: tuple[str, ...] = ()  # on how it was compared

    @property
    def equal(self) -> bool:
        """Whether every layout makes the run of one process."""
        return all(row.equal for row in self.rows)

    @property
    def data(self) -> dict[str, Any]:
        """The same as plain data, for JSON; a number that is none is a text."""
        plain: dict[str, Any] = _plain(attrs.asdict(self))
        return {"equal": self.equal, **plain}

    def __repr__(self) -> str:
        notes = [f"note: {note}" for note in self.notes]
        said = [*_verdict(self), *_details(self), *notes]
        return "\n".join([*_table(self.rows), "", *said])


def _plain(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _plain(v) for k, v in node.items()}  # type: ignore[reportUnknownVariableType]
    if isinstance(node, list | tuple):
        return [_plain(v) for v in node]  # type: ignore[reportUnknownVariableType]
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node


def _table(rows: tuple[Row, ...]) -> list[str]:
    cells = [("layout", *WHATS, "")]
    cells += [
        (
            str(row.layout),
            *(f"{row.gaps[w]:.1e}" if w in row.gaps else "-" for w in WHATS),
            "equal" if row.equal else "failed" if row.error else "PARTS",
        )
        for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _verdict(report: Report) -> list[str]:
    parted = sum(not row.equal for row in report.rows)
    if not parted:
        return [
            f"equal: {len(report.rows)} layouts make the run of one process with one "
            f"batch, over {report.steps} steps, to {report.tol:g}"
        ]
    return [
        f"NOT equal: {parted} of {len(report.rows)} layouts do not make the run of one "
        f"process with one batch, over {report.steps} steps, to {report.tol:g}"
    ]


def _details(report: Report) -> list[str]:
    lines = list[str]()
    for row in report.rows:
        if row.equal:
            continue
        lines += [f"{row.layout}:"]
        lines += [f"  {parting}" for parting in row.partings]
        lines += [f"  {line}" for line in row.error.splitlines()]
    return lines + [f"cause: {cause}" for cause in report.causes]
