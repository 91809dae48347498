"""A tensor's bytes, where they lie, or copied off a device a chunk at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from accelx import _xla
from accelx.saves.boxes import Box


def view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, (n,) uint8, writable, without a copy."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(bytearray())
    memory: Any = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    memory.tensor = tensor  # lives as long as the view
    return memoryview(memory).cast("B")


def host(tensor: Tensor) -> Tensor:
    """`tensor` without gradients, or a copy in the host's memory of one on XLA.

    Whose memory cannot be looked into: each view of it would be compiled.
    """
    tensor = tensor.detach()
    return _xla.host(tensor) if tensor.device.type == "xla" else tensor


def flat(tensor: Tensor) -> Tensor:
    """The elements of `tensor` as bytes, (n,) uint8; a view where it is contiguous."""
    if tensor.is_conj() or tensor.is_neg():  # marks without bytes
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def chunks(data: Tensor, size: int) -> Iterator[memoryview]:
    """The bytes of a flat uint8 tensor, `size` at a time."""
    on_cpu = data.device.type == "cpu"
    for at in range(0, data.numel(), size):
        part = data[at : at + size]
        yield view(part if on_cpu else part.cpu())


def inside(tensor: Tensor, box: Box, outer: Box) -> Tensor:
    """The view of `tensor`, which holds `outer`, that is `box`."""
    for dim, (low, high, start) in enumerate(
        zip(box.lo, box.hi, outer.lo, strict=True)
    ):
        tensor = tensor.narrow(dim, low - start, high - low)
    return tensor
