"""Which stored weight fills which of a model's, and what to say where none fits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from accelx.errors import CheckpointError
from accelx.records import Env
from accelx.saves.contents import model_tensors
from accelx.saves.flat import Flat, Held
from accelx.saves.lie import here
from accelx.saves.load import Only, Rename, takes
from accelx.saves.memory import flat
from accelx.saves.read import Want
from accelx.saves.source import Source, opened, reading
from accelx.saves.spread import elsewhere
from accelx.saves.together import alike, from_main
from accelx.state import Transient

FLOATS = ("float16", "bfloat16", "float32", "float64")  # cast into each other
SHOWN = 20  # faults that an error lists


@attrs.frozen
class Loaded(Transient):
    """The slot "load_weights": what was loaded, and what was not."""

    url: str
    read: int  # bytes that this rank read, headers left out
    missing: tuple[str, ...] = ()  # not in the file; empty if strict
    unexpected: tuple[str, ...] = ()  # in the file, and not here; empty if strict


@attrs.frozen
class Fit:
    """The stored tensors of each weight here, by keys of the manifest, and the rest."""

    keys: Mapping[str, tuple[str, ...]]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_into(
    model: nn.Module,
    url: str | os.PathLike[str],
    rename: Rename,
    only: Only,
    strict: bool,
    env: Env | None,
    lies: Mapping[int, Flat] = MappingProxyType({}),
) -> Loaded:
    """Fill the weights and persistent buffers of `model` in place.

    `lies` are, by id, those that lie otherwise than they look. With an `env` rank 0
    reads the headers for all, and what fails on one rank raises on each; without, this
    rank is by itself. Raises CheckpointError before a number is read where names or
    shapes do not fit.
    """
    source = from_main(env, lambda: opened(url))

    def fill() -> Loaded:
        held = {n: lies.get(id(t), t) for n, t in model_tensors(model)[0].items()}
        fit = fitted(source, model, rename, only, strict)
        return Loaded(
            source.store.url, _fill(source, held, fit), fit.missing, fit.unexpected
        )

    return alike(env, fill)


def fitted(
    source: Source, model: nn.Module, rename: Rename, only: Only, strict: bool
) -> Fit:
    """What of `source` goes where in `model`.

    Tied names are one weight: any of them in the file will do. Raises CheckpointError
    with every name that does not fit.
    """
    held, ties, _ = model_tensors(model)
    groups = {name: [name] for name in held}
    for tied, name in ties.items():
        groups[name].append(tied)
    theirs = _renamed(source, rename)
    keys: dict[str, tuple[str, ...]] = {}
    missing: list[str] = []
    faults: list[str] = []
    for name, group in groups.items():
        if not any(takes(only, one) for one in group):
            continue
        found = [theirs[one] for one in group if one in theirs]
        faults += [_other(source, one, name, held[name]) for one in found]
        keys[name] = tuple(dict.fromkeys(source.names[one] for one in found))
        missing += [] if found else [name]
    ours = {one for group in groups.values() for one in group} | elsewhere(model)
    over = [n for n in theirs if n not in ours and takes(only, n)]
    faults = [fault for fault in faults if fault]
    if strict:
        faults += [f"{name} is not in it" for name in missing]
        faults += [f"{theirs[name]} is in it and not here" for name in over]
    elif not any(keys.values()):
        faults += [f"none of its {len(theirs)} names is one of the {len(ours)} here"]
    if faults:
        raise CheckpointError(_misfit(source, faults, missing, over))
    return Fit(keys, tuple(missing), tuple(theirs[name] for name in over))


def _renamed(source: Source, rename: Rename) -> dict[str, str]:
    """Name here -> name in the file."""
    found: dict[str, str] = {}
    for name in source.names:
        if callable(rename):
            new = rename(name)
        else:
            new = name if rename is None else rename.get(name, name)
        if new in found:
            raise CheckpointError(
                f"rename wants to give each name once, but {found[new]!r} and {name!r} "
                f"both become {new!r}; give one of them another name"
            )
        found[new] = name
    return found


def _other(source: Source, name: str, here: str, tensor: Tensor) -> str:
    """How a stored tensor differs from the one that it is to fill; empty if it fits."""
    entry = source.entry(name)
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    cast = entry.dtype in FLOATS and dtype in FLOATS
    if entry.shape == shape and (entry.dtype == dtype or cast):
        return ""
    there = f"{entry.dtype} {list(entry.shape)}"
    return f"{here} is {there} in it and {dtype} {list(shape)} here"


def _misfit(
    source: Source, faults: list[str], missing: list[str], over: list[str]
) -> str:
    shown = "\n  ".join(faults[:SHOWN])
    if len(faults) > SHOWN:
        shown += f"\n  ... and {len(faults) - SHOWN} more"
    base = [name for name in missing if name in source.manifest.base]
    if base:
        hint = (
            "It was saved on top of weights that it does not hold; load those first, "
            "and only=... of it"
        )
    else:
        hint = (
            f"Make the model that the file is of, or write {_renaming(missing, over)} "
            "for names that are others here, only=... for a part, strict=False to "
            "leave out what is missing or left over"
        )
    return (
        f"load_weights wants {source.store.url} to hold this model's weights, but:\n  "
        f"{shown}\n{hint}"
    )


def _renaming(missing: list[str], over: list[str]) -> str:
    """How to write the renaming; where all that is in the way is a prefix, with it."""
    for name in missing[:1]:
        for other in over:
            if other.endswith(f".{name}"):
                prefix = other.removesuffix(name)
                return f"rename=lambda name: name.removeprefix({prefix!r})"
            if name.endswith(f".{other}"):
                return f"rename=lambda name: {name.removesuffix(other)!r} + name"
    return 'rename={"name in the file": "name here"}'


def _fill(source: Source, held: Mapping[str, Held], fit: Fit) -> int:
    """Read this rank's slices into their memory; the bytes that were read."""
    wants, memo = list[Want](), dict[Any, Any]()
    twins: list[tuple[str, Tensor, Tensor]] = []
    for name, keys in fit.keys.items():
        for box, local in here(held[name], memo):
            wants += [Want(key, box, local) for key in keys[:1]]
            for key in keys[1:]:  # two tensors in the file for one here
                twin = torch.empty_like(local)
                wants.append(Want(key, box, twin))
                twins.append((name, local, twin))
    with reading(source) as read:
        count = read(wants)
    for name, local, twin in twins:
        if not torch.equal(flat(local), flat(twin)):
            raise CheckpointError(
                f"{name} and the names that are tied to it are one tensor here, but "
                f"{source.store.url} has several that differ; untie them in the model, "
                "or take one of them: rename=..."
            )
    return count
