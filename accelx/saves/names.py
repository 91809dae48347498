"""Which saved name each name here has, and all that is missing, left over or other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from accelx.errors import CheckpointError
from accelx.saves import optim
from accelx.saves.contents import model_tensors
from accelx.saves.manifest import Manifest
from accelx.state import State, Transient


@attrs.frozen
class Names:
    """Name of a weight, buffer or extra state here -> its name in the file."""

    saved: Mapping[str, str]


def named(
    state: State, manifest: Manifest, rename: Any, wanted: Callable[[str], bool]
) -> Names:
    """The names of a state in a manifest, if everything `wanted` fits.

    Raises CheckpointError that lists what is missing, left over, of another shape or
    dtype, or tied otherwise.
    """
    held, ties, extra = model_tensors(state.model)
    saved = _renamed(manifest, rename)
    every = {*held, *ties, *extra}
    faults = [
        *_absent(every, saved, wanted),
        *_other(held, saved, manifest, wanted),
        *_tied(ties, saved, manifest, wanted),
        *_training(state, manifest, saved, wanted),
    ]
    if faults:
        shown = "\n  ".join(faults[:20]) + ("\n  ..." if faults[20:] else "")
        raise CheckpointError(
            f"the checkpoint of step {manifest.about.get('step')} wants a state like "
            f"the one that was saved, but:\n  {shown}\nMake the same model and chain, "
            'or say what to load: only=("model.**", "step"), and what has another name '
            'now: rename={"old": "new"}'
        )
    return Names({n: s for n, s in saved.items() if n in every})


def _renamed(manifest: Manifest, rename: Any) -> dict[str, str]:
    """Name here -> name in the file, of all that the file has of a model."""
    theirs = [*manifest.tensors, *manifest.aliases, *manifest.values]
    names = [n.removeprefix("model.") for n in theirs if n.startswith("model.")]
    inside = [n for n in names if f"model.{n}" in manifest.values]
    # what lies inside a module's extra state is not a weight
    names = [n for n in names if not any(n.startswith(f"{i}.") for i in inside)]
    found: dict[str, str] = {}
    for saved in [*names, *manifest.base]:
        if isinstance(rename, Mapping):
            name = rename.get(saved, saved)
        else:
            name = rename(saved) if rename else saved
        if name in found:
            raise CheckpointError(
                f"rename wants to give each name once, but {found[name]!r} and "
                f"{saved!r} both become {name!r}; give one of them another name"
            )
        found[name] = saved
    return found


def _absent(
    every: set[str], saved: Mapping[str, str], wanted: Callable[[str], bool]
) -> list[str]:
    missing = [f"model.{n} is not in it" for n in every if n not in saved]
    over = [
        f"model.{s} is in it and not here" for n, s in saved.items() if n not in every
    ]
    return sorted(f for f in (*missing, *over) if wanted(f.split(" ")[0]))


def _other(
    held: Mapping[str, Any],
    saved: Mapping[str, str],
    manifest: Manifest,
    wanted: Callable[[str], bool],
) -> list[str]:
    faults: list[str] = []
    for name, tensor in held.items():
        full = f"model.{saved.get(name)}"
        entry = manifest.tensors.get(manifest.aliases.get(full, full))
        if entry is None or not wanted(f"model.{name}"):
            continue
        here = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        there = f"{entry.dtype} {list(entry.shape)}"
        if here != there:
            faults.append(f"model.{name} is {there} in it and {here} here")
    return faults


def _tied(
    ties: Mapping[str, str],
    saved: Mapping[str, str],
    manifest: Manifest,
    wanted: Callable[[str], bool],
) -> list[str]:
    def stored(name: str) -> str:
        full = f"model.{saved.get(name)}"
        return manifest.aliases.get(full, full)

    return [
        f"model.{a} and model.{b} are one tensor here and two in it"
        for a, b in ties.items()
        if a in saved and b in saved and stored(a) != stored(b)
        if saved[a] not in manifest.base and wanted(f"model.{a}")
    ]


def _training(
    state: State,
    manifest: Manifest,
    saved: Mapping[str, str],
    wanted: Callable[[str], bool],
) -> list[str]:
    """What does not fit of optimizers and slots."""
    faults: list[str] = []
    theirs = {k for k in manifest.values if k.startswith("optim.")}
    ours = {f"optim.{i}.{w}" for i in range(len(state.optimizers)) for w in _OPTIM}
    faults += [f"{k} is in it and not here" for k in sorted(theirs - ours) if wanted(k)]
    faults += [f"{k} is not in it" for k in sorted(ours - theirs) if wanted(k)]
    slots = [n for n, s in state.slots.items() if not isinstance(s, Transient)]
    keys = [f"slots.{n}" for n in slots]
    faults += [
        f"{k} is not in it" for k in keys if k not in manifest.values and wanted(k)
    ]
    return faults + _params(state, manifest, saved, wanted)


_OPTIM = ("groups", "state")


def _params(
    state: State,
    manifest: Manifest,
    saved: Mapping[str, str],
    wanted: Callable[[str], bool],
) -> list[str]:
    faults: list[str] = []
    names = {id(p): n for n, p in state.model.named_parameters()}
    for i, optimizer in enumerate(state.optimizers):
        raw = manifest.values.get(f"optim.{i}.groups")
        if raw is None or not wanted(f"optim.{i}.state"):
            continue
        theirs = {n for g in optim.groups_in(i, raw) for n in g["params"]}
        ours = {
            saved.get(names[id(p)], names[id(p)])
            for g in optimizer.param_groups
            for p in g["params"]
        }
        at = f"optim.{i} in it does not move"
        faults += [f"{at} {n}" for n in sorted(ours - theirs)]
        faults += [f"optim.{i} here does not move {n}" for n in sorted(theirs - ours)]
    return faults
