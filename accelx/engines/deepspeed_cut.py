"""How ZeRO's third stage cuts a model weight by weight: no rank holds it whole.

Between the cut and the optimizers weights look as they did, in shape and dtype, and
hold NaN: what an optimizer is made of is their form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from accelx import dtypes
from accelx.engines import copies, deepspeed_config as configs, deepspeed_open, placed
from accelx.engines.placed import Plan

Full = Callable[[Tensor], Tensor]  # a tensor with its data, which it may have let go of


def cut(model: nn.Module, plan: Plan, full: Full) -> None:
    """Replace each weight by this rank's slice of rank 0's, buffers by rank 0's own.

    Numbers that a later pass overwrites are not made. Peak memory is the slices and
    the largest weight, beside what `full` takes. Effects: collectives, in place.
    """
    device = plan.env.device
    blank = _solid(model, device) | placed.filled(model, plan.blank)
    for buffer in model.buffers():
        buffer.data = full(buffer).to(device)
        copies.from_main(buffer, device)
    dtypes.cast_buffers(model, plan.precision)
    with deepspeed_open.slicing(plan.env, configs.slicing(plan.options)) as slice_:
        for weight in model.parameters():
            form = tuple(weight.shape)
            if plan.env.main and id(weight) not in blank:
                weight.data = full(weight).to(device).contiguous()
            else:
                weight.data = torch.empty(form, dtype=weight.dtype, device=device)
            dtypes.cast(nn.ParameterList([weight]), plan.precision)
            slice_(weight)
            weight.data = _outline(weight, form, device)


def _solid(model: nn.Module, device: str) -> set[int]:
    """Take all from the meta device, ties kept; the ids of what has no numbers."""
    made: dict[int, Any] = {}
    for name, tensor in copies.tensors(model):
        if tensor.is_meta:
            if id(tensor) not in made:
                made[id(tensor)] = _unset(tensor, device)
            copies.put(model, name, made[id(tensor)])
    return {id(tensor) for tensor in made.values()}


def _unset(tensor: Tensor, device: str) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return copies.unset(tensor, device)
    outline = _outline(tensor, tensor.shape, device)
    return nn.Parameter(outline, tensor.requires_grad)


def _outline(like: Tensor, shape: Any, device: str) -> Tensor:
    """What has the form of a weight in the memory of one number, which is none."""
    number = float("nan") if like.is_floating_point() or like.is_complex() else 0
    return torch.full((), number, dtype=like.dtype, device=device).expand(shape)


def bare(model: nn.Module) -> None:
    """Leave of each weight its slice, as DeepSpeed expects it."""
    for weight in model.parameters():
        weight.data = torch.empty(0, dtype=weight.dtype, device=weight.device)


def whole(model: nn.Module) -> None:
    """Give each rank all weights of a model that was cut. A collective."""
    bare(model)
    for weight in model.parameters():
        one: Any = weight
        one.all_gather([one])
        one.ds_tensor = None
