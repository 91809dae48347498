"""What each command does with its words: the report that it ends in."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs

from accelx.checkpoints import screen, tables
from accelx.checkpoints.listing import Reading
from accelx.checkpoints.tables import Table
from accelx.doors import WrongUseError


@attrs.frozen
class Report:
    """What a command found: as data, as what is shown, and as an exit code."""

    data: Mapping[str, Any]
    text: Callable[[], Sequence[Table | str]]
    code: int = 0


def _ls(given: argparse.Namespace) -> Report:
    from accelx.checkpoints.listing import ls

    data = ls(given.url)
    return Report(data, partial(tables.ls, data, time.time()))


def _show(given: argparse.Namespace) -> Report:
    from accelx.checkpoints.show import show

    data = show(given.url, given.tensors)
    return Report(data, partial(tables.show, data, time.time()))


def _bar(given: argparse.Namespace, what: str) -> Reading:
    return lambda total: screen.progress(what, total, not given.json)


def _diff(given: argparse.Namespace) -> Report:
    from accelx.checkpoints.diff import diff

    data = diff(given.a, given.b, _bar(given, "comparing"))
    return Report(data, partial(tables.diff, data))


def _verify(given: argparse.Namespace) -> Report:
    from accelx.checkpoints.verify import verify

    data = verify(given.url, given.all, _bar(given, "verifying"))
    return Report(data, partial(tables.verify, data), int(data["num_damaged"] > 0))


def _export(given: argparse.Namespace) -> Report:
    from accelx import storage
    from accelx.saves.export import export

    store = storage.at(given.out)
    before = storage.sizes(store)
    named = {"dtype": given.dtype, "max_shard_size": given.max_shard_size}
    try:
        with screen.progress("exporting", None, not given.json):
            export(given.url, given.out, **named)
    except ValueError as error:  # of the dtype or the size
        raise WrongUseError(str(error)) from error
    after = sorted(storage.sizes(store).items())
    files = [{"name": name, "size": size} for name, size in after if name not in before]
    data = {"out": store.url, "files": files}
    return Report(data, partial(tables.export, data))


def _prune(given: argparse.Namespace) -> Report:
    from accelx.checkpoints.prune import prune
    from accelx.saves.retain import retain

    def agreed(gone: list[Any]) -> bool:
        return given.yes or screen.ask(tables.question(gone))

    keep = retain(given.last, given.every, given.best)
    data = prune(given.url, keep, given.dry_run, agreed)
    declined = not (data["done"] or given.dry_run)
    return Report(data, partial(tables.prune, data, time.time()), int(declined))


COMMANDS: Mapping[str, Callable[[argparse.Namespace], Report]] = {
    "ls": _ls,
    "show": _show,
    "diff": _diff,
    "verify": _verify,
    "export": _export,
    "prune": _prune,
}
