"""Which checkpoints under a URL are damaged, and where: every byte is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelx.checkpoints.listing import UNFINISHED, Reading, foreign, listed, row
from accelx.errors import CheckpointError, DamagedError
from accelx.saves.commit import COMMIT, Found, open_manifest
from accelx.saves.manifest import MANIFEST
from accelx.saves.verify import faults


def verify(url: str, every: bool, reading: Reading) -> dict[str, Any]:
    """The damage of the newest checkpoint that `url` means, or of all.

    One without a commit is unfinished: no reader takes it, and it is no damage. Raises
    CheckpointError where all are.
    """
    each = listed(url)
    begun = [one for one in each if one.why != UNFINISHED]
    if not begun:
        raise CheckpointError(
            f"{url_of(each)} wants a checkpoint that can be verified, but none has a "
            "commit; a save that was cut off leaves such: write another URL"
        )
    chosen = each if every else begun[-1:]
    total = sum(one.commit.size for one in chosen if one.commit)
    with reading(total) as told:
        checked = [_checked(one, told) for one in chosen]
    count = sum(one["state"] == "damaged" for one in checked)
    return {"checkpoints": checked, "num_damaged": count}


def url_of(each: list[Found]) -> str:
    """The one checkpoint there is, or the folder of several."""
    return each[0].url if len(each) == 1 else each[0].url.rpartition("/")[0]


def _checked(one: Found, told: Callable[[int], None]) -> dict[str, Any]:
    damage, others = list[dict[str, Any]](), list[str]()
    if one.why != UNFINISHED:
        damage, others = _damage(one, told)
    state = "damaged" if damage else "sound"
    known = row(one)
    return {
        **{key: known[key] for key in ("name", "url", "step", "size")},
        "state": "unfinished" if one.why == UNFINISHED else state,
        "damage": damage,
        "foreign": others,
    }


def _damage(
    one: Found, told: Callable[[int], None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """What is wrong with each file, and names of files that are none of its own."""
    if one.commit is None:
        return [_told(COMMIT, one.why)], []
    try:
        store, manifest = open_manifest(one)
    except (DamagedError, FileNotFoundError) as error:
        return [_told(MANIFEST, str(error))], []
    found = [
        _told(f.file, f.text, f.tensor or None, f.start, f.stop)
        for f in faults(store, manifest, told)
    ]
    return found, foreign(store, manifest)


def _told(
    file: str,
    message: str,
    tensor: str | None = None,
    start: int | None = None,
    stop: int | None = None,
) -> dict[str, Any]:
    return {
        "file": file,
        "tensor": tensor,
        "start": start,
        "stop": stop,
        "message": message,
    }
