"""Which checkpoints of a listing may go: pure, and decided by steps and metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from accelx.records import code
from accelx.saves.commit import Found


@attrs.frozen(repr=False)
class Retain:
    """Which checkpoints stay: called on a listing, it gives those that may go."""

    last: int = 1
    every: int | None = None
    best: tuple[str, str] | None = None

    def __repr__(self) -> str:
        return code("retain", self)

    def __call__(self, listing: Sequence[Found]) -> tuple[Found, ...]:
        """Those of `listing` that may be removed, oldest first.

        The newest whole one always stays. One that is not whole goes once a whole one
        of the same or a later step is there: it is what a save that was cut off left.
        """
        whole = [one for one in listing if one.commit is not None]
        if not whole:
            return ()
        newest = max(whole, key=_age)
        kept = {one.name for one in sorted(whole, key=_age)[-self.last :]}
        kept |= {one.name for one in whole if self.every and one.step % self.every == 0}
        kept |= self._best(whole)
        gone = [
            one
            for one in listing
            if (one.name not in kept if one.commit else one.step <= newest.step)
        ]
        return tuple(sorted(gone, key=_age))

    def _best(self, whole: Sequence[Found]) -> set[str]:
        if self.best is None:
            return set()
        metric, direction = self.best
        sign = 1 if direction == "min" else -1
        scored = [
            (sign * one.commit.metrics[metric], -one.step, one.name)
            for one in whole
            if one.commit and math.isfinite(one.commit.metrics.get(metric, math.nan))
        ]
        return {min(scored)[2]} if scored else set()


def _age(one: Found) -> tuple[int, float, str]:
    return one.step, one.commit.time if one.commit else 0.0, one.name


def retain(
    last: int = 1, every: int | None = None, best: tuple[str, str] | None = None
) -> Retain:
    """Keep the `last` newest checkpoints, each `every`-th step, and the best.

    `best` is a metric and "min" or "max": ("loss", "min") is `Out.loss`, other names
    are looked up in an aux that is a dict. A pure function of a listing to what may go
    (`save_state(keep=...)` removes that, after the newer commit has been read back).
    Raises ValueError for a number below 1 or another direction.
    """
    for name, value in (("last", last), ("every", every)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(
                f"retain({name}=...) wants a whole number of at least 1, got "
                f"{value!r}; write retain({name}=3)"
            )
    if best is not None and (len(best) != 2 or best[1] not in ("min", "max")):
        raise ValueError(
            'retain(best=...) wants a metric and "min" or "max", got '
            f'{best!r}; write best=("loss", "min")'
        )
    return Retain(last, every, None if best is None else (best[0], best[1]))
