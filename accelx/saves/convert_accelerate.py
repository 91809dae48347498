"""Which file of Accelerate's save_state is what, and which ones are not opened."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from accelx import storage
from accelx.errors import CheckpointError, DamagedError
from accelx.saves.convert_dcp import OTHER, native, optim_of
from accelx.saves.convert_source import Optim, Source, held, safetensors, torch_load
from accelx.storage import Store

MODEL, OPTIM = "pytorch_model_fsdp_0", "optimizer_0"  # folders of DCP
WHOLE = ("model.safetensors", "pytorch_model.bin", "pytorch_model_fsdp.bin")
SCALER = "scaler.pt"
OURS = re.compile(
    r"(optimizer|scheduler|sampler|pytorch_model_fsdp)(_\d+)?(\.bin)?"
    r"|pytorch_model\.bin(\.index\.json)?|random_states_\d+\.pkl|scaler\.pt"
)
LEFT = {  # file -> why it is left out; none of them is opened
    r"random_states_\d+\.pkl": "random streams of a rank, for an order of data that is "
    "not accelx's; write ax.seed(env, seed)",
    r"sampler(_\d+)?\.bin|dl_state_dict(_\d+)?\.bin": "accelx's loader goes on by the "
    "number of updates; write ax.feed(tx, loader, start=state)",
    r"custom_checkpoint_\d+\.pkl": "an object of yours, by pickle; load it by hand and "
    "keep it in a slot: ax.with_slot",
    r"(pytorch_)?model(_fsdp)?_[1-9]\d*(\.\w+)?": "a second model; a state has one",
}


def is_accelerate(names: Mapping[str, Any]) -> bool:
    """Whether a folder with these files is one of `Accelerator.save_state`."""
    return any(OURS.fullmatch(name) for name in names)


def read_accelerate(store: Store, trust: bool) -> Source:
    """The checkpoint that save_state wrote. Only what is carried over is opened."""
    sizes = storage.sizes(store)
    model, used = _model(store, sizes, trust)
    optims = list(_optims(store, sizes, trust))
    schedules = {n: _state(store, n) for n in _numbered("scheduler", sizes)}
    scaler = _state(store, SCALER) if SCALER in sizes else None
    used |= {SCALER, OPTIM, *schedules, *(optim.where for optim in optims)}
    left = tuple((n, _why(n)) for n in sorted(sizes) if n not in used)
    return Source(model, optims, schedules, scaler, left)


def _why(name: str) -> str:
    return next((why for form, why in LEFT.items() if re.fullmatch(form, name)), OTHER)


def _numbered(stem: str, sizes: Mapping[str, Any]) -> list[str]:
    """stem.bin, stem_1.bin and so on, by number."""
    found = {
        int(match[1] or 0): name
        for name in sizes
        if (match := re.fullmatch(rf"{stem}(?:_(\d+))?\.bin", name))
    }
    return [found[number] for number in sorted(found)]


def _model(
    store: Store, sizes: Mapping[str, Any], trust: bool
) -> tuple[dict[str, Any], set[str]]:
    """The tensors of the first model, and the files that they are in."""
    if MODEL in sizes:
        return native(storage.inside(store, MODEL), trust).under("model"), {MODEL}
    for name in WHOLE:
        if name in sizes:
            return dict(_in(store, name)), {name}
        index = f"{name}.index.json"
        if index in sizes:
            return _sharded(store, index, sizes)
    raise CheckpointError(
        f"{store.url} wants a model in one of {', '.join(WHOLE)} or {MODEL}, got "
        f"{', '.join(sorted(sizes)) or 'nothing'}; of DeepSpeed, write "
        "zero_to_fp32.py first; of FSDP, save SHARDED_STATE_DICT or FULL_STATE_DICT"
    )


def _in(store: Store, name: str) -> Iterator[tuple[str, Any]]:
    if name.endswith(".safetensors"):
        yield from ((b.name, b.lazy) for b in safetensors(store, name))
        return
    for key, value in _state(store, name).items():
        yield key, held(value) if hasattr(value, "dtype") else value


def _sharded(
    store: Store, index: str, sizes: Mapping[str, Any]
) -> tuple[dict[str, Any], set[str]]:
    what = f"{store.url}/{index}"
    try:
        where = json.loads(storage.read(store, index, sizes[index]))["weight_map"]
        files = sorted(set(where.values()))
        absent = [file for file in files if file not in sizes]
        found = {} if absent else {k: v for f in files for k, v in _in(store, f)}
        absent += [name for name in where if name not in found][:5]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{what} wants a weight_map, got {error}") from None
    if absent:
        raise DamagedError(
            f"{what} wants {', '.join(absent[:5])}, got nothing; a file is missing: "
            "take another checkpoint"
        )
    return found, {index, *files}


def _optims(store: Store, sizes: Mapping[str, Any], trust: bool) -> Iterator[Optim]:
    if OPTIM in sizes and sizes[OPTIM] is None:
        leaves = native(storage.inside(store, OPTIM), trust)
        yield optim_of(OPTIM, leaves.under("optimizer"))
    for name in _numbered("optimizer", sizes):
        raw = _state(store, name)
        groups, state = raw.get("param_groups"), raw.get("state")
        if not (
            isinstance(groups, list)
            and isinstance(state, dict)
            and all(isinstance(words, dict) for words in state.values())
            and all(isinstance(g, dict) and _listed(g.get("params")) for g in groups)
        ):
            raise CheckpointError(
                f"{store.url}/{name} wants an optimizer's state_dict, got "
                f"{str(raw)[:80]}; accelx knows no other form"
            )
        yield Optim(name, groups, state)


def _listed(names: Any) -> bool:
    """Whether these are parameters: names or positions."""
    return isinstance(names, list) and all(type(n) in (int, str) for n in names)


def _state(store: Store, name: str) -> dict[str, Any]:
    """What a state_dict() was, from its file."""
    raw = torch_load(store, name)
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{store.url}/{name} wants to hold a state_dict, got "
            f"{type(raw).__name__}; accelx knows no other form"
        )
    return raw
