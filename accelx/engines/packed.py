"""Weights of Linears in 8 or 4 bits, each row in the bytes of one row of one tensor.

A row carries its own scales, so a packed weight is one int8 Parameter under the name of
the weight: it is sent, cut along rows, saved and compared as any other, and what casts
floats leaves it be.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accelx.engines import copies
from accelx.engines.forwards import wrap
from accelx.errors import CheckpointError, PlacementError
from accelx.match import Selector

GROUP = 64  # weights of a row that share a scale, in 4 bits
KINDS = {"int8": 1, "int4": 2, "nf4": 3}  # and the length of a row, modulo 4
TINY = torch.finfo(torch.float32).eps  # a scale is no less: a row of zeros has one
# Dettmers et al. 2023 (arXiv:2305.14314), appendix E: quantiles of the normal
# distribution, scaled to [-1, 1], with a zero among them.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


@attrs.define(eq=False)
class Packed:
    """The slot "quantize": which weights are packed, and what they were before."""

    kind: str
    weights: dict[str, tuple[str, int]]  # name -> dtype, columns
    bytes_before: int
    bytes_after: int

    def state_dict(self) -> dict[str, Any]:
        """What is saved."""
        each = {name: list(one) for name, one in self.weights.items()}
        return {"kind": self.kind, "weights": each}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse what was saved of weights that were packed otherwise."""
        mine = self.state_dict()
        if mine != state:
            each = {*self.weights, *state["weights"]}
            odd = sorted(
                n for n in each if mine["weights"].get(n) != state["weights"].get(n)
            )
            raise CheckpointError(
                f"the checkpoint has weights packed by quantize({state['kind']!r}), "
                f"here it is quantize({self.kind!r})"
                + (f", and others are packed: {', '.join(odd[:5])}" if odd else "")
                + "; write the same quantize(kind, blocks) as in the run that was saved"
            )


class Form(NamedTuple):
    """How a weight of `columns` columns is packed, and what it is unpacked to.

    A tuple: torch.compile would break its graph where another class is made.
    """

    kind: str
    columns: int
    dtype: torch.dtype


