"""A number for a tensor's contents that is the same however it is cut over ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from accelx import comm
from accelx.records import Env
from accelx.saves.boxes import Box, Ints, first, strides
from accelx.saves.flat import Held
from accelx.saves.lie import here, lie
from accelx.saves.memory import flat, host, view
from accelx.saves.strict import digest

BLOCK = 1 << 20  # elements at once: 8 MiB a temporary
WORD = (1 << 64) - 1
# The finaliser of SplitMix64 (Steele, Lea, Flood 2014), as signed 64-bit words.
GOLDEN, FIRST, SECOND = (
    c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprints(
    env: Env, tensors: Mapping[str, Held]
) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """dtype, shape and 32 hex digits for each tensor. One collective.

    Each element is mixed with its place in the whole tensor, and the results are added
    up modulo 2**64: sums of slices are the sum of the whole. No defence against someone
    who makes tensors to collide.
    """
    sums = torch.zeros(len(tensors), 2, dtype=torch.int64, device="cpu")
    found: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for row, (name, tensor) in zip(sums, tensors.items(), strict=True):
        row += _of_rank(env, name, tensor)
    sums = comm.reduce(env, sums, "sum")
    for (name, tensor), (a, b) in zip(tensors.items(), sums.tolist(), strict=True):
        dtype = str(tensor.dtype).removeprefix("torch.")
        text = f"{a & WORD:016x}{b & WORD:016x}"
        found[name] = dtype, tuple(tensor.shape), text
    return found


def fingerprint(tensor: Tensor) -> str:
    """Digits for a tensor that this rank holds whole; no collective."""
    if tensor.device.type == "cpu":
        return digest(view(flat(tensor)))
    shape = tuple(tensor.shape)
    box = Box((0,) * len(shape), shape)
    return str(_sums(*_real(tensor, box, shape)).tolist()) if tensor.numel() else ""


def _of_rank(env: Env, name: str, tensor: Held) -> Tensor:
    """This rank's part of the sums, (2,): of slices that it is the first to hold."""
    slices = lie(name, tensor, {}).slices
    owners = None if slices is None else {s.box: s.ranks[0] for s in slices}
    total = torch.zeros(2, dtype=torch.int64, device="cpu")
    for box, local in here(tensor, {}):
        if (0 if owners is None else owners[box]) == env.rank:
            total += _sums(*_real(local, box, tuple(tensor.shape))).cpu()
    return total


def _real(local: Tensor, box: Box, shape: Ints) -> tuple[Tensor, Box, Ints]:
    """Real numbers as they are; complex ones, of up to 16 bytes, as two each."""
    local = host(local).resolve_neg()
    if local.is_complex():
        local = torch.view_as_real(local.resolve_conj())
        box, shape = Box((*box.lo, 0), (*box.hi, 2)), (*shape, 2)
    return local.contiguous(), box, shape


def _sums(local: Tensor, box: Box, shape: tuple[int, ...]) -> Tensor:
    bits = local.view(WORDS[local.element_size()]).reshape(-1)
    total = torch.zeros(2, dtype=torch.int64, device=local.device)
    for at in range(0, bits.numel(), BLOCK):
        part = bits[at : at + BLOCK].long()
        place = _mixed(_places(at, part, box, shape))
        total[0] += _mixed(place ^ part).sum()
        total[1] += (place * part).sum()
    return total


def _places(at: int, part: Tensor, box: Box, shape: tuple[int, ...]) -> Tensor:
    """Row-major positions in the whole tensor of elements `at`... of its slice."""
    rest = torch.arange(at, at + part.numel(), device=part.device)
    place = torch.full_like(rest, first(box, Box((0,) * len(shape), shape)))
    for inner, outer in zip(strides(box.shape), strides(shape), strict=True):
        place += rest.div(inner, rounding_mode="floor") * outer
        rest = rest % inner
    return place


def _mixed(x: Tensor) -> Tensor:
    x = x + GOLDEN
    x = (x ^ _right(x, 30)) * FIRST
    x = (x ^ _right(x, 27)) * SECOND
    return x ^ _right(x, 31)


def _right(x: Tensor, bits: int) -> Tensor:
    """A shift that brings in zeros, as that of unsigned words."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
