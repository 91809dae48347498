"""Which checkpoints a URL names, and what is known of each without its data."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import attrs

from accelx import storage
from accelx.errors import CheckpointError
from accelx.saves.commit import COMMIT, Found, found, lacks, look, step_of
from accelx.saves.manifest import MANIFEST, Manifest
from accelx.saves.verify import THREADS
from accelx.storage import Store

# Bytes to be read -> a context that gives what is told of bytes that were.
Reading = Callable[[int], AbstractContextManager[Callable[[int], None]]]
UNFINISHED = "it has no commit"  # a save that was cut off, or is under way


def listed(url: str) -> list[Found]:
    """The checkpoint that `url` is, or all under it, oldest step first.

    `why` is empty for those alone that `latest` would take. Raises CheckpointError
    where there is none.
    """
    clean = url.rstrip("/") or url
    store, name = storage.at(clean), clean.rpartition("/")[2]
    there = storage.sizes(store)
    named = there and step_of(name) is not None
    each = [look(store, name)] if named or COMMIT in there else found(clean)
    if not each:
        raise CheckpointError(
            f"wanted checkpoints under {store.url}, found none; write the URL that "
            "save_state was given, or that of a checkpoint"
        )
    with ThreadPoolExecutor(THREADS[store.local], "accelx-list") as pool:
        whys = list(pool.map(lambda one: one.why or lacks(one), each))
    return [attrs.evolve(f, why=w) for f, w in zip(each, whys, strict=True)]


def row(one: Found) -> dict[str, Any]:
    """What is known of a checkpoint; None for what only a commit tells."""
    held = storage.sizes(storage.at(one.url))
    commit = one.commit
    return {
        "name": one.name,
        "url": one.url,
        "step": one.step,
        "position": commit.position if commit else None,
        "time": commit.time if commit else None,  # seconds since 1970
        "size": sum(size or 0 for size in held.values()),  # bytes in the folder
        "num_ranks": commit.world if commit else None,
        "num_tensors": commit.tensors if commit else None,
        "metrics": dict(commit.metrics) if commit else {},
        "whole": not one.why,
        "why": one.why,
    }


def ls(url: str) -> dict[str, Any]:
    """Every checkpoint under `url`."""
    each = listed(url)
    store = storage.at(url)
    with ThreadPoolExecutor(THREADS[store.local], "accelx-list") as pool:
        return {"url": store.url, "checkpoints": list(pool.map(row, each))}


def foreign(store: Store, manifest: Manifest) -> list[str]:
    """Names in a checkpoint's folder that are none of its own files."""
    own = {COMMIT, MANIFEST}
    own |= {name for part in manifest.parts for name in (part.file, part.index)}
    return sorted(storage.sizes(store).keys() - own)
