"""Which of the known names a misspelt one was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The name of `names` that was meant, case and dashes aside; None if none is."""
    plain = {_plain(known): known for known in names}
    found = difflib.get_close_matches(_plain(name), plain, 1, cutoff)
    return plain[found[0]] if found else None


def _plain(name: str) -> str:
    return name.lower().strip("-").replace("-", "_")
