"""Which keys of a DCP folder are model, optimizer and scheduler, and their chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from accelx import storage
from accelx.errors import CheckpointError, DamagedError
from accelx.saves.boxes import Box, Ints, tile, whole
from accelx.saves.check import extent
from accelx.saves.convert_pickle import unpickled
from accelx.saves.convert_source import (
    Lazy,
    Optim,
    Pickled,
    Source,
    safetensors,
    torch_load,
    value,
)
from accelx.saves.dtypes import KINDS
from accelx.saves.memory import inside
from accelx.storage import Store

METADATA = ".metadata"
OTHER = "accelx does not know this file"
EXTRA = "_extra_state"  # of a module, by torch's name for it
WORDS = {
    "model": ("model",),
    "optim": ("optim", "optimizer"),
    "scheduler": ("scheduler", "lr_scheduler"),
}
Keys = Mapping[str, str | Sequence[str]]


@attrs.frozen(eq=False)
class Leaves:
    """What a folder holds by its full name, and the path that the name is made of."""

    of: Mapping[str, Any]
    files: frozenset[str]  # that it lies in
    paths: Mapping[str, tuple[Any, ...]]  # of keys, and of indices of lists

    def under(self, key: str) -> dict[str, Any]:
        """What lies under a key, without it; everything under ""."""
        start = f"{key}." if key else ""
        return {n[len(start) :]: v for n, v in self.of.items() if n.startswith(start)}


def read_dcp(store: Store, trust: bool, keys: Keys | None = None) -> Source:
    """The checkpoint that `dcp.save` wrote to the folder. Reads names and places."""
    return _sorted(store, native(store, trust), keys)


def read_safetensors(store: Store, keys: Keys | None = None) -> Source:
    """The safetensors files of a folder, slices of one tensor put together."""
    return _sorted(store, shards(store), keys)


def native(store: Store, trust: bool) -> Leaves:
    """What FileSystemWriter wrote.

    Raises CheckpointError without `trust`, DamagedError where the chunks of a tensor do
    not cover it, or lie outside of their files.
    """
    what = f"{store.url}/{METADATA}"
    if not trust:
        raise CheckpointError(
            f"{what} is a pickle, a format that can run code from the file, so it is "
            "not opened unasked; if you know who wrote the folder, write trust=True: "
            "names that DCP does not write are refused even then"
        )
    sizes = storage.sizes(store)
    raw = unpickled(storage.read(store, METADATA, sizes[METADATA] or 0), what)
    try:
        return _leaves(store, raw, sizes)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise DamagedError(
            f"{what} wants to describe tensors as DCP does, got one without {error}; "
            "it is damaged, or of a torch that accelx does not know"
        ) from error


def _leaves(store: Store, raw: Any, sizes: Mapping[str, int | None]) -> Leaves:
    places = {
        (at.fqn, tuple(vars(at).get("offset") or ())): info
        for at, info in raw.storage_data.items()
    }
    for info in places.values():
        _in_file(store, info, sizes)
    paths = raw.planner_data or {}
    found, split = dict[str, Any](), dict[str, tuple[Any, ...]]()
    for name, one in raw.state_dict_metadata.items():
        split[name] = tuple(paths.get(name, (name,)))
        if _joined(split[name]) != name:
            raise ValueError(f"a path for {name!r:.80}")
        if type(one).__name__ == "BytesStorageMetadata":
            found[name] = Pickled(partial(_load, store, places[name, ()]))
        else:
            found[name] = _tensor(store, name, one, places)
    files = frozenset(info.relative_path for info in places.values())
    return Leaves(found, files | {METADATA}, split)


def _tensor(store: Store, name: str, one: Any, places: Mapping[Any, Any]) -> Lazy:
    dtype = str(one.properties.state[0]).removeprefix("torch.")
    shape = extent(list(one.size), dtype, f"{store.url}/{METADATA}")
    pieces: dict[Box, Any] = {}
    for chunk in one.chunks:
        lo, size = tuple(chunk.offsets), tuple(chunk.sizes)
        box = Box(lo, tuple(a + n for a, n in zip(lo, size, strict=True)))
        if 0 in size:
            continue  # of a rank that has no row
        info = places[name, lo]
        if box.volume * KINDS[dtype].width > info.length:
            raise ValueError(f"room for {list(size)} of {name!r:.80}")
        pieces[box] = partial(_load, store, info)
    return _whole(store.url, name, dtype, shape, pieces)


def _in_file(store: Store, info: Any, sizes: Mapping[str, int | None]) -> None:
    file, offset, length = info.relative_path, info.offset, info.length
    if vars(info).get("transform_descriptors"):
        raise CheckpointError(
            f"{store.url}/{file} is written through {info.transform_descriptors}, "
            "which accelx does not undo; save it without extensions"
        )
    if min(offset, length) < 0 or offset + length > (sizes.get(file) or 0):
        raise DamagedError(
            f"{store.url}/{file} wants to hold {length} bytes at {offset}, got a file "
            f"of {sizes.get(file)} bytes; it is damaged: take another checkpoint"
        )


def _load(store: Store, info: Any) -> Any:
    return torch_load(store, info.relative_path, info.offset, info.length)


def _whole(
    url: str, name: str, dtype: str, shape: Ints, pieces: Mapping[Box, Any]
) -> Lazy:
    """One tensor of chunks, each of them all there. DCP itself does not look."""
    why = tile(list(pieces), shape)
    if why is not None:
        raise DamagedError(
            f"{url} wants chunks that cover {name!r} {list(shape)}, but {why}; what a "
            "rank wrote is missing: take another checkpoint"
        )

    def read() -> Tensor:
        out = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
        for box, load in pieces.items():
            part = load()
            came = (part.dtype, tuple(part.shape)) if isinstance(part, Tensor) else part
            if came != (out.dtype, box.shape):
                raise DamagedError(
                    f"{url} wants {dtype} {list(box.shape)} in {name!r}, got "
                    f"{str(came)[:80]}; it is damaged: take another checkpoint"
                )
            inside(out, box, whole(shape)).copy_(part)
        return out

    return Lazy(dtype, shape, read)


def shards(store: Store) -> Leaves:
    """Every safetensors file of the folder; slices as HuggingFaceStorageWriter cuts."""
    blocks: dict[str, list[Any]] = {}
    names = frozenset(storage.sizes(store))
    files = frozenset(name for name in names if name.endswith(".safetensors"))
    for file in sorted(files):
        for block in safetensors(store, file):
            blocks.setdefault(block.name, []).append(block)
    found: dict[str, Any] = {}
    for name, each in blocks.items():
        pieces: dict[Box, Any] = {}
        for block in each:
            lo = block.offsets or (0,) * len(block.lazy.shape)
            hi = tuple(a + n for a, n in zip(lo, block.lazy.shape, strict=True))
            if Box(lo, hi) in pieces:
                raise CheckpointError(
                    f"{store.url} wants each weight once, got {name!r} in two of "
                    f"{', '.join(sorted(files)[:5])}; keep the files of one save"
                )
            pieces[Box(lo, hi)] = block.lazy.read
        shape = tuple(max(ends) for ends in zip(*(b.hi for b in pieces), strict=True))
        full = {box: read for box, read in pieces.items() if box.volume}
        found[name] = _whole(store.url, name, each[0].lazy.dtype, shape, full)
    files |= {name for name in names if name.endswith(".safetensors.index.json")}
    return Leaves(found, files, {name: (name,) for name in found})


def _sorted(store: Store, leaves: Leaves, keys: Keys | None) -> Source:
    chosen = _chosen(leaves, keys, store.url)
    taken = [key for each in chosen.values() for key in each]
    model = dict[str, Any]()
    for key in chosen.get("model", ()):
        model |= _model(leaves, key, [other for other in taken if other != key])
    left = {
        path[0]: "neither model, optimizer nor scheduler; see keys="
        for name, path in leaves.paths.items()
        if not any(key == "" or name.startswith(f"{key}.") for key in taken)
    }
    others = sorted(set(storage.sizes(store)) - leaves.files)
    left |= dict.fromkeys(others, OTHER)
    return Source(
        model,
        [optim_of(k, leaves.under(k)) for k in chosen.get("optim", ())],
        {k: _nested(leaves, k) for k in chosen.get("scheduler", ())},
        None,
        tuple(left.items()),
    )


def _model(leaves: Leaves, key: str, others: Sequence[str]) -> dict[str, Any]:
    """Weights under `key`; a module's extra state as one value, as it was given."""
    found: dict[str, Any] = {}
    for name, leaf in leaves.under(key).items():
        if not key and any(name.startswith(f"{other}.") for other in others):
            continue
        module, extra, _ = name.partition(f"{EXTRA}.")
        if extra and (not module or module.endswith(".")):
            full = f"{key}.{module}{EXTRA}" if key else f"{module}{EXTRA}"
            found[f"{module}{EXTRA}"] = Pickled(partial(_nested, leaves, full))
        else:
            found[name] = leaf
    return found


