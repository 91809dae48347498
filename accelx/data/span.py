"""From which step to which: what a user writes as `start` and `stop`."""

from __future__ import annotations

import operator
from typing import Any

from accelx.errors import DataError


def span(start: Any, stop: Any) -> tuple[int, int | None]:
    """`start` and `stop` as whole numbers of at least 0. Raises DataError."""
    first = _step("start", start, "count steps from 0, or give the State")
    if stop is None:
        return first, None
    return first, _step("stop", stop, "leave it out for one epoch")


def _step(name: str, value: Any, use: str) -> int:
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < 0:
        wanted = "a whole number" if found is None else "at least 0"
        raise DataError(f"{name} must be {wanted}, got {value!r}; {use}")
    return found
