"""Which saved name each name here has, and all that is missing, left over or other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from accelx.errors import CheckpointError
from accelx.saves import optim
from accelx.saves.contents import state_tensors
from accelx.saves.manifest import Manifest
from accelx.saves.spread import elsewhere
from accelx.state import Occasional, State, Transient


@attrs.frozen
class Names:
    """What a state's weights, buffers and extra states are called in a manifest."""

    manifest: Manifest
    wanted: Callable[[str], bool]  # whether a thing of that name is to be loaded
    saved: Mapping[str, str]  # name here -> name in the file, without "model."

    def stored(self, name: str) -> str:
        """The name under which the tensor called `name` here is stored."""
        full = f"model.{self.saved.get(name)}"
        return self.manifest.aliases.get(full, full)


def named(
    state: State, manifest: Manifest, rename: Any, wanted: Callable[[str], bool]
) -> Names:
    """The names of a state in a manifest, if everything `wanted` fits.

    Raises CheckpointError that lists what is missing, left over, of another shape or
    dtype, or tied otherwise.
    """
    held, ties, extra = state_tensors(state)
    names = Names(manifest, wanted, _renamed(manifest, rename))
    every = {*held, *ties, *extra}
    faults = [
        *_absent(names, every, elsewhere(state.model)),
        *_other(names, held),
        *_tied(names, ties),
        *_training(names, state),
    ]
    if faults:
        shown = "\n  ".join(faults[:20]) + ("\n  ..." if faults[20:] else "")
        raise CheckpointError(
            f"the checkpoint of step {manifest.about.get('step')} wants a state like "
            f"the one that was saved, but:\n  {shown}\nMake the same model and chain, "
            'or say what to load: only=("model.**", "step"), and what has another name '
            'now: rename={"old": "new"}'
        )
    return attrs.evolve(
        names, saved={n: s for n, s in names.saved.items() if n in every}
    )


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


def _absent(names: Names, every: set[str], gone: frozenset[str]) -> list[str]:
    saved = names.saved
    faults = [f"model.{n} is not in it" for n in every if n not in saved]
    over = [s for n, s in saved.items() if n not in every and n not in gone]
    faults += [f"model.{s} is in it and not here" for s in over]
    return sorted(f for f in faults if names.wanted(f.split(" ")[0]))


def _other(names: Names, held: Mapping[str, Any]) -> list[str]:
    faults: list[str] = []
    for name, tensor in held.items():
        entry = names.manifest.tensors.get(names.stored(name))
        if entry is None or not names.wanted(f"model.{name}"):
            continue
        here = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        there = f"{entry.dtype} {list(entry.shape)}"
        if here != there:
            faults.append(f"model.{name} is {there} in it and {here} here")
    return faults


def _tied(names: Names, ties: Mapping[str, str]) -> list[str]:
    saved = names.saved
    return [
        f"model.{a} and model.{b} are one tensor here and two in it"
        for a, b in ties.items()
        if a in saved and b in saved and names.stored(a) != names.stored(b)
        if saved[a] not in names.manifest.base and names.wanted(f"model.{a}")
    ]


def _training(names: Names, state: State) -> list[str]:
    """What does not fit of optimizers and slots."""
    values = names.manifest.values
    theirs = {k for k in values if k.startswith("optim.")}
    ours = {f"optim.{i}.{w}" for i in range(len(state.optimizers)) for w in _OPTIM}
    loose = (Transient, Occasional)  # what a checkpoint need not hold
    slots = [n for n, s in state.slots.items() if not isinstance(s, loose)]
    absent = [*sorted(ours - theirs), *(f"slots.{n}" for n in slots)]
    over = sorted(theirs - ours)
    faults = [f"{k} is in it and not here" for k in over if names.wanted(k)]
    faults += [
        f"{k} is not in it" for k in absent if k not in values and names.wanted(k)
    ]
    return faults + _params(names, state)


_OPTIM = ("groups", "state")


def _params(names: Names, state: State) -> list[str]:
    faults: list[str] = []
    own = optim.names_of(state.model)
    for i, optimizer in enumerate(optim.seen(state)):
        raw = names.manifest.values.get(f"optim.{i}.groups")
        if raw is None or not names.wanted(f"optim.{i}.state"):
            continue
        theirs = {n for g in optim.groups_in(i, raw) for n in g["params"]}
        params = [own[id(p)] for g in optimizer.param_groups for p in g["params"]]
        ours = {names.saved.get(n, n) for n in params}
        theirs -= {names.saved.get(n, n) for n in elsewhere(state.model)}
        at = f"optim.{i} in it does not move"
        faults += [f"{at} {n}" for n in sorted(ours - theirs)]
        faults += [f"optim.{i} here does not move {n}" for n in sorted(theirs - ours)]
    return faults
