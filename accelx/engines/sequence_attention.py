"""Attention of this rank's tokens to all tokens of their rows, exact to rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from accelx import _torch_attention, _torch_stages
from accelx.engines.sequence import Site
from accelx.engines.sequence_ring import around
from accelx.engines.sequence_wire import gathered, gathered_pair, to_heads, to_tokens
from accelx.errors import LossError

# dtypes that scaled_dot_product_attention itself refuses: if such a mask is ever seen
# by it, that is an error and not another result
LOOKING_BACK, NO_MASK = torch.uint8, torch.int8


def attend(
    site: Site,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What scaled_dot_product_attention gives these queries in the whole sequence.

    query (B, heads, here, size) and the like hold this rank's tokens. A mask is
    (..., 1, here), of keys, or (..., here or length, length). One of LOOKING_BACK is of
    keys, and a token looks at no later one; NO_MASK says the latter alone.
    """
    if _torch_stages.is_fake(query):  # of another stage, or of a run on shapes
        site.attended = True
        return _cast(query).new_empty((*query.shape[:-1], value.size(-1)))
    _refuse(site, query, key, attn_mask, dropout_p, is_causal)
    groups = getattr(attn_mask, "_accelx_groups", 1)
    if groups > 1 and key.size(1) == query.size(1):
        key, value, enable_gqa = key[:, ::groups], value[:, ::groups], True
    if attn_mask is not None and attn_mask.dtype in (LOOKING_BACK, NO_MASK):
        is_causal = True
        attn_mask = None if attn_mask.dtype == NO_MASK else attn_mask.bool()
    query, key, value = (_cast(x) for x in (query, key, value))
    rest: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    site.attended = True
    if site.mode == "ulysses":
        return _by_heads(site, (query, key, value), attn_mask, is_causal, rest)
    if site.mode == "ring":
        return _round(site, query, key, value, attn_mask, is_causal, scale)
    keys, values = gathered_pair(site.env, site.layout, key, value)
    mask = _of_rows(site, attn_mask)
    if not is_causal:
        return F.scaled_dot_product_attention(query, keys, values, mask, **rest)
    return _back(site, query, keys, values, mask, rest)


def _cast(x: Tensor) -> Tensor:
    """As scaled_dot_product_attention casts: ahead of what is sent, which is less."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def repeated(mask: Tensor, groups: int) -> Tensor:
    """The same mask, which says that each head of keys comes `groups` times with it.

    Such keys need not be sent as often.
    """
    mask = mask.view_as(mask)  # a batch's own is not written on
    mask._accelx_groups = groups  # type: ignore[attr-defined]
    return mask


def _back(
    site: Site,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    rest: dict[str, Any],
) -> Tensor:
    """Each chunk of queries with the keys up to its own end, and no others."""
    own = site.layout.chunks(site.layout.rank)
    size = query.size(-2) // len(own)
    made: list[Tensor] = []
    for part, chunk in zip(query.split(size, -2), own, strict=True):
        end = (chunk + 1) * size
        bias = _looking_back(size, end, mask, query.device)
        made.append(
            F.scaled_dot_product_attention(
                part, keys[..., :end, :], values[..., :end, :], bias, **rest
            )
        )
    return torch.cat(made, -2) if len(made) > 1 else made[0]


def _looking_back(size: int, end: int, mask: Tensor | None, device: Any) -> Any:
    """The last `size` of `end` tokens look at those before them, and at themselves."""
    if mask is None:
        return _torch_attention.causal(size, end)  # no mask in memory
    whole = torch.ones(size, end, dtype=torch.bool, device=device)
    return whole.tril(end - size) & mask[..., :end]


def _round(
    site: Site,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """With the keys of one rank after the other, by kernels that take no mask."""
    device = query.device.type
    if mask is not None or device not in ("cpu", "cuda"):
        got = f"a mask {tuple(mask.shape)}" if mask is not None else f"device {device}"
        raise LossError(
            'shard_sequence(mode="ring") wants attention without a mask, but for '
            f'is_causal, on the CPU or CUDA, got {got}; write mode="gather"'
        )
    if device == "cuda" and (query.dtype.itemsize != 2 or query.size(-1) % 8):
        raise LossError(
            'shard_sequence(mode="ring") wants attention in bf16 or fp16, of heads that'
            f" 8 divides, got {query.dtype} and {query.size(-1)}; add "
            'with_precision("bf16"), or write mode="gather"'
        )
    return around(site.env, query, key, value, causal, scale)


def _of_rows(site: Site, mask: Tensor | None) -> Tensor | None:
    """A mask of this rank's queries and all keys, each dimension in full or 1."""
    if mask is None:
        return None
    here = site.here or 0
    if mask.size(-1) == here:
        mask = gathered(site.env, site.layout, mask, -1)
    if mask.dim() > 1 and mask.size(-2) == here * site.layout.world:
        mask = site.layout.take(mask, -2)
    return mask


