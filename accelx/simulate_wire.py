"""How much a rank sends and keeps, seen operation by operation."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from accelx import _torch, _torch_simulate
from accelx.simulate_live import Live


def size_of(tensors: list[Tensor]) -> int:
    """Bytes that tensors take."""
    return sum(t.numel() * t.element_size() for t in tensors)


class Sent(_torch.DispatchMode):
    """Counts bytes that this rank sends, where each collective goes round in a ring.

    `live` is told of each operation, too.
    """

    def __init__(self, live: Live) -> None:
        super().__init__()
        self.live = live
        self.bytes: Counter[str] = Counter()
        self.sliced = _torch_simulate.dtensor()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """`func` as it is, after its tensors were measured."""
        if self.sliced in types:
            return NotImplemented  # it comes again, as operations on its slices
        found = _torch_simulate.collective(func, args, kwargs or {})
        if found is not None:
            name, size = found
            self.bytes[name] += size
        result = func(*args, **(kwargs or {}))
        self.live.made(func, args, result)
        return result


class Kept:
    """Bytes that forward passes keep for the backward, the most at a time.

    What is there anyway, as weights are, is left out, and weights that are gathered.
    """

    def __init__(self, others: list[Tensor]) -> None:
        self.others = {_torch.storage_id(t) for t in others}
        self.storages = dict[int, Any]()  # identity -> reference
        self.grown = False
        self.most = 0
        self.hooks: Any = torch.autograd.graph.saved_tensors_hooks(
            self._pack, self._unpack
        )

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _torch_simulate.own_of(tensor).untyped_storage()
        key = _torch_simulate.identity(storage)
        if key not in self.others and key not in self.storages:
            self.storages[key] = weakref.ref(storage, self._forget(key))
        self.grown = True
        return tensor

    def _unpack(self, tensor: Tensor) -> Tensor:
        if self.grown:  # a backward begins: gathered weights are gone again
            self.grown = False
            there = [one for ref in self.storages.values() if (one := ref())]
            self.most = max(self.most, sum(one.nbytes() for one in there))
        return tensor

    def resized(self, storage: Any) -> None:
        """Leave out what comes and goes: FSDP2 gathers weights into it."""
        self.others.add(_torch_simulate.identity(storage))
        self.storages.pop(_torch_simulate.identity(storage), None)

    def _forget(self, key: int) -> Any:
        return lambda _: self.storages.pop(key, None)
