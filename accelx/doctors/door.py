"""How a command of the doctor ends: what is printed where, and which exit code."""

from __future__ import annotations

import sys

from accelx.doctors.options import parse
from accelx.doors import WrongUseError, ended

TYPE_CHECKING = False  # importing `typing` would cost `--help` 10 ms
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from typing import Any

    Found = tuple[dict[str, Any], list[str], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 something failed, 2 wrong use."""
    words = sys.argv[1:] if argv is None else argv
    return ended("accelx.doctor", lambda: _run(parse(words)))


def _run(given: argparse.Namespace) -> int:
    import json

    commands: dict[str | None, Callable[[argparse.Namespace], Found | None]] = {
        None: _report,
        "net": _net,
        "store": _store,
        "hang": _hang,
    }
    found = commands[given.command](given)
    if found is None:  # a rank that is not the one that prints
        return 0
    data, lines, code = found
    sys.stdout.write(json.dumps(data, indent=2) if given.json else "\n".join(lines))
    sys.stdout.write("\n")
    sys.stdout.flush()
    return code


def _report(given: argparse.Namespace) -> Found:
    from accelx.doctors import look, report
    from accelx.launch import environ

    data = report.report(look.look(environ.read()))
    return data, report.lines(data), 0


def _net(given: argparse.Namespace) -> Found | None:
    from accelx.doctors import net, network
    from accelx.launch import environ

    found = net.ranks(environ.read(), given.n, given.timeout)
    if found is None:
        return None
    data = network.judged(found)
    return data, network.lines(data), int(bool(data["warnings"]))


def _store(given: argparse.Namespace) -> Found:
    from accelx import storage
    from accelx.doctors import store

    try:
        storage.at(given.url)
    except ValueError as error:
        raise WrongUseError(str(error)) from error
    data = store.tried(given.url, given.size * 2**20)
    return data, store.lines(data), int(not data["sound"])


def _hang(given: argparse.Namespace) -> Found:
    from accelx.doctors import hang

    data = hang.looked(given.folder)
    return data, hang.lines(data), int(bool(data["odd"]))
