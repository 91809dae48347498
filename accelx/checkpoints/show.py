"""What one checkpoint holds, and in which of its files."""

from __future__ import annotations

import difflib
import math
from typing import Any

import attrs

from accelx.checkpoints.listing import foreign, row
from accelx.errors import CheckpointError
from accelx.match import globs
from accelx.saves.commit import lacks, open_manifest, resolve
from accelx.saves.manifest import Entry, Manifest


def show(url: str, glob: str | None = None) -> dict[str, Any]:
    """The checkpoint that `url` means; of its tensors those that fit `glob`."""
    one = resolve(url)
    store, manifest = open_manifest(one)
    names = _fitting(manifest, glob)
    passed = [{"name": f.name, "why": f.why} for f in one.skipped]
    return {
        "checkpoint": row(attrs.evolve(one, why=lacks(one))),
        "passed_over": passed,
        "about": dict(manifest.about),
        "parts": _parts(manifest),
        "foreign": foreign(store, manifest),
        "groups": _groups(manifest),
        "tensors": [_tensor(manifest, n) for n in manifest.tensors if n in names],
        "aliases": {k: v for k, v in manifest.aliases.items() if k in names},
        "base": [
            {"name": name, "dtype": dtype, "shape": list(shape), "fingerprint": print_}
            for name, (dtype, shape, print_) in manifest.base.items()
            if f"model.{name}" in names
        ],
    }


def _fitting(manifest: Manifest, glob: str | None) -> set[str]:
    base = [f"model.{name}" for name in manifest.base]
    every = [*manifest.tensors, *manifest.aliases, *base]
    names = {n for n in every if glob is None or globs(glob, n)}
    if glob is not None and not names:
        near = difflib.get_close_matches(glob.replace("*", ""), every, 3, 0.3)
        raise CheckpointError(
            f"--tensors {glob!r} fits no name of step {manifest.about.get('step')}; "
            f"names are such as {', '.join(near or every[:3])}: * is within one part, "
            "** any number of parts, as in 'model.**'"
        )
    return names


def size_of(entry: Entry) -> int:
    """Bytes of a tensor."""
    return math.prod(entry.shape) * entry.width


def _tensor(manifest: Manifest, name: str) -> dict[str, Any]:
    entry = manifest.tensors[name]
    pieces = manifest.layouts[entry.layout]
    return {
        "name": name,
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "size": size_of(entry),
        "num_slices": len(pieces),
        "parts": sorted({piece.part for piece in pieces}),
    }


def _parts(manifest: Manifest) -> list[dict[str, Any]]:
    pairs = zip(manifest.parts, manifest.held, strict=True)
    return [{**attrs.asdict(part), "num_slices": count} for part, (count, _) in pairs]


def _groups(manifest: Manifest) -> list[dict[str, Any]]:
    """Tensors by the first part of their names: model, optim, slots, random."""
    groups: dict[str, dict[str, Any]] = {}
    for name, entry in manifest.tensors.items():
        first = name.partition(".")[0]
        empty = {"name": first, "num_tensors": 0, "size": 0, "dtypes": {}}
        group = groups.setdefault(first, empty)
        group["num_tensors"] += 1
        group["size"] += size_of(entry)
        group["dtypes"][entry.dtype] = group["dtypes"].get(entry.dtype, 0) + 1
    return list(groups.values())
