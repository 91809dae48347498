"""Private names of torch about attention: its kernels, and who sees its calls."""

# Private names are what this file is for.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def function_modes(kind: type) -> list[Any]:
    """The modes of a kind that see torch's functions on this thread: 0.3 us if none."""
    from torch.overrides import _get_current_function_mode_stack

    if not torch._C._len_torch_function_stack():
        return []
    return [m for m in _get_current_function_mode_stack() if isinstance(m, kind)]


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: Any) -> Any:
    """Attention (B, heads, L, size) and the log of its normaliser (B, heads, L)."""
    if q.device.type == "cpu":
        of_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return of_cpu(q, k, v, 0.0, causal, scale=scale)
    of_gpu = torch.ops.aten._scaled_dot_product_flash_attention
    return of_gpu(q, k, v, 0.0, causal, return_debug_mask=False, scale=scale)[:2]


def flash_backward(
    up: Tensor,
    q: Tensor,
    out: Tensor,
    norm: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: Any,
) -> Any:
    """Gradients of q, k and v, where `out` and `norm` may be of more keys than k."""
    if q.device.type == "cpu":
        of_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return of_cpu(up, q, k, v, out, norm, 0.0, causal, scale=scale)
    of_gpu = torch.ops.aten._scaled_dot_product_flash_attention_backward
    sizes = (None, None, q.size(2), k.size(2))
    unused = torch.zeros((2,), dtype=torch.int64, device=q.device).view(torch.uint64)
    rest = (*sizes, 0.0, causal, unused, unused[:1])  # no dropout: nothing is drawn
    return of_gpu(up, q, k, v, out, norm.contiguous(), *rest, scale=scale)


def causal(queries: int, keys: int) -> Tensor:
    """The mask of the last `queries` of `keys` tokens, which kernels know by its class.

    A mode that sees torch's calls, as of selective recomputing, cannot see it made.
    """
    from torch.nn.attention.bias import causal_lower_right
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return causal_lower_right(queries, keys)
