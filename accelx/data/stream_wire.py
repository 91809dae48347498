"""How rows cross between ranks: bytes of their own, over a gloo group of their own."""

from __future__ import annotations

import ctypes
import io
import math
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accelx.comm_wire import dist, group, part, together
from accelx.records import Axis, Env

FAILED = -1  # in place of a number of rows


def side(env: Env) -> Any:
    """The group by which streams meet, on the CPU: it comes between no collectives of
    the training. Made once, by all ranks, when a stream is first read.
    """
    together(env, "feed")
    group(env, "feed")
    whole = env.whole or (Axis("data", env.world),)
    names = tuple(axis.name for axis in env.axes if env.whole) or ("data",)
    return part(whole, names, dist().group.WORLD, "gloo")


def counted(env: Env | None, mine: int) -> list[int]:
    """Every rank's number, in rank order."""
    if env is None or env.world == 1:
        return [mine]
    numbers = torch.zeros(env.world, dtype=torch.int64)
    numbers[env.rank] = mine
    dist().all_reduce(numbers, group=side(env))
    return numbers.tolist()


def told(env: Env, text: str) -> list[str]:
    """Every rank's text, in rank order."""
    texts: list[Any] = [None] * env.world
    dist().all_gather_object(texts, text, group=side(env))
    return texts


def spread(env: Env, source: int, value: Any) -> Any:
    """The value of rank `source`, on every rank; what others bring is not read."""
    size = torch.zeros(1, dtype=torch.int64)
    data = packed(value) if env.rank == source else None
    if data is not None:
        size[0] = data.numel()
    dist().broadcast(size, group=side(env), group_src=source)
    if data is None:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist().broadcast(data, group=side(env), group_src=source)
    return value if env.rank == source else unpacked(data)


def deal(env: Env, number: int, parts: Sequence[Tensor | None]) -> None:
    """From rank 0, `number` to every rank, and to each only its own part, (n,) uint8.

    Rank 0's own part stays where it is; None sends nothing.
    """
    sizes = [0 if one is None else one.numel() for one in parts]
    header = torch.tensor([number, *sizes[1:]], dtype=torch.int64)
    dist().broadcast(header, group=side(env), group_src=0)
    under_way = [
        dist().isend(one, group=side(env), group_dst=rank)
        for rank, one in enumerate(parts)
        if rank and one is not None
    ]
    for one in under_way:
        one.wait()


def dealt(env: Env) -> tuple[int, Tensor | None]:
    """What `deal` sends to this rank."""
    header = torch.empty(env.world, dtype=torch.int64)
    dist().broadcast(header, group=side(env), group_src=0)
    size = int(header[env.rank])
    if not size:
        return int(header[0]), None
    data = torch.empty(size, dtype=torch.uint8)
    dist().recv(data, group=side(env), group_src=0)
    return int(header[0]), data


def packed(value: Any) -> Tensor:
    """`value` by pickle, (n,) uint8; a tensor that is a view takes its own rows alone.

    Also how rows come from a worker: one piece of shared memory, not one a tensor.
    """
    out = io.BytesIO()
    _Pickler(out, protocol=5).dump(value)
    return torch.frombuffer(out.getbuffer(), dtype=torch.uint8)


def unpacked(data: Tensor) -> Any:
    """What `packed` was given; tensors own their memory."""
    view = (ctypes.c_char * data.numel()).from_address(data.data_ptr())
    return pickle.loads(view)


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        """A plain tensor as its own bytes: torch's pickle takes the whole storage."""
        if type(obj) is not Tensor or obj.layout is not torch.strided:
            return NotImplemented
        if obj.requires_grad or obj.is_quantized or obj.device.type != "cpu":
            return NotImplemented
        plain = obj.resolve_conj().resolve_neg().contiguous()
        size = math.prod(plain.shape) * plain.dtype.itemsize
        data = bytearray(ctypes.string_at(plain.data_ptr(), size)) if size else None
        return _tensor, (data, plain.dtype, tuple(plain.shape))


def _tensor(
    data: bytearray | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    if data is None:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)
