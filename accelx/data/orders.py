"""At which index the items of an epoch stand: torch's samplers as arithmetic.

Each order is a pure function of (seed, epoch, positions). What torch's samplers draw
from a generator, these draw from a keyed hash of the position, so that position 10**9
costs as much as 0, and no random state is kept.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from accelx.permutation import hashed, key, permute, uniform

# What an order draws is named apart from what `permute` draws for the same seed.
_DRAWN, _WEIGHED, _AGAIN = 101, 102, 103


@attrs.frozen
class Seeded:
    """Each of `length` items once: in order, or shuffled."""

    length: int
    shuffle: bool = False

    def at(self, seed: int, epoch: int, positions: Tensor) -> Tensor:
        """The indices at `positions`: int64, of the same shape."""
        if not self.shuffle:
            return positions
        return permute(self.length, seed, epoch, positions)


@attrs.frozen(eq=False)
class Own:
    """The order that a dataset has of its own: see `order_at` in docs/data.md."""

    dataset: Any
    length: int
    shuffle: bool
    batch_size: int

    def at(self, seed: int, epoch: int, positions: Tensor) -> Tensor:
        """The indices at `positions`: int64, of the same shape."""
        return self.dataset.order_at(
            positions,
            shuffle=self.shuffle,
            seed=seed,
            epoch=epoch,
            batch_size=self.batch_size,
        )


@attrs.frozen(eq=False)
class Among:
    """The items of `indices` each once, shuffled: SubsetRandomSampler."""

    indices: Tensor  # (n,) int64

    @property
    def length(self) -> int:
        """Items of an epoch."""
        return len(self.indices)

    def at(self, seed: int, epoch: int, positions: Tensor) -> Tensor:
        """The indices at `positions`: int64, of the same shape."""
        return self.indices[permute(self.length, seed, epoch, positions)]


@attrs.frozen
class Drawn:
    """Items of `n` with equal chances, with replacement: RandomSampler(replacement)."""

    n: int
    length: int

    def at(self, seed: int, epoch: int, positions: Tensor) -> Tensor:
        """The indices at `positions`: int64, of the same shape."""
        base = key(_DRAWN, self.n, seed, epoch)
        if self.n <= 2**32:  # exact in float64, without the bias of a remainder
            return uniform(base, positions).mul_(self.n).long().clamp_(max=self.n - 1)
        return hashed(base, positions) % self.n


@attrs.frozen
class Cycled:
    """`length` items: all `n` once, then all once more: RandomSampler(num_samples)."""

    n: int
    length: int

    def at(self, seed: int, epoch: int, positions: Tensor) -> Tensor:
        """The indices at `positions`: int64, of the same shape."""
        out = torch.empty_like(positions)
        for turn in positions.div(self.n, rounding_mode="floor").unique().tolist():
            here = positions.div(self.n, rounding_mode="floor") == turn
            again = key(_AGAIN, seed, turn) >> 1 if turn else seed
            out[here] = permute(self.n, again, epoch, positions[here] - turn * self.n)
        return out


@attrs.frozen(eq=False)
class Weighted:
    """`length` items drawn by weights: WeightedRandomSampler.

    With replacement each position is a draw of its own, by the inverse of the summed
    weights. Without, all items are ordered by -log(u) / weight, which draws them one
    after another from what is left (Efraimidis, Spirakis 2006).
    """

    weights: Tensor  # (n,) float64
    length: int
    replacement: bool
    _sums: Tensor = attrs.field(init=False)
    _last: int = attrs.field(init=False)  # with a weight: rounding may reach past it
    _whole: dict[int, Tensor] = attrs.field(init=False, factory=dict)  # one epoch

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_sums", self.weights.cumsum(0))
        object.__setattr__(self, "_last", int(self.weights.nonzero()[-1]))

    def at(self, seed: int, epoch: int, positions: Tensor) -> Tensor:
        """The indices at `positions`: int64, of the same shape."""
        base = key(_WEIGHED, len(self.weights), seed, epoch)
        if not self.replacement:
            return self._ordered(base)[positions]
        chances = uniform(base, positions).mul_(self._sums[-1])
        found = torch.searchsorted(self._sums, chances, right=True)
        return found.clamp_(max=self._last)

    def _ordered(self, base: int) -> Tensor:
        if base not in self._whole:
            chances = uniform(base, torch.arange(len(self.weights)))
            self._whole.clear()
            waits = chances.log_().neg_().div_(self.weights)
            self._whole[base] = waits.argsort(stable=True)
        return self._whole[base]


Order = Seeded | Own | Among | Drawn | Cycled | Weighted
