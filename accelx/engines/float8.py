"""Products of Linears in 8-bit floats, by torchao, and where they can be had.

Each row is scaled by itself, and gradients of weights stay in 16 bits (torchao's recipe
"rowwise_with_gw_hp"): what a row becomes does not depend on the rows beside it, so the
number of ranks and of microbatches changes no number.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import attrs
import torch
from torch import nn

from accelx.engines.forwards import wrap
from accelx.errors import MissingExtraError, PrecisionError
from accelx.records import Precision
from accelx.state import Transient

RECIPE = "rowwise_with_gw_hp"
STEP = 16  # both dimensions of a weight are multiples of it, for the hardware
CUDA = (8, 9)  # Ada; Hopper is (9, 0)
AMD = ("gfx940", "gfx941", "gfx942", "gfx950")  # MI300, MI350
PLACED = ("ddp", "fsdp2", "hsdp")


@attrs.frozen(eq=False)
class Float8(Transient):
    """The slot "with_precision" of fp8: which Linears it is of, and why not others."""

    names: tuple[str, ...]
    left: dict[str, str]


def check(wanted: Precision | None, device: str, kind: str | None = None) -> None:
    """Refuse fp8 where it cannot be had, before a model is made.

    Raises PrecisionError, MissingExtraError.
    """
    if wanted is None or wanted.compute != "fp8":
        return
    if kind is not None and kind not in PLACED:
        raise PrecisionError(
            f"fp8 is had with shard_model of {', '.join(map(repr, PLACED))}, got "
            f'"{kind}"; write shard_model(env, "fsdp2"), or with_precision("bf16")'
        )
    why = lacking(device.partition(":")[0], *_asked(device))
    if why is not None:
        raise PrecisionError(
            f"fp8 wants a GPU of compute capability 8.9 or more, or an MI300, but "
            f'{why}; write with_precision("bf16")'
        )
    _torchao()


def lacking(kind: str, capability: tuple[int, int], amd: str) -> str | None:
    """Why a device has no products in 8-bit floats; None where it has."""
    if kind != "cuda":
        return f'this rank\'s device is "{kind}"'
    if amd:
        arch = amd.partition(":")[0]
        return None if arch in AMD else f"this one is {arch}"
    major, minor = capability
    return None if capability >= CUDA else f"this one is of {major}.{minor}"


def _asked(device: str) -> tuple[tuple[int, int], str]:
    """Compute capability, and the architecture's name where it is one of AMD."""
    if not device.startswith("cuda"):
        return (0, 0), ""
    found = torch.cuda.get_device_properties(device)
    amd = str(getattr(found, "gcnArchName", "")) if torch.version.hip else ""
    return (found.major, found.minor), amd


def convert(model: nn.Module, emulate: bool = False) -> Float8:
    """Have the Linears of `model` multiply in 8-bit floats, in place.

    Object, class and names stay (L8). `emulate` rounds to 8 bits and multiplies floats:
    for tests on devices without such products.
    """
    done, ao = _chosen(model), _torchao()
    config = ao.Float8LinearConfig.from_recipe_name(RECIPE)
    config = dataclasses.replace(config, emulate=emulate)
    some = nn.Linear(STEP, STEP, device="meta")  # draws no random numbers
    made = ao.convert_to_float8_training(some, config=config)
    around = functools.partial(_multiplying, made)
    wrap(model, lambda name, _: name in done.names, "with_precision", around)
    return done


class _Whole:
    """What the forward of torchao's Linear reads of it, with the weight in 16 bits.

    Under fsdp2 it comes in 16 bits, so elsewhere too: rounded twice, it is another.
    """

    def __init__(self, module: Any, made: Any, weight: Any) -> None:
        self.weight, self.bias = weight, module.bias
        self.config, self.linear_mm_config = made.config, made.linear_mm_config


def _multiplying(made: Any, inner: Any) -> Any:
    theirs = type(made).forward

    def forward(self: Any, input: Any) -> Any:
        weight, kind = self.weight, input.device.type
        if torch.is_autocast_enabled(kind):
            short = torch.get_autocast_dtype(kind)
            weight, input = weight.to(short), input.to(short)
        return theirs(_Whole(self, made, weight), input)

    return forward


def _chosen(model: nn.Module) -> Float8:
    linears = {n: m for n, m in model.named_modules() if n and isinstance(m, nn.Linear)}
    last = next(reversed(linears), "")
    left = {n: why for n, m in linears.items() if (why := _why_not(m, n == last))}
    names = tuple(n for n in linears if n not in left)
    if not names:
        told = "; ".join(f"{n} {why}" for n, why in list(left.items())[:5])
        raise PrecisionError(
            f"fp8 wants at least one torch.nn.Linear to multiply in 8 bits, but of "
            f"this {type(model).__name__} {told or 'has none'}; write "
            'with_precision("bf16")'
        )
    return Float8(names, left)


def _why_not(module: Any, last: bool) -> str:
    """Why a Linear stays in 16 bits; empty where it does not."""
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, which may compute otherwise"
    if not module.weight.is_floating_point():
        return f"has weights of {module.weight.dtype}"
    if module.in_features % STEP or module.out_features % STEP:
        shape = module.out_features, module.in_features
        return f"is {shape}, which {STEP} does not divide"
    return "is the last, whose rounding would reach the loss" if last else ""


def _torchao() -> Any:
    try:
        from torchao import float8
    except ImportError as error:
        raise MissingExtraError(
            "fp8 wants torchao, which is not installed; write pip install "
            "'accelx[quant]'"
        ) from error
    return float8