def _chosen(leaves: Leaves, keys: Keys | None, url: str) -> dict[str, tuple[str, ...]]:
    """Keys of model, optimizers and schedulers: as told, or by their usual words."""
    tops = dict.fromkeys(path[0] for path in leaves.paths.values())
    if keys is not None:
        chosen = {k: (v,) if isinstance(v, str) else tuple(v) for k, v in keys.items()}
        empty = [v for each in chosen.values() for v in each if not leaves.under(v)]
        if set(chosen) <= set(WORDS) and not empty:
            return chosen
        raise CheckpointError(
            f"keys= wants to say where {', '.join(WORDS)} are in {url}, got "
            f"{dict(keys)!r}; there is {', '.join(tops)}"
        )
    seconds = dict.fromkeys(
        f"{path[0]}.{path[1]}" for path in leaves.paths.values() if len(path) > 2
    )
    chosen = {
        kind: tuple(t for t in tops if t in words)
        or tuple(s for s in seconds if s.rpartition(".")[2] in words)
        for kind, words in WORDS.items()
    }
    flat = (len(path) == 1 or EXTRA in path[0] for path in leaves.paths.values())
    if not chosen["model"] and all(flat):
        return {"model": ("",)}  # dcp.save(model.state_dict())
    if len(chosen["model"]) == 1:
        return chosen
    raise CheckpointError(
        f"{url} wants one model under 'model', got {', '.join(tops)}; say which is "
        'which: keys={"model": "net", "optim": "opt"}'
    )


