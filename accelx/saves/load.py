"""What of a checkpoint goes where in a state, and what to say where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from accelx.errors import CheckpointError
from accelx.match import Selector, fits
from accelx.records import Env
from accelx.saves import check, optim, streams
from accelx.saves.boxes import Box, whole
from accelx.saves.contents import RANDOM, state_tensors
from accelx.saves.fingerprint import fingerprints
from accelx.saves.flat import Flat, Held, blank
from accelx.saves.lie import here
from accelx.saves.manifest import Manifest
from accelx.saves.names import Names, named
from accelx.saves.read import Want, fill
from accelx.saves.spread import elsewhere, ours
from accelx.saves.typed import decode, hand, settle
from accelx.state import State, Transient, slots_of
from accelx.storage import Store

Rename = Callable[[str], str] | Mapping[str, str] | None
Only = Selector | tuple[Selector, ...] | None


def takes(only: Only, name: str) -> bool:
    """Whether `only` takes the thing called `name`."""
    if only is None:
        return True
    return any(
        fits(s, name, None) for s in (only if isinstance(only, tuple) else (only,))
    )


@attrs.define(eq=False)
class _Loading:
    """A load that is being put together: what to read, and what to do then."""

    env: Env
    manifest: Manifest
    only: Only
    wants: list[Want] = attrs.field(factory=list)
    wanted: set[str] = attrs.field(factory=set)
    then: list[Callable[[], None]] = attrs.field(factory=list)
    boxes: dict[Any, Any] = attrs.field(factory=dict)  # memo of `here`

    def make(self, path: str, like: Any, cpu: bool, reuse: bool = False) -> Held:
        """A tensor for what is stored as `path`, lying as `like` does; to be filled.

        With `reuse` it is `like` itself, if that fits.
        """
        entry = self.manifest.tensors.get(path)
        if entry is None:
            raise CheckpointError(
                f"the checkpoint wants to have a tensor {path}, and has none; it is "
                "damaged: take another"
            )
        dtype = getattr(torch, entry.dtype)
        held = isinstance(like, Tensor | Flat) and bool(entry.shape)
        if reuse and (like.dtype, tuple(like.shape)) == (dtype, entry.shape):
            made = like
        elif held and tuple(like.shape) == entry.shape:
            made = blank(like, dtype)
        else:
            device = like.device if held else "cpu" if cpu else self.env.device
            made = torch.empty(entry.shape, dtype=dtype, device=device)
        self.want(path, made)
        return made

    def want(self, path: str, tensor: Held) -> None:
        """Read what is stored as `path` into what this rank holds of `tensor`."""
        if path in self.wanted:
            raise check.damaged("the manifest", f"the tensor {path} in two places")
        self.wanted.add(path)
        each = here(tensor, self.boxes)
        self.wants += [Want(path, box, local) for box, local in each]


def load(
    env: Env,
    state: State,
    store: Store,
    manifest: Manifest,
    rename: Rename = None,
    only: Only = None,
    verify: str = "touched",
) -> Callable[[], State]:
    """Read `manifest` into `state`; what installs the rest and gives the state.

    Everything is compared first, so that what does not fit raises CheckpointError with
    lists of names before a byte is read. Weights are then filled in place; optimizers,
    slots, counters and random streams are set by the function that is returned.
    """
    placed = state.slots.get("shard_model")
    if placed is not None:
        placed.rest()
    loading = _Loading(env, manifest, only)
    names = named(state, manifest, rename, lambda name: takes(only, name))
    _model(loading, state, names)
    _optimizers(loading, state, names)
    slots = _slots(loading, state)
    random = _random(loading)
    fill(store, manifest, loading.wants, verify, env.local_world)

    def install() -> State:
        for one in loading.then:
            one()
        if placed is not None:
            placed.written()
        fresh = {name: settle(value) for name, value in slots.items()}
        counters = {
            k: manifest.values[k] for k in ("step", "skipped") if takes(only, k)
        }
        if random is not None:
            streams.restore(random, env.rank, manifest.about["world"], env.device)
        every = slots_of({**state.slots, **fresh})
        return attrs.evolve(state, slots=every, **counters)

    return install


def _model(loading: _Loading, state: State, names: Names) -> None:
    held, _, extra = state_tensors(state)
    absent: dict[str, Held] = {}
    for name, tensor in held.items():
        saved = names.saved.get(name)
        if saved is None or not takes(loading.only, f"model.{name}"):
            continue
        if saved in loading.manifest.base:
            absent[saved] = tensor
        else:
            loading.want(f"model.{saved}", tensor)
    _same_base(loading, absent)
    for name in extra:
        saved = f"model.{names.saved.get(name)}"
        wanted = takes(loading.only, f"model.{name}")
        if wanted and saved in loading.manifest.values:
            loading.then.append(_extra(loading, state.model, name, saved))


def _extra(loading: _Loading, model: Any, name: str, saved: str) -> Callable[[], None]:
    value = decode(loading.manifest.values[saved], saved, None, loading.make)
    module = model.get_submodule(name.rpartition(".")[0])
    return lambda: hand(module.set_extra_state, settle(value), saved)


def _same_base(loading: _Loading, absent: Mapping[str, Held]) -> None:
    """Refuse weights that are not those the checkpoint was trained on top of."""
    now = fingerprints(loading.env, absent) if absent else {}
    base = loading.manifest.base
    other = [name for name, one in now.items() if tuple(base[name]) != one]
    if other:
        raise CheckpointError(
            f"the checkpoint was saved on top of weights that it does not hold, and "
            f"{len(other)} of them are other ones here: {', '.join(other[:5])}; load "
            "the same base first, with load_weights(url) or in the function that makes "
            "the model"
        )


def _optimizers(loading: _Loading, state: State, names: Names) -> None:
    sides = optim.Sides(optim.names_of(state.model), names.saved, loading.make)
    values = loading.manifest.values
    for i, optimizer in enumerate(optim.seen(state)):
        for key, restored in (
            (f"optim.{i}.state", optim.restored_state),
            (f"optim.{i}.groups", optim.restored_groups),
        ):
            if takes(loading.only, key) and key in values:
                loading.then.append(restored(i, values[key], optimizer, sides))


def _slots(loading: _Loading, state: State) -> dict[str, Any]:
    found: dict[str, Any] = {}
    gone = elsewhere(state.model)
    for key, raw in loading.manifest.values.items():
        name = key.removeprefix("slots.")
        if name != key and takes(loading.only, key):
            like = state.slots.get(name)
            if isinstance(like, Transient):
                continue
            found[name] = decode(ours(raw, gone), key, like, loading.make)
    return found


def _random(loading: _Loading) -> Tensor | None:
    entry = loading.manifest.tensors.get(RANDOM)
    if entry is None or not takes(loading.only, RANDOM):
        return None
    world = check.whole_number(loading.manifest.about.get("world"), "the manifest")
    shape = entry.shape
    if shape[:1] != (world,) or len(shape) != 2 or entry.dtype != "uint8":
        came = f"random streams of shape {shape}, {entry.dtype}"
        raise check.damaged("the manifest", came)
    low, high = streams.rows_for(loading.env.rank, world)
    rows = torch.empty(high - low, entry.shape[1], dtype=torch.uint8, device="cpu")
    box = Box((low, 0), (high, entry.shape[1]))
    assert box.volume <= whole(entry.shape).volume
    loading.wants.append(Want(RANDOM, box, rows))
    return rows
