"""How a failure is said: on the screen, and in the file beside the logs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

from accelx.launch.failure import Failure
from accelx.launch.where import shows


def told(failure: Failure, host: str, others: int) -> str:
    """What the screen shows last: the rank, its traceback, what became of the rest."""
    lines = [f"rank {failure.rank} on {host} failed: {failure.headline}"]
    if failure.text:
        lines.append(failure.text.rstrip())
    if not shows(failure.text, failure.line):
        lines.append(f"at {failure.line}")
    if others:
        lines.append(f"{others} rank{'s' * (others > 1)} stopped because of it")
    return "\n".join(lines)


def report(failure: Failure) -> str:
    """The failure as `failure.json` has it."""
    fields = {
        "rank": failure.rank,
        "host": failure.host,
        "pid": failure.pid,
        "kind": failure.kind,
        "code": failure.code,
        "signal": failure.signal or None,
        "time": failure.at,
        "summary": failure.summary,
        "reading": failure.reading or None,
        "exception": failure.error or None,
        "message": failure.message or None,
        "line": failure.line or None,
        "traceback": failure.text or None,
        "peak_bytes": failure.peak,
        "follows": failure.follows,
    }
    return json.dumps(fields, indent=2) + "\n"


def odd(late: Sequence[Failure]) -> Failure:
    """Of the ranks that did not finish, one that stands where the fewest stand."""
    places = _places(late)
    return min(late, key=lambda failure: (len(places[failure.line]), failure.rank))


def elsewhere(late: Sequence[Failure], root: Failure) -> list[str]:
    """Where the other ranks stood that did not finish either, a line for each place."""
    rest = _places([failure for failure in late if failure is not root])
    return [
        f"{names(ranks)} did not either, at {line or 'an unknown line'}"
        for line, ranks in rest.items()
    ]


def names(numbers: Sequence[int]) -> str:
    """`rank 3`, or `ranks 1, 2`."""
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _places(late: Sequence[Failure]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = defaultdict(list)
    for failure in late:
        places[failure.line].append(failure.rank)
    return places