def _by_heads(
    site: Site,
    each: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    causal: bool,
    rest: dict[str, Any],
) -> Tensor:
    """Trade tokens for heads: a rank computes some heads of the whole sequence."""
    env = site.env
    query, *pair = each
    heads, kept = query.size(1), pair[0].size(1)
    if heads % env.world:
        raise LossError(
            'shard_sequence(mode="ulysses") wants attention heads that divide over '
            f'the {env.world} ranks of a sequence, got {heads}; write mode="gather"'
        )
    if kept % env.world:  # fewer heads of keys than ranks: each query head gets its own
        pair = [x.repeat_interleave(heads // kept, 1) for x in pair]
    queries, keys, values = to_heads(env, (query, *pair))
    mask = _of_heads(site, mask, heads)
    if causal and mask is not None:
        mask = _looking_back(mask.size(-1), mask.size(-1), mask, mask.device)
        causal = False
    made = F.scaled_dot_product_attention(
        queries, keys, values, mask, is_causal=causal, **rest
    )
    return to_tokens(env, made)


def _of_heads(site: Site, mask: Tensor | None, heads: int) -> Tensor | None:
    """A mask of all queries and keys, for this rank's heads."""
    if mask is None:
        return None
    for dim in (-1, -2):
        if mask.dim() >= -dim and mask.size(dim) == site.here:
            mask = gathered(site.env, site.layout, mask, dim)
    if mask.dim() > 2 and mask.size(-3) == heads:
        mask = mask.chunk(site.env.world, -3)[site.env.rank]
    return mask


def _refuse(
    site: Site,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
) -> None:
    here = site.here or 0
    length = here * site.layout.world
    if (query.size(-2), key.size(-2)) != (here, here) or query.dim() != 4:
        raise LossError(
            f"shard_sequence wants attention over this rank's {here} tokens of "
            f"{length}, each (rows, heads, {here}, size), got queries "
            f"{tuple(query.shape)} and keys {tuple(key.shape)}; if this attention "
            "needs no other rank's tokens, vouch for its module: allow="
        )
    if dropout:
        raise LossError(
            f"shard_sequence wants attention without dropout, which ranks of one "
            f"sequence would draw alike, got dropout_p={dropout}; set the model's "
            "attention dropout to 0"
        )
    if mask is None:
        return
    rows, keys = mask.size(-2) if mask.dim() > 1 else 1, mask.size(-1)
    local = keys == here and rows != 1
    if local or rows not in (1, here, length) or keys not in (1, here, length):
        raise LossError(
            f"shard_sequence wants a mask of keys (..., 1, {here}), or of queries and "
            f"keys (..., {here} or {length}, {length}), got {tuple(mask.shape)}, which "
            "says nothing of other ranks' keys; pass is_causal=True in place of a "
            "triangle, or a mask (rows, length, length) in the batch"
        )
    if causal:
        raise LossError(
            "scaled_dot_product_attention wants a mask or is_causal=True, got both; "
            "write the triangle into the mask"
        )
