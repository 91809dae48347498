"""Gradients of what ranks have gathered go back to the rank that brought it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

Add = Callable[["Tensor"], "Tensor"]


class _Gathered(torch.autograd.Function):
    """What was gathered; backward adds up what ranks say of it."""

    @staticmethod
    def forward(
        ctx: Any, whole: list[Tensor], starts: list[int], add: Add, *own: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.add, ctx.starts, ctx.shapes = add, starts, [one.shape for one in own]
        return tuple(whole)

    @staticmethod
    @once_differentiable  # of backward itself no derivative is known
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[reportIncompatibleMethodOverride]
        cut = [
            ctx.add(grad).narrow(0, start, shape[0] if shape else 1).reshape(shape)
            for grad, start, shape in zip(grads, ctx.starts, ctx.shapes, strict=True)
        ]
        return None, None, None, *cut


def carried(
    whole: Sequence[Tensor], starts: Sequence[int], add: Add, own: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """`whole`, tensors of the rows of all ranks, with gradients for `own`.

    Own rows begin at `starts`. `add` takes a gradient and gives its sum over ranks.
    """
    args = list(whole), list(starts), add, *own
    return cast("tuple[Tensor, ...]", _Gathered.apply(*args))
