"""Which checkpoints go when a person asks for fewer, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs

from accelx import storage
from accelx.checkpoints.listing import listed, row
from accelx.errors import CheckpointError
from accelx.saves.commit import COMMIT, Found
from accelx.saves.retain import Retain


def plan(url: str, keep: Retain) -> tuple[list[Found], list[Found]]:
    """Those under `url` that stay, and those that `keep` lets go, oldest first.

    One that is damaged is not whole: it never stands for the newest that stays.
    """
    each = listed(url)
    if keep.best is not None:
        _check_metric(keep.best[0], each)
    whole = [attrs.evolve(f, commit=None) if f.why else f for f in each]
    gone = {one.name for one in keep(whole)}
    stay = [one for one in each if one.name not in gone]
    return stay, [one for one in each if one.name in gone]


def _check_metric(metric: str, each: Sequence[Found]) -> None:
    known = {name for one in each if one.commit for name in one.commit.metrics}
    if metric not in known:
        raise CheckpointError(
            f"--best wants a metric that was saved, got {metric!r}; there are "
            f"{', '.join(sorted(known)) or 'none'}: write --best loss:min, or leave it "
            "out"
        )


def prune(
    url: str,
    keep: Retain,
    dry_run: bool,
    agreed: Callable[[list[dict[str, Any]]], bool],
) -> dict[str, Any]:
    """Remove what `keep` lets go, once `agreed` says so.

    Of each checkpoint the commit goes first: what is left of one that could not be
    removed is none. Raises StorageError, and leaves the rest.
    """
    stay, gone = plan(url, keep)
    rows = [row(one) for one in gone]
    kept = [row(one) for one in stay]
    done = not dry_run and (not gone or agreed(rows))
    if done:
        for one in gone:
            storage.remove_folder(storage.at(one.url), first=[COMMIT])
    return {"kept": kept, "removed": rows, "dry_run": dry_run, "done": done}
