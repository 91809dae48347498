"""How a checkpoint of another tool becomes one of accelx's, and what stays behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import nn

from accelx import storage
from accelx.errors import CheckpointError
from accelx.saves.convert_accelerate import is_accelerate, read_accelerate
from accelx.saves.convert_dcp import METADATA, Keys, read_dcp, read_safetensors
from accelx.saves.convert_deepspeed import is_deepspeed, read_deepspeed
from accelx.saves.convert_source import Source
from accelx.saves.convert_state import put_together
from accelx.saves.convert_write import write
from accelx.saves.load import Only
from accelx.storage import Store


@attrs.frozen
class Imported:
    """What `import_state` wrote, and what it left behind."""

    url: str  # of the checkpoint
    step: int  # updates made
    tensors: int
    left_out: tuple[tuple[str, str], ...]  # (file or key, why)


def import_state(
    source: str,
    out: str,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    optim: Callable[[Any], Any] | None = None,
    *,
    keys: Keys | None = None,
    only: Only = None,
    step: int | None = None,
    trust: bool = False,
) -> Imported:
    """Write the checkpoint of another tool in the folder `source` under `out`.

    `source` and `out` are paths or fsspec URLs. The folder is one of `dcp.save`, of
    safetensors files (HuggingFaceStorageWriter, save_pretrained), of Accelerate's
    save_state, or a universal checkpoint of DeepSpeed. `load_state(env, out)` then
    reads it on any engine and ranks.

    model, optim: as for `init`; a function is called on the meta device. Both are
    needed where there is an optimizer, since files do not name its class, nor always
    its parameters; `model` also says which weights are tied. keys: where
    `dcp.save({...})` had them, as {"model": "net", "optim": "opt", "scheduler": "s"}.
    only: as in load_state, to import a part. step: updates made, where no optimizer
    counts them. trust: a `.metadata` of DCP is a pickle, and is opened on your word
    only; nothing but the names that DCP writes is allowed in it, and every other
    pickle is read by torch.load(weights_only=True).

    Holds one tensor, or up to 512 MiB of them, in memory. Runs in one process: import
    before the run, or on one rank while the others wait at a barrier. Raises
    CheckpointError, before anything is written, where something does not fit.
    Effects: reads `source`, writes under `out`.
    """
    _step(step)
    store = storage.at(source)
    found = _opened(store, keys, trust)
    module, optimizers = _made(model, optim)
    made = put_together(found, module, optimizers, only, step)
    if not made.tensors:
        raise CheckpointError(
            f"import_state wants something of {store.url} to import, but "
            f"only={only!r} takes nothing that is there; leave only= out"
        )
    count = made.values["step"]
    url = write(storage.at(out), made.tensors, made.values, made.aliases)
    return Imported(url, count, len(made.tensors), tuple(made.left_out))


def _step(step: Any) -> None:
    if step is not None and (type(step) is not int or step < 0):
        raise ValueError(
            f"import_state(step=...) wants the number of updates made, got {step!r}; "
            "write step=1000"
        )


def _opened(store: Store, keys: Keys | None, trust: bool) -> Source:
    names = storage.sizes(store)
    if METADATA in names:
        return read_dcp(store, trust, keys)
    if is_deepspeed(names):
        _keyless(store, keys, "DeepSpeed")
        return read_deepspeed(store)
    if is_accelerate(names):
        _keyless(store, keys, "Accelerate")
        return read_accelerate(store, trust)
    if any(name.endswith(".safetensors") for name in names):
        return read_safetensors(store, keys)
    raise CheckpointError(
        f"{store.url} wants to be a folder of dcp.save, of safetensors files, of "
        f"Accelerate's save_state or of DeepSpeed, got "
        f"{', '.join(sorted(names)[:8]) or 'nothing'}; write the folder that one of "
        "them was given"
    )


def _keyless(store: Store, keys: Keys | None, of: str) -> None:
    if keys is not None:
        raise CheckpointError(
            f"{store.url} is of {of}, whose files have names of their own, so "
            f"keys={dict(keys)!r} has no use; leave it out"
        )


def _made(model: Any, optim: Any) -> tuple[nn.Module | None, tuple[Any, ...]]:
    if model is not None and not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = model()
    if optim is None:
        return model, ()
    if model is None or not callable(optim):
        raise CheckpointError(
            f"import_state wants optim= to be a function of model=, got {optim!r} and "
            f"model={model!r}; write both as for ax.init: "
            "import_state(..., make_model, lambda m: AdamW(m.parameters()))"
        )
    made = optim(model)
    optimizers = tuple(made) if isinstance(made, list | tuple) else (made,)
    for one in optimizers:
        if not isinstance(one, torch.optim.Optimizer):
            raise CheckpointError(
                f"import_state wants optim= to make torch optimizers, got {one!r:.80}; "
                "write lambda m: AdamW(m.parameters())"
            )
    return model, optimizers