def pack(weight: Tensor, kind: str) -> Tensor:
    """`weight`, (out, in) of floats, as (out, bytes) int8: scales, codes, and padding.

    Scales are float32: for int8 one a row, for 4 bits one for each 64 weights. Of two
    codes in a byte the first is in the low half.
    """
    wide = weight.detach().float()
    if kind == "int8":
        scales = _equal(wide.abs().amax(1, keepdim=True), 8)
        codes = (wide / scales).round_().clamp_(-128, 127).to(torch.int8)
        return _row(kind, scales, codes)
    groups = F.pad(wide, (0, -wide.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    most = groups.abs().amax(2)
    if kind == "int4":
        scales = _equal(most, 4)
        codes = (groups / scales[..., None]).round_().clamp_(-8, 7) + 8
    else:
        scales = most.clamp(min=TINY)
        codes = _nearest(groups / scales[..., None])
    halves = codes.to(torch.uint8).flatten(1)
    both = halves[:, ::2] | (halves[:, 1::2] << 4)
    return _row(kind, scales, both.view(torch.int8))


def _row(kind: str, scales: Tensor, codes: Tensor) -> Tensor:
    """Both side by side.

    The length, modulo 4, tells the kind: what is saved in one fits into no other.
    """
    bytes_ = torch.cat((scales.view(torch.int8), codes), 1)
    return F.pad(bytes_, (0, (KINDS[kind] - bytes_.shape[1]) % 4))


def unpack(packed: Tensor, form: Form) -> Tensor:
    """The weight that `packed` stands for, (out, in) of the dtype of `form`."""
    count = 1 if form.kind == "int8" else math.ceil(form.columns / GROUP)
    # narrow: shard_sequence takes a slice as long as its tokens for one of positions
    scales, codes = packed.narrow(1, 0, 4 * count), packed[:, 4 * count :]
    # a copy: memory of one row, or in a buffer of several weights, need not be aligned
    scales = scales.clone(memory_format=torch.contiguous_format).view(torch.float32)
    if form.kind == "int8":
        return (codes.narrow(1, 0, form.columns).float() * scales).to(form.dtype)
    codes = codes.narrow(1, 0, count * GROUP // 2).contiguous().view(torch.uint8).int()
    pairs = F.embedding(codes, _pairs(form.kind, packed.device))
    wide = pairs.view(-1, count, GROUP) * scales[..., None]
    return wide.flatten(1).narrow(1, 0, form.columns).to(form.dtype)


def _equal(most: Tensor, bits: int) -> Tensor:
    """The width of 2**bits - 1 equal steps from -most to most."""
    return (most / ((2**bits - 1) / 2)).clamp_(min=TINY)


def _nearest(values: Tensor) -> Tensor:
    """The index of the entry of NF4 next to each value; of a tie, the lower."""
    table = torch.tensor(NF4, device=values.device)
    return torch.bucketize(values.contiguous(), (table[1:] + table[:-1]) / 2)


def _pairs(kind: str, device: torch.device) -> Tensor:
    """(256, 2): the values that the two codes in each byte stand for."""
    values = [i - 8.0 for i in range(16)] if kind == "int4" else NF4
    table = torch.tensor(values, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack((table[byte & 15], table[byte >> 4]), 1)


class _Product(torch.autograd.Function):
    """x @ weight.T + bias, that keeps the packed weight for backward, not the floats.

    The packed weight gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Any, form: Form) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.form = form
        return F.linear(x, unpack(packed, form), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        (packed,) = ctx.saved_tensors
        into, _, bias, _ = ctx.needs_input_grad
        back = grad @ unpack(packed, ctx.form).to(grad.dtype) if into else None
        rows = grad.reshape(-1, grad.shape[-1]).sum(0) if bias else None
        return back, None, rows, None


def packing(model: nn.Module, names: Iterable[str], kind: str) -> Packed:
    """Pack the weights of the Linears called `names`, in place, one after the other.

    Objects, classes and names stay (L8). Raises PlacementError for a weight with
    numbers that are not finite.
    """
    done = Packed(kind, {}, 0, 0)
    for name in names:
        module: Any = model.get_submodule(name)
        weight = module.weight
        if not weight.isfinite().all():
            raise PlacementError(
                f"quantize({kind!r}) wants finite numbers, but {name}.weight has "
                "others; find where they come from, or leave it out by blocks"
            )
        packed = nn.Parameter(pack(weight, kind), requires_grad=False)
        copies.put(model, f"{name}.weight", packed)
        dtype = str(weight.dtype).removeprefix("torch.")
        done.weights[f"{name}.weight"] = dtype, weight.shape[1]
        done.bytes_before += weight.nbytes
        done.bytes_after += packed.nbytes
    for dtype in sorted({d for d, _ in done.weights.values()}):
        around = functools.partial(_around, kind, getattr(torch, dtype))
        wrap(model, _of(done, dtype), "quantize", around)
    return done


def _of(done: Packed, dtype: str) -> Selector:
    """The Linears whose weights were of a dtype."""
    return lambda name, _: done.weights.get(f"{name}.weight", ("", 0))[0] == dtype


def _around(kind: str, dtype: torch.dtype, inner: Any) -> Any:
    def forward(self: Any, input: Tensor) -> Any:
        if not input.is_floating_point():
            raise PlacementError(
                "a Linear whose weight quantize packed wants floats, got "
                f"{input.dtype}: its caller casts to weight.dtype, which is int8 now; "
                "leave this Linear out, by blocks"
            )
        form = Form(kind, self.in_features, dtype)
        return _Product.apply(input, self.weight, self.bias, form)

    return forward
