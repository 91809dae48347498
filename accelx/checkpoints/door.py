"""How a command of the tool ends: what is printed where, and with which exit code."""

from __future__ import annotations

import sys

from accelx.checkpoints.options import parse
from accelx.doors import WrongUseError, ended

TYPE_CHECKING = False  # importing `typing` would cost `--help` 10 ms
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 failed or damaged, 2 wrong use."""
    words = sys.argv[1:] if argv is None else argv
    return ended("accelx.checkpoint", lambda: _run(parse(words)))


def _run(given: argparse.Namespace) -> int:
    from accelx import storage  # attrs, fsspec: 0.1 s
    from accelx.checkpoints import screen
    from accelx.checkpoints.commands import COMMANDS

    if not given.json:
        screen.check_installed()  # before hours of reading, not after
    try:
        for url in given.urls:
            storage.at(url)
    except ValueError as error:
        raise WrongUseError(str(error)) from error
    report = COMMANDS[given.command](given)
    if given.json:
        screen.write_json(report.data)
    else:
        screen.write(report.text())
    return report.code
