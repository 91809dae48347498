"""Keys and values go round the ranks of a sequence; no rank ever holds all of them.

Each block's attention comes with its normaliser, by which blocks are put together.
Liu et al. 2023 (arXiv:2310.01889); the order of work is that of Zhu's zigzag.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, cast

import torch
from torch import Tensor

from accelx import _torch_attention
from accelx.comm_wire import dist, group
from accelx.records import Env

EVERY = slice(None)
Pair = tuple[Tensor, Tensor]


def around(
    env: Env, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: Any
) -> Tensor:
    """Attention of this rank's queries to all keys: (B, heads, here, size).

    Every rank holds its chunks in zigzag order; `key` may have fewer heads.
    """
    return cast("Tensor", _Ring.apply(query, key, value, env, causal, scale))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        env: Env,
        causal: bool,
        scale: Any,
    ) -> Tensor:
        out, norm = torch.zeros_like(query, dtype=_wide(query)), None
        for step, (keys, values) in enumerate(_passed(env, (key, value))):
            rows, seen = _block(env, step, query.size(2) // 2, causal)
            k, v = (_per_query(x[:, :, seen], query) for x in (keys, values))
            mine = query[:, :, rows]
            part, own = _torch_attention.flash(mine, k, v, causal and not step, scale)
            norm = torch.full_like(own, -torch.inf) if norm is None else norm
            _join(out[:, :, rows], norm[:, :, rows], part, own)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, norm)
        ctx.env, ctx.causal, ctx.scale = env, causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, key, value, out, norm = ctx.saved_tensors
        env, causal = ctx.env, ctx.causal
        made = torch.zeros_like(query, dtype=_wide(query))
        told = [torch.zeros_like(x, dtype=made.dtype) for x in (key, value)]
        for step, (keys, values) in enumerate(_passed(env, (key, value))):
            rows, seen = _block(env, step, query.size(2) // 2, causal)
            k, v = (_per_query(x[:, :, seen], query) for x in (keys, values))
            up, q, o, n = (x[:, :, rows] for x in (grads[0], query, out, norm))
            own = causal and not step
            parts = _torch_attention.flash_backward(up, q, o, n, k, v, own, ctx.scale)
            made[:, :, rows] += parts[0]
            for sums, part in zip(told, parts[1:], strict=True):
                heads = (sums.size(1), -1)
                sums[:, :, seen] += part.unflatten(1, heads).sum(2, dtype=sums.dtype)
            told = list(_sent(env, told))  # what is told of keys follows them home
        first, second = (x.to(key.dtype) for x in told)
        return made.to(query.dtype), first, second, None, None, None


def _block(env: Env, step: int, half: int, causal: bool) -> tuple[slice, slice]:
    """Which queries look at which of the keys that came `step` ranks far.

    Of a rank before this one, the earlier chunk is seen by all queries and the later
    by none; of a rank behind it, both are seen by the later chunk of queries alone.
    """
    if not causal or not step:
        return EVERY, EVERY
    behind = step > env.rank
    return (slice(half, None), EVERY) if behind else (EVERY, slice(0, half))


def _per_query(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values with as many heads as queries have."""
    return x.repeat_interleave(query.size(1) // x.size(1), 1)


def _join(out: Tensor, norm: Tensor, part: Tensor, own: Tensor) -> None:
    """Add to attention `out`, of log normaliser `norm`, that of some more keys."""
    both = torch.logaddexp(norm, own)
    out.mul_((norm - both).exp()[..., None])
    out.add_(part * (own - both).exp()[..., None])
    norm.copy_(both)


def _wide(x: Tensor) -> torch.dtype:
    half = x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half else x.dtype


def _passed(env: Env, pair: Pair) -> Generator[Pair]:
    """This rank's pair, and then those of the ranks before it, one by one.

    The next one is on its way while one is worked on.
    """
    for step in range(env.world):
        last = step == env.world - 1
        waits, made = ([], pair) if last else _start(env, list(pair))
        yield pair
        for wait in waits:
            wait.wait()
        pair = cast("Pair", tuple(made))


def _sent(env: Env, tensors: list[Tensor]) -> list[Tensor]:
    """What the rank before this one has, for what this one has to the next."""
    waits, made = _start(env, tensors)
    for wait in waits:
        wait.wait()
    return made


def _start(env: Env, tensors: list[Tensor]) -> tuple[list[Any], list[Tensor]]:
    ours = group(env, "ring")
    after, before = (
        dist().get_global_rank(ours, (env.rank + way) % env.world) for way in (1, -1)
    )
    kept = [x.contiguous() for x in tensors]
    made = [torch.empty_like(x) for x in kept]
    op = dist().P2POp
    each = [op(dist().isend, x, after, ours) for x in kept]
    each += [op(dist().irecv, x, before, ours) for x in made]
    return dist().batch_isend_irecv(each), made
