"""torch's backward pass without the questions that come before it."""

# Private names are what this file is for.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary


def backward_of(roots: tuple[Tensor, ...], seeds: tuple[Tensor | None, ...]) -> None:
    """`torch.autograd.backward(roots, seeds)` of real scalars with a gradient.

    Each seed is of its root's dtype and device. To ask so again takes torch 3 us, and
    9 where caches are cold (2.13), of a step of 230. A subclass, a mode and a transform
    of functions get torch's own.
    """
    first = roots[0]
    odd = type(first) is not Tensor or has_torch_function_unary(first)
    if odd or torch._C._are_functorch_transforms_active():
        torch.autograd.backward(roots, seeds)
        return
    torch.autograd.graph._engine_run_backward(
        roots, seeds, False, False, (), allow_unreachable=True, accumulate_grad=True
    )
