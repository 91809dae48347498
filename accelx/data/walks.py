"""Global batches that only a sampler of the user's own knows: walked, not computed.

A walk reads indices, never items. It is made the same on every rank and in every run by
starting Python's, NumPy's and torch's global generators from (seed, epoch) while the
sampler draws, and putting them back.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from accelx.data.afresh import afresh
from accelx.data.lent import Lent
from accelx.errors import DataError
from accelx.permutation import key

KEYS = (str, bytes, tuple, slice, list)  # by which a dataset may know its items
AT_ONCE = 1024  # indices or batches that a sampler is asked for with generators lent
_STREAM = 104  # names what a walk draws apart from what orders draw for the same seed


@attrs.frozen(eq=False)
class Walk:
    """The batches of each epoch, one after another."""

    over: Callable[[int, int], Iterator[list[int]]]  # (seed, epoch) -> global batches
    count: Callable[[int, int], int]  # (seed, epoch) -> how many they are
    constant: bool  # whether each epoch has as many
    name: str  # of what is walked
    told: bool = True  # whether `count` knows without a walk to the end

    def find(self, seed: int, step: int) -> tuple[int, int]:
        """The epoch that `step` lies in, and the batch's number there."""
        if self.constant:
            length = self.count(seed, 0)
            return divmod(step, length) if length else (0, step)
        for epoch in itertools.count():
            length = self._up_to(seed, epoch, step + 1)
            if step < length:
                return epoch, step
            step -= length
            if not length:
                raise DataError(
                    f"{self.name} wants to give batches in each epoch, got none in "
                    f"epoch {epoch}; give it items"
                )
        raise AssertionError

    def _up_to(self, seed: int, epoch: int, most: int) -> int:
        """Batches of an epoch; where none says how many, `most` are asked at most."""
        if self.told:
            return self.count(seed, epoch)
        return sum(1 for _ in itertools.islice(self.over(seed, epoch), most))

    def batches(self, seed: int, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """(epoch, indices) of the global batches of steps `start` to `stop`."""
        if start >= stop:
            return
        epoch, skipped = self.find(seed, start)
        left = stop - start
        while left:
            given, said = 0, self.count(seed, epoch) if self.told else None
            for batch in self.over(seed, epoch):
                given += 1
                if said is not None and given > said:
                    raise self._other(said, f"more than {said}", epoch)
                if not left:
                    return
                if given > skipped:
                    left -= 1
                    yield epoch, batch
                    if not left and given != said:
                        return
            if said is not None and given != said:
                raise self._other(said, str(given), epoch)
            epoch, skipped = epoch + 1, 0

    def _other(self, said: int, given: str, epoch: int) -> DataError:
        """The error of a sampler whose length, by which steps are counted, is wrong."""
        return DataError(
            f"{self.name} wants to give as many batches as its length says, "
            f"{said}, but gave {given} in epoch {epoch}; mend its __len__"
        )


def by_batches(sampler: Any, dataset: Any = None) -> Walk:
    """The walk over a batch sampler: `over(seed, epoch)` where it has that."""
    name = type(sampler).__name__
    if hasattr(sampler, "over"):
        counted = getattr(sampler, "count", None)
        over: Any = sampler.over
        count = counted or (lambda seed, epoch: sum(1 for _ in over(seed, epoch)))
        as_long = counted is None and hasattr(sampler, "__len__")
        told = counted is not None or as_long
        return Walk(over, count, getattr(sampler, "constant", as_long), name, told)

    def taken(batch: Any) -> list[int]:  # at once: it may be filled again
        return [_index(one, name) for one in batch]

    def walk(seed: int, epoch: int) -> Iterator[list[int]]:
        return _steps(sampler, dataset, seed, epoch, taken)

    return _counted(sampler, walk, name, len)


def by_indices(
    sampler: Any, batch_size: int, drop_last: bool, dataset: Any = None
) -> Walk:
    """The walk over a sampler of indices, cut into batches."""

    name = type(sampler).__name__

    def walk(seed: int, epoch: int) -> Iterator[list[int]]:
        stream = _steps(sampler, dataset, seed, epoch, lambda one: _index(one, name))
        while batch := list(itertools.islice(stream, batch_size)):
            if len(batch) == batch_size or not drop_last:
                yield batch

    def length(one: Any) -> int:
        n = len(one)
        return n // batch_size if drop_last else -(-n // batch_size)

    return _counted(sampler, walk, name, length)


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

    return Walk(walk, count, False, name, told=False)


def _index(found: Any, name: str) -> Any:
    try:
        return operator.index(found)
    except TypeError:
        if isinstance(found, KEYS):
            return list(found) if isinstance(found, list) else found  # type: ignore[reportUnknownVariableType]
        raise DataError(
            f"{name} wants to give whole numbers as indices, or keys that are texts, "
            f"tuples, slices or lists, got {found!r}; map what it gives to items in "
            "the dataset, by index"
        ) from None


def keyed(batch: list[Any]) -> bool:
    """Whether a batch names its items by something else than numbers."""
    return any(issubclass(kind, KEYS) for kind in set(map(type, batch)))


def _steps(
    sampler: Any, dataset: Any, seed: int, epoch: int, taken: Callable[[Any], Any]
) -> Iterator[Any]:
    """What the sampler gives in `epoch`, drawn from generators of its own."""
    start = key(_STREAM, seed, epoch) >> 1
    own = afresh(sampler, start, epoch, dataset)
    drawn = Lent.of(start)
    with drawn.lent():
        iterator = iter(own)
    size = 1
    while True:
        with drawn.lent():
            found = list(map(taken, itertools.islice(iterator, size)))
        yield from found
        if len(found) < size:
            return
        size = min(2 * size, AT_ONCE)
