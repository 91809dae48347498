"""Global batches that only a sampler of the user's own knows: walked, not computed.

A walk reads indices, never items. It is made the same on every rank and in every run by
starting Python's, NumPy's and torch's global generators from (seed, epoch) while the
sampler draws, and putting them back.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch

from accelx.data.lent import Lent
from accelx.errors import DataError
from accelx.permutation import key

AT_ONCE = 1024  # indices or batches that a sampler is asked for with generators lent
_STREAM = 104  # names what a walk draws apart from what orders draw for the same seed


@attrs.frozen(eq=False)
class Walk:
    """The batches of each epoch, one after another."""

    over: Callable[[int, int], Iterator[list[int]]]  # (seed, epoch) -> global batches
    count: Callable[[int, int], int]  # (seed, epoch) -> how many they are
    constant: bool  # whether each epoch has as many
    name: str  # of what is walked

    def find(self, seed: int, step: int) -> tuple[int, int]:
        """The epoch that `step` lies in, and the batch's number there."""
        if self.constant:
            length = self.count(seed, 0)
            return divmod(step, length) if length else (0, step)
        for epoch in itertools.count():
            length = self.count(seed, epoch)
            if step < length:
                return epoch, step
            step -= length
            if not length:
                raise DataError(
                    f"{self.name} wants to give batches in each epoch, got none in "
                    f"epoch {epoch}; give it items"
                )
        raise AssertionError

    def batches(self, seed: int, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """(epoch, indices) of the global batches of steps `start` to `stop`."""
        if start >= stop:
            return
        epoch, skipped = self.find(seed, start)
        left = stop - start
        while left:
            given = 0
            for batch in self.over(seed, epoch):
                given += 1
                if given > skipped and left:
                    left -= 1
                    yield epoch, batch
                if not left:
                    return
            self._whole(seed, epoch, given)
            epoch, skipped = epoch + 1, 0

    def _whole(self, seed: int, epoch: int, given: int) -> None:
        """Refuse a sampler whose length, by which steps are counted, is not true."""
        said = self.count(seed, epoch)
        if given != said:
            raise DataError(
                f"{self.name} wants to give as many batches as its length says, "
                f"{said}, but gave {given} in epoch {epoch}; mend its __len__"
            )


def by_batches(sampler: Any) -> Walk:
    """The walk over a batch sampler: `over(seed, epoch)` where it has that."""
    name = type(sampler).__name__
    if hasattr(sampler, "over"):
        counted = getattr(sampler, "count", None)
        over: Any = sampler.over
        count = counted or (lambda seed, epoch: sum(1 for _ in over(seed, epoch)))
        as_long = counted is None and hasattr(sampler, "__len__")
        return Walk(over, count, getattr(sampler, "constant", as_long), name)

    def walk(seed: int, epoch: int) -> Iterator[list[int]]:
        return (list(map(int, batch)) for batch in _steps(sampler, seed, epoch))

    return _counted(sampler, walk, name, len)


def by_indices(sampler: Any, batch_size: int, drop_last: bool) -> Walk:
    """The walk over a sampler of indices, cut into batches."""

    def walk(seed: int, epoch: int) -> Iterator[list[int]]:
        stream = map(int, _steps(sampler, seed, epoch))
        while batch := list(itertools.islice(stream, batch_size)):
            if len(batch) == batch_size or not drop_last:
                yield batch

    def length(one: Any) -> int:
        n = len(one)
        return n // batch_size if drop_last else -(-n // batch_size)

    return _counted(sampler, walk, type(sampler).__name__, length)


def _counted(
    sampler: Any,
    walk: Callable[[int, int], Iterator[list[int]]],
    name: str,
    length: Callable[[Any], int],
) -> Walk:
    """With the length that the sampler says; each epoch is walked where it has none."""
    if hasattr(sampler, "__len__"):
        return Walk(walk, lambda seed, epoch: length(sampler), True, name)
    known: dict[tuple[int, int], int] = {}

    def count(seed: int, epoch: int) -> int:
        if (seed, epoch) not in known:
            known[seed, epoch] = sum(1 for _ in walk(seed, epoch))
        return known[seed, epoch]

    return Walk(walk, count, False, name)


def _steps(sampler: Any, seed: int, epoch: int) -> Iterator[Any]:
    """What the sampler gives in `epoch`, drawn from generators of its own."""
    start = key(_STREAM, seed, epoch) >> 1
    own = copy.copy(sampler)  # its generator and epoch are set; the user's are not
    if hasattr(own, "set_epoch"):
        own.set_epoch(epoch)
    if hasattr(own, "generator"):
        own.generator = torch.Generator().manual_seed(start)
    drawn = Lent.of(start)
    with drawn.lent():
        iterator = iter(own)
    size = 1
    while True:
        with drawn.lent():
            found = list(itertools.islice(iterator, size))
        yield from found
        if len(found) < size:
            return
        size = min(2 * size, AT_ONCE)
