"""The engine of one process: nothing to reduce. Others are this one, varied."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from accelx import _torch
from accelx._torch_backward import backward_of
from accelx.records import Engine

if TYPE_CHECKING:
    from torch import Tensor

    from accelx.state import State


def backward(
    state: State,
    loss: Tensor,
    scale: float,
    leaf: Tensor | None = None,
    value: Tensor | None = None,
) -> None:
    """Add `scale` times the gradient of the scalar `loss` to the parameters'.

    And `value` to the gradient of `leaf`, in the same pass.
    """
    if leaf is not None:
        wide = loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss
        backward_of((wide, leaf), (torch.full_like(wide, scale), value))
        return
    if scale == 1.0:
        backward_of((loss,), (torch.ones_like(loss),))
        return
    if loss.dtype in (torch.float16, torch.bfloat16):
        loss = loss.float()  # a seed such as 1/3 or 65536 has no exact half
    backward_of((loss,), (torch.full_like(loss, scale),))


def gradients(state: State) -> list[Tensor]:
    """Gradients of the model, of parameters that have one."""
    return [p.grad for _, p in state.trained if p.grad is not None]


def settle(state: State, scale: Tensor | float) -> None:
    """Multiply the gradients by `scale`."""
    if isinstance(scale, float) and scale == 1.0:
        return
    grads = gradients(state)
    if grads:
        _torch.scale_(grads, scale)


def update(state: State) -> None:
    """Step the optimizers, then let go of the gradients."""
    for optimizer in state.optimizers:
        optimizer.step()
    # as zero_grad does, which takes 15 us: optimizers hold every trained parameter
    for _, p in state.trained:
        p.grad = None


def clip(state: State, limit: float | None) -> Tensor:
    """The gradients' global 2-norm, (); scales them to `limit` where they exceed it."""
    grads = gradients(state)
    return limited(grads, total(grads), limit)


def total(grads: list[Tensor]) -> Tensor:
    """The 2-norm over all of `grads`, ()."""
    if not grads:
        return torch.zeros(())
    each = _torch.norms(grads)
    return torch.linalg.vector_norm(torch.stack([n.to(each[0].device) for n in each]))


def limited(grads: list[Tensor], norm: Tensor, limit: float | None) -> Tensor:
    """Scale `grads`, whose norm is `norm`, to `limit` where it is beyond; the norm."""
    if limit is not None and grads:
        _torch.scale_(grads, shrink(norm, limit))
    return norm


def shrink(norm: Tensor, limit: float) -> Tensor:
    """What gradients of that norm are multiplied by to have `limit` at most, ()."""
    # as torch.nn.utils.clip_grad_norm_ does, so that the numbers are its numbers
    return torch.clamp(limit / (norm + 1e-6), max=1.0)


def quiet(state: State) -> AbstractContextManager[None]:
    """Nothing to keep quiet."""
    return nullcontext()


ENGINE = Engine("plain", backward, settle, update, clip, quiet)
