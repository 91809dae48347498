"""What a Precision means in torch's own dtypes, and whether it was obtained."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import nn

from accelx.errors import PrecisionError
from accelx.records import Precision

NAMES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
PRESETS = {
    "fp32": Precision(param="fp32", compute="fp32"),
    "bf16": Precision(param="fp32", compute="bf16", reduce="fp32"),
    "fp16": Precision(param="fp32", compute="fp16", reduce="fp32"),
    "fp8": Precision(param="fp32", compute="fp8", reduce="fp32"),
}
AROUND = {"fp8": torch.bfloat16}  # of all but the products that are made in it


def precision(wanted: object) -> Precision:
    """The Precision that a preset's name means. Raises PrecisionError."""
    if isinstance(wanted, str) and wanted in PRESETS:
        return PRESETS[wanted]
    if isinstance(wanted, Precision):
        names = {a.name: _name(a.name, getattr(wanted, a.name)) for a in _fields()}
        return Precision(**names)
    near = next((p for p in PRESETS if _means(wanted, p)), "bf16")
    raise PrecisionError(
        f"with_precision wants one of {', '.join(map(repr, PRESETS))} or a "
        f'Precision(...), got {wanted!r}; write with_precision("{near}")'
    )


def _means(wanted: object, preset: str) -> bool:
    """Whether `wanted` is another word for `preset`: "float16", "16-mixed"."""
    text, bits = str(wanted).lower().replace("half", "fp16"), preset[2:]
    return bits in text and ("b" in text.removeprefix("torch.")) == (preset == "bf16")


def _fields() -> Any:
    return attrs.fields(Precision)


def _name(field: str, value: object) -> str | None:
    if value is None or value in NAMES or (field == "compute" and value in AROUND):
        return value  # type: ignore[return-value]
    for name, dtype in NAMES.items():
        if value in (dtype, str(dtype).removeprefix("torch.")):
            return name
    raise PrecisionError(
        f"Precision({field}=...) wants one of {', '.join(map(repr, NAMES))} or None, "
        f"got {value!r}; write Precision({field}='bf16')"
    )


def dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype of a name of ours; None stays None."""
    return None if name is None else AROUND.get(name) or NAMES[name]


def cast(model: nn.Module, wanted: Precision | None) -> None:
    """Give trainable weights and floating buffers their dtypes, in place.

    Frozen weights stay as they are: nothing is gained by making them larger.
    """
    if wanted is None:
        return
    param = dtype(wanted.param)
    for p in model.parameters():
        if param and p.requires_grad and p.is_floating_point() and p.dtype != param:
            p.data = p.data.to(param)
    cast_buffers(model, wanted)


def cast_buffers(model: nn.Module, wanted: Precision | None) -> None:
    """Give floating buffers their dtype, in place."""
    buffer = None if wanted is None else dtype(wanted.buffer)
    for b in model.buffers():
        if buffer and b.is_floating_point() and b.dtype != buffer:
            b.data = b.data.to(buffer)


def read_back(model: nn.Module, wanted: Precision) -> None:
    """Raise PrecisionError, with names, where real dtypes are not the wanted ones."""
    param, buffer = dtype(wanted.param), dtype(wanted.buffer)
    wrong = [
        f"{n} is {p.dtype}"
        for n, p in model.named_parameters()
        if param and p.requires_grad and p.is_floating_point() and p.dtype != param
    ]
    wrong += [
        f"buffer {n} is {b.dtype}"
        for n, b in model.named_buffers()
        if buffer and b.is_floating_point() and b.dtype != buffer
    ]
    if wrong:
        raise PrecisionError(
            f"{wanted!r} was asked for, but after placing {'; '.join(wrong[:5])}"
            f"{' and more' if len(wrong) > 5 else ''}; let ax.init place the model, "
            "and change no dtype afterwards"
        )
