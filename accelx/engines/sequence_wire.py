"""How keys, values and heads cross between the ranks of one sequence, with gradients.

Backward collectives mirror those of forward, in the order of one and the same graph.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from accelx.comm_wire import dist, group
from accelx.engines.sequence import Layout
from accelx.records import Env


class _Gather(torch.autograd.Function):
    """Every rank's tensor, stacked; backward adds up what ranks say of each."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, env: Env) -> Tensor:
        ctx.env = env
        own = own.contiguous()
        pieces = own.new_empty((env.world, *own.shape))
        dist().all_gather(list(pieces.unbind(0)), own, group=group(env, "gather"))
        return pieces

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        told = _swapped(grads[0], ctx.env)
        half = told.dtype in (torch.float16, torch.bfloat16)
        wide = torch.float32 if half else told.dtype
        return told.sum(0, dtype=wide).to(told.dtype), None


class _Swap(torch.autograd.Function):
    """Piece i goes to rank i, which finds it at this rank's number."""

    @staticmethod
    def forward(ctx: Any, pieces: Tensor, env: Env) -> Tensor:
        ctx.env = env
        return _swapped(pieces, env)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _swapped(grads[0], ctx.env), None


def _swapped(pieces: Tensor, env: Env) -> Tensor:
    pieces = pieces.contiguous()
    made = torch.empty_like(pieces)
    dist().all_to_all_single(made, pieces, group=group(env, "all_to_all"))
    return made


def gathered(env: Env, layout: Layout, own: Tensor, dim: int) -> Tensor:
    """The whole sequence along `dim`, on each rank."""
    pieces = cast("Tensor", _Gather.apply(own, env))
    return layout.whole(pieces.unbind(0), dim)


def gathered_pair(
    env: Env, layout: Layout, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values (..., here, size) of the whole sequence, in one collective."""
    both = gathered(env, layout, torch.cat((keys, values), -1), -2)
    sizes = (keys.size(-1), values.size(-1))
    one, other = both.split(sizes, -1)
    return one, other


def to_heads(env: Env, each: tuple[Tensor, ...]) -> list[Tensor]:
    """(B, heads, here, size) -> (B, heads / world, length, size): in one collective."""
    world = env.world
    cut = [x.unflatten(1, (world, -1)).movedim(1, 0) for x in each]
    flat = torch.cat([x.reshape(world, -1) for x in cut], 1)
    moved = cast("Tensor", _Swap.apply(flat, env))
    pieces = moved.split([x[0].numel() for x in cut], 1)
    return [
        piece.view(x.shape).movedim(0, 2).flatten(2, 3)
        for piece, x in zip(pieces, cut, strict=True)
    ]


def to_tokens(env: Env, made: Tensor) -> Tensor:
    """(B, heads / world, length, size) -> (B, heads, here, size)."""
    cut = made.unflatten(2, (env.world, -1)).movedim(2, 0)
    moved = cast("Tensor", _Swap.apply(cut, env))
    return moved.movedim(0, 1).flatten(1, 2)
