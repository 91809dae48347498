"""What weights a URL names: a safetensors file, a folder of them, or a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import attrs

from accelx import storage
from accelx.errors import CheckpointError
from accelx.saves import foreign
from accelx.saves.commit import COMMIT, check_sizes, open_manifest, resolve, step_of
from accelx.saves.manifest import Entry, Index, Manifest
from accelx.saves.read import Read, reader
from accelx.storage import Store

WHOLE = "model.safetensors"
SHARDS = "model.safetensors.index.json"
MODEL = "model."  # how a checkpoint's names of weights begin


@attrs.frozen
class Source:
    """Stored weights, none of them read."""

    store: Store
    manifest: Manifest
    names: Mapping[str, str]  # name of a weight in the file -> name in the manifest
    indices: Mapping[int, Index] | None = None  # of files without digests

    def entry(self, name: str) -> Entry:
        """What is stored of a weight, by its name in the file."""
        return self.manifest.tensors[self.names[name]]


@contextmanager
def reading(source: Source) -> Generator[Read]:
    """What fills wants, by names of the manifest; with digests where there are any."""
    checked = source.indices is None
    with reader(source.store, source.manifest, checked, source.indices) as read:
        yield read


def opened(url: str | os.PathLike[str]) -> Source:
    """The weights at `url`; reads headers, or a manifest, and no numbers.

    A file ending in .safetensors or .safetensors.index.json; a folder with
    model.safetensors, or else with model.safetensors.index.json, or a checkpoint, or a
    folder of checkpoints, of which the newest whole one counts. Raises CheckpointError
    where none of them is there, DamagedError where it is not what it should be.
    """
    text = os.fspath(url).rstrip("/")
    folder, slash, last = text.rpartition("/")
    if last.endswith((".safetensors", ".safetensors.index.json")):
        root = folder + "/" if folder.endswith(":/") else folder or slash or "."
        return _files(storage.at(root), last)
    store = storage.at(text)
    there = storage.sizes(store)
    files = [name for name in (WHOLE, SHARDS) if name in there]
    saved = COMMIT in there or any(step_of(n) is not None for n in (last, *there))
    if files and saved:
        raise CheckpointError(
            f"{store.url} wants to hold weights in one form, but has {files[0]} and "
            f"checkpoints beside it; write {store.url}/{files[0]} or the URL of a "
            "checkpoint"
        )
    if saved:
        return _checkpoint(text)
    if files:
        return _files(store, files[0])
    raise CheckpointError(
        f"wanted weights under {store.url}, found no {WHOLE}, no {SHARDS} and no "
        "checkpoint; write the URL of a .safetensors file, of a folder with one of "
        "them, or the one that save_state was given"
    )


def _files(store: Store, name: str) -> Source:
    sizes, what = storage.sizes(store), f"{store.url}/{name}"
    if sizes.get(name) is None:
        raise CheckpointError(
            f"wanted the file {what}, found none; write the URL of a .safetensors "
            "file, or of the folder that it lies in"
        )
    homes, files = None, [name]
    if name.endswith(".json"):
        homes = foreign.read_map(storage.read(store, name, foreign.LIMIT), what)
        files = sorted(set(homes.values()))
    heads = foreign.read_files(store, files, sizes)
    manifest, indices = foreign.as_parts(heads, homes, what)
    return Source(store, manifest, {n: n for n in manifest.tensors}, indices)


def _checkpoint(url: str) -> Source:
    store, manifest = open_manifest(resolve(url))
    check_sizes(store, manifest)
    # what lies inside a module's extra state is not a weight
    extra = tuple(f"{name}." for name in manifest.values if name.startswith(MODEL))
    stored = {n: n for n in manifest.tensors if not (extra and n.startswith(extra))}
    names = {
        name.removeprefix(MODEL): target
        for name, target in {**stored, **manifest.aliases}.items()
        if name.startswith(MODEL)
    }
    return Source(store, manifest, names)
