"""How much a rank sends and keeps, seen operation by operation."""

from __future__ import annotations

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

    Of n bytes that come together over g ranks a rank sends (g - 1) / g n, twice that in
    a sum of which all get all (Thakur, Rabenseifner, Gropp 2005). `live` is told of
    each operation, too.
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
            name, whole, ranks = found
            self.bytes[name] += whole * (ranks - 1) // ranks
        result = func(*args, **(kwargs or {}))
        self.live.made(func, args, result)
        return result


class Kept:
    """Counts bytes that a forward pass keeps for the backward, weights left out."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.seen = {_torch.storage_id(t) for t in weights}
        self.storages: list[Any] = []
        self.total: int | None = None
        self.hooks: Any = torch.autograd.graph.saved_tensors_hooks(
            self._pack, self._unpack
        )

    def _pack(self, tensor: Tensor) -> Tensor:
        local = _torch_simulate.own_of(tensor)
        if _torch.storage_id(local) not in self.seen:
            self.seen.add(_torch.storage_id(local))
            self.storages.append(local.untyped_storage())
        return tensor

    def _unpack(self, tensor: Tensor) -> Tensor:
        if self.total is None:  # backward begins: gathered weights are gone again
            self.total = sum(storage.nbytes() for storage in self.storages)
            self.storages.clear()  # each goes when the backward pass is through with it
        return tensor
