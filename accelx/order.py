"""Whether a chain's order is legal, and if not, why not and which order is."""

from __future__ import annotations

from accelx.errors import OrderError
from accelx.records import Pass, Rules, Transform


def check(passes: tuple[Pass, ...]) -> None:
    """Raise OrderError on the first rule broken, with a chain that works."""
    broken = _first_broken(passes)
    if broken is None:
        return
    culprit, what, rule = broken
    written, works = Transform(passes), Transform(_repaired(passes))
    raise OrderError(
        f"{culprit.name} {what}, because {rule.why}.\n"
        f"  written: {written.brief()}\n  works:   {works.brief()}"
    )


def _first_broken(passes: tuple[Pass, ...]) -> tuple[Pass, str, Rules] | None:
    for i, one in enumerate(passes):
        for rule in one.rules:
            what = _breaks(passes, i, rule)
            if what:
                return one, what, rule
    return None


def _breaks(passes: tuple[Pass, ...], i: int, rule: Rules) -> str | None:
    """How the pass at `i` breaks `rule`, in words, or None. Pairwise: so L2 holds."""
    for other in passes[i + 1 :]:
        if other.name in rule.after:
            return f"must come after {other.name}"
        if rule.once and other.name == passes[i].name:
            return "may stand in a chain only once"
    for other in (*passes[:i], *passes[i + 1 :]):
        if other.name in rule.excludes:
            return f"cannot be combined with {other.name}"
    return None


def _repaired(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """A legal chain near the given one: clashing passes dropped, then sorted."""
    kept: list[Pass] = []
    for one in passes:
        if not any(_clash(one, other) for other in kept):
            kept.append(one)
    return tuple(_sorted(kept))


def _clash(one: Pass, other: Pass) -> bool:
    both = (*one.rules, *other.rules)
    if one.name == other.name and any(r.once or one.name in r.after for r in both):
        return True
    return any(other.name in r.excludes for r in one.rules) or any(
        one.name in r.excludes for r in other.rules
    )


def _sorted(passes: list[Pass]) -> list[Pass]:
    """Stable topological order by `after`; of a circle of rules the last is dropped."""
    left, done = list(passes), list[Pass]()
    while left:
        names = [p.name for p in left]
        ready = next((p for p in left if not _waits(p, names)), None)
        gone = left[-1] if ready is None else ready
        left = [p for p in left if p is not gone]
        if ready is not None:
            done.append(ready)
    return done


def _waits(one: Pass, names: list[str]) -> bool:
    return any(n in r.after for r in one.rules for n in names if n != one.name)
