"""A tensor whose elements, row after row, lie in one run on each rank.

Some engines cut weights so, at any element: a run is the end of a row, whole rows and
the beginning of one, each of which is a box.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from accelx.saves.boxes import Box, Ints


@attrs.frozen(eq=False)
class Flat:
    """What this rank holds of such a tensor, and who holds the rest."""

    local: Tensor  # (n,), this rank's run, without gradient
    shape: Ints  # of the whole
    runs: tuple[tuple[int, int], ...]  # of each rank: its first element, and behind
    rank: int  # this one
    requires_grad: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """That of the elements."""
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        """Where this rank's run lies."""
        return self.local.device

    @property
    def is_cpu(self) -> bool:
        """Whether this rank's run lies in the host's memory."""
        return self.local.is_cpu


Held = Tensor | Flat  # what a checkpoint has a form for


def blank(like: Held, dtype: torch.dtype) -> Held:
    """One that lies as `like` does, in memory of its own that nothing has set."""
    if isinstance(like, Flat):
        return attrs.evolve(like, local=torch.empty_like(like.local, dtype=dtype))
    return torch.empty_like(like, dtype=dtype, requires_grad=False)


def boxes(run: tuple[int, int], shape: Ints) -> list[Box]:
    """The run's elements as boxes, in order; at most two a dimension, and one."""
    low, high = run
    if low >= high:
        return []
    if not shape:
        return [Box((), ())]
    size = math.prod(shape[1:])
    (first, start), (last, stop) = divmod(low, size), divmod(high, size)
    if first == last:
        return _at(first, (start, stop), shape)
    head = _at(first, (start, size), shape) if start else []
    top = first + bool(start)
    zeros = (0,) * (len(shape) - 1)
    middle = [Box((top, *zeros), (last, *shape[1:]))] if top < last else []
    return [*head, *middle, *_at(last, (0, stop), shape)]


def _at(row: int, run: tuple[int, int], shape: Ints) -> list[Box]:
    return [Box((row, *box.lo), (row + 1, *box.hi)) for box in boxes(run, shape[1:])]


def pieces(flat: Flat) -> list[tuple[Box, Tensor]]:
    """The boxes that this rank holds, and the memory of each."""
    found, at = list[tuple[Box, Tensor]](), 0
    for box in boxes(flat.runs[flat.rank], flat.shape):
        found.append((box, flat.local[at : at + box.volume].view(box.shape)))
        at += box.volume
    return found
