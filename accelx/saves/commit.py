"""Which folders under a URL are whole checkpoints, and which of them is the newest."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any

import attrs

from accelx import storage
from accelx.errors import CheckpointError, DamagedError
from accelx.saves import check
from accelx.saves.manifest import MANIFEST, VERSION, Manifest, read_manifest
from accelx.saves.strict import digest, dumps, loads
from accelx.storage import Store

COMMIT = "commit.json"
LIMIT = 1 << 20  # bytes of a commit: ours has some hundred
FOLDER = re.compile(r"step-(\d{10,18})-([0-9a-f]{8})")


@attrs.frozen
class Commit:
    """The last object of a checkpoint: without it the folder does not exist."""

    step: int  # updates made
    position: int  # batches used
    time: float  # seconds since 1970, of the rank that committed
    world: int  # ranks that wrote
    size: int  # bytes of tensors and headers
    tensors: int
    manifest_size: int  # bytes
    manifest_digest: str
    metrics: Mapping[str, float] = attrs.field(factory=dict)


@attrs.frozen
class Found:
    """A whole checkpoint, or what looks like one and why it is not."""

    url: str
    name: str  # of the folder
    step: int
    commit: Commit | None = None
    why: str = ""  # why it is not whole
    skipped: tuple[Found, ...] = ()  # newer ones that `latest` passed over

    def __str__(self) -> str:
        return self.url


def folder_name(step: int) -> str:
    """A name for a checkpoint of `step` that no other has; sorts by step."""
    return f"step-{step:010d}-{secrets.token_hex(4)}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name; None for a folder of anybody else."""
    found = FOLDER.fullmatch(name)
    return int(found[1]) if found else None


def write_commit(commit: Commit) -> bytes:
    """The commit as JSON that carries its own digest: half of it is none."""
    fields: dict[str, Any] = {"accelx": VERSION, **attrs.asdict(commit)}
    return dumps({**fields, "check": digest(dumps(fields))})


def read_commit(data: bytes, what: str) -> Commit:
    """The commit that `data` holds. Raises DamagedError."""
    raw = loads(data, what)
    check.record(raw, what, {"accelx": int, "check": str, "metrics": dict})
    written = dumps(raw)
    own = raw.pop("check")
    if written != data or own != digest(dumps(raw)):
        raise check.damaged(what, "a commit with another digest than its own")
    check.version(raw.pop("accelx"), VERSION, what)
    for name in ("step", "position", "world", "size", "tensors", "manifest_size"):
        check.whole_number(raw.get(name), what)
    for number in (raw.get("time"), *raw["metrics"].values()):
        if type(number) not in (int, float):
            raise check.damaged(what, f"the number {str(number)[:40]}")
    check.hex_digest(raw.get("manifest_digest"), what)
    try:
        return Commit(**raw)
    except TypeError as error:
        raise check.damaged(what, str(error)) from None


def found(url: str) -> list[Found]:
    """Every checkpoint under `url`, whole or not, oldest step first.

    Reads one small object of each. Folders of another name are passed over.
    """
    store = storage.at(url)
    names = sorted(n for n in storage.sizes(store) if step_of(n) is not None)
    each = [look(storage.inside(store, name), name) for name in names]
    return sorted(each, key=lambda f: (f.step, f.commit.time if f.commit else 0.0))


def look(store: Store, name: str) -> Found:
    """The checkpoint in the folder `store`, by its commit alone."""
    step = step_of(name) or 0
    try:
        commit = read_commit(
            storage.read(store, COMMIT, LIMIT), f"{store.url}/{COMMIT}"
        )
    except FileNotFoundError:
        return Found(store.url, name, step, why="it has no commit")
    except DamagedError as error:
        return Found(store.url, name, step, why=str(error))
    return Found(store.url, name, commit.step, commit)


def latest(url: str) -> Found | None:
    """The newest whole checkpoint under `url`, or None.

    Whole: the commit is sound, the manifest is the one that it names, and every file
    lies there in its size. `Found.skipped` has the newer ones that are not, each with
    why. Digests of the data are left to `load_state` and `verify`.
    """
    skipped = list[Found]()
    for one in reversed(found(url)):
        why = one.why or lacks(one)
        if not why:
            return attrs.evolve(one, skipped=tuple(skipped))
        skipped.append(attrs.evolve(one, why=why))
    return None


def lacks(one: Found) -> str:
    """Why a committed folder is not whole; empty where it is."""
    try:
        store, manifest = open_manifest(one)
        check_sizes(store, manifest)
    except (DamagedError, FileNotFoundError) as error:
        return str(error)
    return ""


def open_manifest(one: Found) -> tuple[Store, Manifest]:
    """The manifest that a commit names. Raises DamagedError if it is another."""
    store = storage.at(one.url)
    what = f"{store.url}/{MANIFEST}"
    if one.commit is None:
        raise DamagedError(
            f"{one.url} wants to be a whole checkpoint, but {one.why}; take another, "
            "such as latest(url) finds"
        )
    size = storage.sizes(store).get(MANIFEST)
    if size != one.commit.manifest_size:
        raise check.damaged(what, f"{size} bytes of {one.commit.manifest_size}")
    data = storage.read(store, MANIFEST, one.commit.manifest_size)
    if digest(data) != one.commit.manifest_digest:
        raise check.damaged(what, "another digest than the commit says")
    return store, read_manifest(data, what)


def check_sizes(store: Store, manifest: Manifest) -> None:
    """Refuse a checkpoint with a file that is missing, or of another size."""
    there = storage.sizes(store)
    for part in manifest.parts:
        for name, size in ((part.file, part.size), (part.index, part.index_size)):
            if there.get(name) != size:
                came = f"{there[name]} bytes" if name in there else "nothing"
                raise DamagedError(
                    f"{store.url}/{name} wants to have {size} bytes, got {came}; the "
                    "checkpoint is damaged: take another"
                )


def resolve(url: str) -> Found:
    """The checkpoint that `url` means: itself, or the newest whole one under it.

    Raises CheckpointError where there is none.
    """
    clean = url.rstrip("/")
    name, store = clean.rpartition("/")[2], storage.at(clean)
    if step_of(name) is not None or COMMIT in storage.sizes(store):
        one = look(store, name)
        if one.commit is None:
            raise DamagedError(
                f"{one.url} wants to be a whole checkpoint, but {one.why}; take "
                "another, such as latest(url) finds"
            )
        return one
    newest = latest(clean)
    if newest is None:
        raise CheckpointError(
            f"wanted a checkpoint under {store.url}, found none that is "
            "whole; write the URL that save_state was given, or "
            'load_state(..., missing="fresh") to start without one'
        )
    return newest