def optim_of(where: str, flat: Mapping[str, Any]) -> Optim:
    """An optimizer's state_dict from its flattened form, whichever of DCP's it has."""
    state, groups = dict[Any, dict[str, Any]](), dict[str, dict[str, Any]]()
    for key, leaf in flat.items():
        part, _, rest = key.partition(".")
        name, _, word = rest.rpartition(".")
        if part not in ("state", "param_groups") or not name:
            raise CheckpointError(
                f"{where} wants to be an optimizer's state_dict, got the key {key!r}; "
                "save get_optimizer_state_dict(model, optimizer)"
            )
        into = state if part == "state" else groups
        into.setdefault(name, {})[word] = leaf
    numbered = any("params" in options for options in groups.values())
    if not numbered:  # get_optimizer_state_dict(flatten_optimizer_state_dict=True)
        return Optim(where, [{"params": [n], **g} for n, g in groups.items()], state)
    ordered = [groups[n] for n in sorted(groups, key=int)]
    ordered = [{**g, "params": value(g["params"])} for g in ordered]
    if any(type(p) is int for g in ordered for p in g["params"]):
        state = {int(name): words for name, words in state.items()}
    return Optim(where, ordered, state)


def _nested(leaves: Leaves, key: str) -> dict[str, Any]:
    """Plain values under `key` as the dict that they were flattened from."""
    made: dict[Any, Any] = {}
    for rest, leaf in leaves.under(key).items():
        path = leaves.paths[f"{key}.{rest}"]
        ends = (k for k in range(len(path)) if _joined(path[:k]) == key)
        at, (*inner, last) = made, path[next(ends, 0) :]
        for part in inner:
            at = at.setdefault(part, {})
        at[last] = value(leaf)
    return _settled(made)


def _joined(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def _settled(node: Any) -> Any:
    """Lists where indices were; DCP makes text of a dict's numbers, here they turn."""
    if not isinstance(node, dict):
        return node
    each: dict[Any, Any] = {k: _settled(v) for k, v in node.items()}
    if each and all(type(k) is int for k in each):
        return [each[k] for k in sorted(each)]
    return {int(k) if k.isdigit() else k: v for k, v in each.items()}
