"""A chain as a table that a person reads."""

from __future__ import annotations

from typing import Any

import attrs

from accelx.records import Pass, Transform
from accelx.transform import ARROWS

MEANING = {
    "exact": "any step is reached by arithmetic, on any number of ranks",
    "same-ranks": "a step is reached by its saved state, on as many ranks",
    "replay": "a step is reached by reading what comes before it again",
}
_HEADS = ("pass", "acts on", "neutral", "settings")


@attrs.frozen(repr=False)
class Explained:
    """The plan of a transform: rows of (pass, acts on, neutral, settings)."""

    rows: tuple[tuple[str, str, str, str], ...]
    data: str | None = None  # where each step's batch comes from; see `guarantee`

    def __repr__(self) -> str:
        table = (_HEADS, *self.rows)
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        lines = [
            "  ".join(
                [*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]
            )
            for row in table
        ]
        lines += [] if self.data is None else [f"data: {self.data}"]
        return "\n".join(line.rstrip() for line in lines)


def explain(tx: Transform, loader: Any = None) -> Explained:
    """Every pass in order, when it acts, whether it is neutral (L4), and its settings.

    A pass that the engine does itself is listed as absorbed. With a `loader`, such as
    `feed` takes, also how the data goes on after a stop. Pure: starts nothing.
    """
    engine = next((p.spec.engine for p in tx if hasattr(p.spec, "engine")), None)
    rows = tuple(_row(one, engine) for one in tx)
    return Explained(rows, None if loader is None else _data(tx, loader))


def _data(tx: Transform, source: Any) -> str:
    from accelx.loader import as_loader, guarantee

    loader = as_loader(source)
    for one in tx:
        if one.feed is not None:
            loader = one.feed(loader)
    return f"{guarantee(loader)} ({MEANING[guarantee(loader)]})"


def _row(one: Pass, engine: Any) -> tuple[str, str, str, str]:
    stages = ", ".join(a for a in ARROWS if getattr(one, a) is not None)
    if engine is not None and one.name in engine.handles:
        stages = f"absorbed by {engine.name}"
    settings = repr(one.spec)
    if hasattr(one.spec, "env"):  # by the name that programs give it
        settings = settings.replace(repr(one.spec.env), "env")
    return one.name, stages, "yes" if one.neutral else "no", settings
