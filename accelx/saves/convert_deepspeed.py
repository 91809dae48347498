"""What a universal checkpoint of DeepSpeed holds: a folder for each weight.

`python -m deepspeed.checkpoint.ds_to_universal` makes it of what `save_checkpoint`
wrote, on any number of ranks and at any stage.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accelx import storage
from accelx.errors import CheckpointError, DamagedError
from accelx.saves.boxes import Ints
from accelx.saves.convert_source import Lazy, Optim, Source, held, torch_load
from accelx.storage import Store

ZERO, COMMON, WEIGHT, STEP = "zero", "optimizer_state.pt", "fp32.pt", "step.pt"
STATES = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_DTYPE = "float32"  # of masters and moments
_CONVERT = "python -m deepspeed.checkpoint.ds_to_universal --input_folder"


class _Inert:
    """What a file has of an object of DeepSpeed's; it does nothing."""


STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


def _stage(of: Any, name: Any) -> int:
    """A stage by its name, as Python 3.11.0 to 3.11.3 pickle it."""
    if of is not int or name not in STAGES:
        raise pickle.UnpicklingError(f"getattr of {of!r} and {name!r}")
    return STAGES[name]


# Names that its files use, and what each becomes here: none of its code is run.
_KNOWN: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_stage, "builtins.getattr"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


def is_deepspeed(sizes: Mapping[str, Any]) -> bool:
    """Whether the folder is one of DeepSpeed's, universal or not."""
    return any(STATES.fullmatch(name) for name in sizes)


def read_deepspeed(store: Store) -> Source:
    """The universal checkpoint in a folder. Reads names and small things.

    Raises CheckpointError for one that is not universal, or is of tensor parallel
    ranks.
    """
    sizes = storage.sizes(store)
    if ZERO not in sizes:
        raise CheckpointError(
            f"{store.url} is as DeepSpeed's ranks wrote it; make one checkpoint of it "
            f"first: {_CONVERT} {store.url} --output_folder ..., and import that"
        )
    ranks = _ranks(store, sizes)
    shapes = _shapes(store, ranks[0])
    zero = storage.inside(store, ZERO)
    names = {name for group in shapes for name in group}
    absent = sorted(names - set(storage.sizes(zero)))
    if absent:
        raise DamagedError(
            f"{zero.url} wants a folder for each trained weight, got none for "
            f"{', '.join(absent[:5])}; convert it anew"
        )
    sizes_of = {name: s for group in shapes for name, s in group.items()}
    weights = {n: _part(zero, n, WEIGHT, s) for n, s in sizes_of.items()}
    return Source(
        {**_rest(store, ranks, set(weights)), **weights},
        (_optim(zero, shapes),),
        left_out=(("lr_scheduler", "with_schedule is made by the chain"),)
        if ranks[0].get("lr_scheduler")
        else (),
    )


def _ranks(store: Store, sizes: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What each rank's file says, in rank order; stages below 3 have one file."""
    found: dict[int, str] = {}
    for name in sizes:
        match = STATES.fullmatch(name)
        if match and int(match[2]):
            raise CheckpointError(
                f"{store.url}/{name} is of ranks that each hold a part of the layers, "
                "which accelx does not put together; save it without tensor and "
                "pipeline parallelism"
            )
        if match:
            found[int(match[1] or 0)] = name
    return [_loaded(store, found[rank]) for rank in sorted(found)]


def _loaded(store: Store, name: str) -> Mapping[str, Any]:
    with torch.serialization.safe_globals(_KNOWN):
        raw = torch_load(store, name)
    if not isinstance(raw, dict):
        raise DamagedError(
            f"{store.url}/{name} wants to hold a dict, got {type(raw).__name__}; take "
            "another checkpoint"
        )
    return raw


def _shapes(store: Store, rank: Mapping[str, Any]) -> list[dict[str, Ints]]:
    """Of each group of the optimizer, the names and shapes of its weights."""
    raw = rank.get("param_shapes")
    if not isinstance(raw, list) or not all(isinstance(g, dict) for g in raw):
        raise DamagedError(
            f"{store.url} wants param_shapes, the weights of each group, got "
            f"{str(raw)[:80]}; save it with DeepSpeed 0.19"
        )
    return [{name: tuple(shape) for name, shape in group.items()} for group in raw]


def _part(zero: Store, name: str, file: str, shape: Ints) -> Lazy:
    """A tensor of a weight's folder, unread."""
    folder = storage.inside(zero, name)

    def read() -> Tensor:
        raw = torch_load(folder, file)
        tensor = raw.get("param") if isinstance(raw, dict) else raw
        flat = (math.prod(shape),)  # as stage 3 has them
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) not in (shape, flat):
            came = tuple(tensor.shape) if isinstance(tensor, Tensor) else str(raw)[:80]
            raise DamagedError(
                f"{folder.url}/{file} wants a tensor of shape {shape}, got {came}; "
                "convert it anew"
            )
        return tensor.to(getattr(torch, _DTYPE)).view(shape)

    return Lazy(_DTYPE, shape, read)


def _rest(
    store: Store, ranks: Sequence[Mapping[str, Any]], trained: set[str]
) -> dict[str, Lazy]:
    """Buffers, and weights that were frozen: whole, or a run from each rank."""
    first = ranks[0]
    known = {*trained, *(first.get("shared_params") or ())}
    whole = {n: t for n, t in (first.get("module") or {}).items() if n not in known}
    buffers = first.get("buffer_names") or ()
    # stage 3 leaves an empty tensor in place of a weight
    found = {n: held(t) for n, t in whole.items() if t.numel() or n in buffers}
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        runs = [rank["frozen_param_fragments"][name].reshape(-1) for rank in ranks]
        total = math.prod(shape)
        flat = torch.cat(runs)[:total]
        if flat.numel() != total:
            raise DamagedError(
                f"{store.url} wants {total} elements of {name}, got {flat.numel()}; a "
                "rank's file is missing"
            )
        found[name] = held(flat.view(tuple(shape)))
    return found


def _optim(zero: Store, shapes: Sequence[Mapping[str, Ints]]) -> Optim:
    """Groups by name, moments unread, and the count of updates."""
    common = _loaded(zero, COMMON)
    groups = common.get("param_groups")
    if not isinstance(groups, list) or len(groups) != len(shapes):
        raise DamagedError(
            f"{zero.url}/{COMMON} wants {len(shapes)} groups, got {str(groups)[:80]}; "
            "convert it anew"
        )
    named = [
        {**options, "params": list(group)}
        for options, group in zip(groups, shapes, strict=True)
    ]
    shared = _shared(common)
    state: dict[str, dict[str, Any]] = {}
    for group in shapes:
        for name, shape in group.items():
            folder = storage.inside(zero, name)
            words: dict[str, Any] = dict(shared)
            for file in sorted(storage.sizes(folder)):
                if file == STEP:
                    words["step"] = torch_load(folder, file)
                elif file != WEIGHT:
                    words[file.removesuffix(".pt")] = _part(zero, name, file, shape)
            state[name] = words
    return Optim(f"{ZERO}/{COMMON}", named, state)


def _shared(common: Mapping[str, Any]) -> dict[str, Any]:
    """Counts that stage 3 keeps beside the weights, one for all."""
    inner = (common.get("optimizer_state_dict") or {}).get("state") or {}
    words = next(iter(inner.values()), {})
    return {
        key: value
        for key, value in words.items()
        if not isinstance(value, Tensor) or not value.dim()
    }
