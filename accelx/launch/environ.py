"""The one file of the launcher that touches this process's environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping


def read() -> dict[str, str]:
    """A copy of the environment, for the pure functions that decide from it."""
    return dict(os.environ)


def write(variables: Mapping[str, str]) -> None:
    """Set variables of this process; a rank does it before the user's code runs."""
    os.environ.update(variables)


def remove(name: str) -> None:
    """Forget one variable of this process."""
    os.environ.pop(name, None)
