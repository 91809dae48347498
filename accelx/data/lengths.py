"""Which items share a batch when items have lengths: by tokens, or by like lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from typing import Any

import attrs
import torch
from torch import Tensor

from accelx.errors import DataError
from accelx.permutation import key, permute
from accelx.records import code

_BATCHES = 112  # names the order of batches apart from that of items
INTEGERS = frozenset(
    (
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint16, torch.uint32, torch.uint64),
    )
)


@attrs.frozen(eq=False, repr=False)
class Lengths:
    """How long each item is; two of them are equal by value."""

    values: Tensor  # (n,) int64, on the CPU, n >= 1, none below 0

    def __len__(self) -> int:
        return len(self.values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Lengths):
            return NotImplemented
        return torch.equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash((len(self.values), int(self.values.sum())))

    def __repr__(self) -> str:
        if len(self) <= 8:
            return repr(self.values.tolist())
        return f"<{len(self)} lengths>"


def as_lengths(values: Any) -> Lengths:
    """Lengths of a list, tensor or array of whole numbers. Raises DataError."""
    if isinstance(values, Lengths):
        return values
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(
            "lengths must be one whole number for each item, got "
            f"{type(values).__name__} ({error}); write [len(item) for item in dataset]"
        ) from error
    if found.dim() != 1 or not len(found) or found.dtype not in INTEGERS:
        raise DataError(
            "lengths must be one whole number for each of at least one item, got shape "
            f"{tuple(found.shape)} of {found.dtype}; write "
            "[len(item) for item in dataset]"
        )
    found = found.detach().to("cpu", torch.int64, copy=True)
    if int(found.min()) < 0:
        at = int(found.argmin())
        raise DataError(
            f"a length must be at least 0, got {int(found[at])} for item {at}; give "
            "the number of its tokens"
        )
    return Lengths(found)


def whole(least: int) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    """A validator for whole numbers of at least `least`."""

    def check(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise DataError(
                f"{field.name} must be a whole number of at least {least}, got "
                f"{value!r}; write {field.name}={least} or more"
            )

    return check


def by_tokens(
    budget: int,
    lengths: Any,
    *,
    shuffle: bool = False,
    padded: bool = False,
    longest: int | None = None,
    window: int = 0,
) -> ByTokens:
    """Global batches of as many items, one after another, as `budget` tokens hold.

    For `DataLoader(dataset, batch_sampler=by_tokens(...))`: `lengths` has the tokens of
    each item of the dataset (a list, tensor or array of whole numbers). The tokens of a
    batch over all ranks are the sum of its items' lengths, or with `padded` its rows
    times the longest of them. Each item comes once an epoch, in order, or shuffled by
    seed and epoch. An item longer than the budget is refused; with `longest`, those
    longer than that are left out instead. With `window`, items of about so many batches
    are sorted by length together, so that a batch holds items of like length, and a
    shuffled epoch shuffles the batches as well.

    Called on any iterable of indices, the result gives the lists that they are cut
    into: `by_tokens(8, lengths)(range(10))`. Law L10. Raises DataError.
    """
    return ByTokens(budget, lengths, shuffle, padded, longest, window)


def by_length(
    batch_size: int,
    lengths: Any,
    *,
    shuffle: bool = False,
    window: int = 50,
    drop_last: bool = False,
) -> ByLength:
    """Global batches of `batch_size` items of like length.

    For `DataLoader(dataset, batch_sampler=by_length(...))`. Of the epoch's order, in
    order or shuffled by seed and epoch, each `window` batches are sorted by length and
    cut; a shuffled epoch then shuffles all batches. A larger window pads less and is
    less random. With `drop_last` the last items of the order that fill no batch are
    left out, whatever their length. Each other item comes once an epoch.

    Called on any iterable of indices, the result gives the lists that they are cut
    into. Law L10. Raises DataError.
    """
    return ByLength(batch_size, lengths, shuffle, window, drop_last)


class _Seeded:
    """A batch sampler whose batches are a function of seed and epoch."""

    __slots__ = ()

    shuffle: bool
    window: int
    lengths: Lengths

    def _plan(self, seed: int, epoch: int) -> tuple[Tensor, list[int]]:
        """Items in order, int64, and where each batch ends, after a 0."""
        raise NotImplementedError

    def _order(self, seed: int, epoch: int) -> Tensor:
        positions = torch.arange(len(self.lengths))
        if not self.shuffle:
            return positions
        return permute(len(self.lengths), seed, epoch, positions)

    def over(self, seed: int, epoch: int) -> Iterator[list[int]]:
        """The global batches of an epoch, each a list of indices."""
        order, ends = self._plan(seed, epoch)
        bounds = list(pairwise(ends))
        if self.shuffle and self.window and bounds:
            own = key(_BATCHES, seed) >> 1
            mixed = permute(len(bounds), own, epoch, torch.arange(len(bounds)))
            bounds = [bounds[i] for i in mixed.tolist()]
        for low, high in bounds:
            yield order[low:high].tolist()

    def count(self, seed: int, epoch: int) -> int:
        """How many batches that epoch has."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[int]]:
        return self.over(0, 0)

    def __len__(self) -> int:
        return self.count(0, 0)


@attrs.frozen(repr=False)
class ByTokens(_Seeded):
    """What `by_tokens` gives: a batch sampler, and a function of streams of indices."""

    budget: int = attrs.field(validator=whole(1))  # tokens of a batch over all ranks
    lengths: Lengths = attrs.field(converter=as_lengths)
    shuffle: bool = False
    padded: bool = False  # tokens are rows times the longest, not the sum
    longest: int | None = attrs.field(  # longer items are left out
        default=None, validator=attrs.validators.optional(whole(0))
    )
    window: int = attrs.field(default=0, validator=whole(0))  # batches sorted together
    _span: int = attrs.field(init=False, repr=False)  # items sorted together
    # of each epoch that was planned: a loader asks for them at each start
    _counts: dict[tuple[int, int], int] = attrs.field(
        init=False, repr=False, eq=False, factory=dict
    )

    def __attrs_post_init__(self) -> None:
        values = self.lengths.values
        kept = values if self.longest is None else values[values <= self.longest]
        if not len(kept):
            raise DataError(
                f"by_tokens wants items of at most longest={self.longest} tokens, got "
                f"none; the shortest has {int(values.min())}, write that or more"
            )
        if int(kept.max()) > self.budget:
            at = int((values == kept.max()).nonzero()[0])
            raise DataError(
                f"each item must fit a batch of {self.budget} tokens, got item {at} of "
                f"{int(values[at])}; write a budget of at least that, or "
                f"longest={self.budget} to leave out longer items"
            )
        mean = max(1.0, float(kept.double().mean()))
        span = self.window * max(1, int(self.budget / mean))
        object.__setattr__(self, "_span", span)

    @property
    def left_out(self) -> int:
        """How many items are longer than `longest`."""
        if self.longest is None:
            return 0
        return int((self.lengths.values > self.longest).sum())

    @property
    def constant(self) -> bool:
        """Whether each epoch has equally many batches."""
        return not self.shuffle

    def __call__(self, indices: Iterable[int]) -> Iterator[list[int]]:
        """The lists that a stream of indices is cut into, in the stream's order."""
        values, batch, total, top = self.lengths.values, list[int](), 0, 0
        for index in _snaked(self._kept(indices), self._span, values):
            length = int(values[index])
            total, top = total + length, max(top, length)
            cost = top * (len(batch) + 1) if self.padded else total
            if batch and cost > self.budget:
                yield batch
                batch, total, top = [], length, length
            batch.append(index)
        if batch:
            yield batch

    def _kept(self, indices: Iterable[int]) -> Iterable[int]:
        if self.longest is None:
            return indices
        values, most = self.lengths.values, self.longest
        return (index for index in indices if values[index] <= most)

    def _plan(self, seed: int, epoch: int) -> tuple[Tensor, list[int]]:
        order, values = self._order(seed, epoch), self.lengths.values
        if self.longest is not None:
            order = order[values[order] <= self.longest]
        if self._span:
            order = _windows(order, values, self._span, snake=True)
        lengths = values[order]
        if self.padded:
            ends = _padded_ends(lengths.tolist(), self.budget)
        else:
            ends = greedy_ends(lengths, self.budget)
        self._counts[seed, epoch] = len(ends) - 1
        return order, ends

    def count(self, seed: int, epoch: int) -> int:
        """How many batches that epoch has."""
        if self.constant:
            seed, epoch = 0, 0
        if (seed, epoch) not in self._counts:
            self._plan(seed, epoch)
        return self._counts[seed, epoch]

    def __repr__(self) -> str:
        return code("by_tokens", self)


@attrs.frozen(repr=False)
class ByLength(_Seeded):
    """What `by_length` gives: a batch sampler, and a function of streams of indices."""

    batch_size: int = attrs.field(validator=whole(1))  # rows of a batch over all ranks
    lengths: Lengths = attrs.field(converter=as_lengths)
    shuffle: bool = False
    window: int = attrs.field(default=50, validator=whole(1))  # batches sorted together
    drop_last: bool = False

    constant = True  # each epoch has equally many batches

    def __call__(self, indices: Iterable[int]) -> Iterator[list[int]]:
        """The lists that a stream of indices is cut into, in the stream's order."""
        values, size, stream = self.lengths.values, self.batch_size, iter(indices)
        while window := list(islice(stream, self.window * size)):
            if self.drop_last:
                window = window[: len(window) // size * size]
            window.sort(key=lambda index: int(values[index]))
            for low in range(0, len(window), size):
                yield window[low : low + size]

    def _plan(self, seed: int, epoch: int) -> tuple[Tensor, list[int]]:
        order, size = self._order(seed, epoch), self.batch_size
        if self.drop_last:
            order = order[: len(order) // size * size]
        order = _windows(order, self.lengths.values, self.window * size, snake=False)
        ends = [*range(0, len(order), size), len(order)]
        return order, ends if len(order) else [0]

    def count(self, seed: int, epoch: int) -> int:
        """How many batches that epoch has."""
        n, size = len(self.lengths), self.batch_size
        return n // size if self.drop_last else -(-n // size)

    def __repr__(self) -> str:
        return code("by_length", self)


def greedy_ends(lengths: Tensor, budget: int) -> list[int]:
    """Where each run of items ends that `budget` tokens hold, after a 0.

    From each item its run's end is found for all items at once; then the ends are
    followed from the first. Each length is at most `budget`.
    """
    if not len(lengths):
        return [0]
    sums = lengths.cumsum(0)
    most = sums - lengths + budget  # tokens up to each item's start, and a budget more
    following = torch.searchsorted(sums, most, right=True).tolist()
    ends = [0]
    while ends[-1] < len(lengths):
        ends.append(following[ends[-1]])
    return ends


def _padded_ends(lengths: list[int], budget: int) -> list[int]:
    ends, rows, top = [0], 0, 0
    for i, length in enumerate(lengths):
        rows += 1
        if length > top:
            top = length
        if rows > 1 and rows * top > budget:
            ends.append(i)
            rows, top = 1, length
    return [*ends, len(lengths)] if lengths else ends


def _windows(order: Tensor, values: Tensor, span: int, *, snake: bool) -> Tensor:
    """`order`, each `span` items of it sorted by length, equal ones as they stand.

    With `snake` every second window runs from long to short, so that a batch that
    reaches over a window's end still holds items of like length.
    """
    full = len(order) // span * span
    parts = [order[:full].view(-1, span), order[full:].view(1, -1)]
    done = list[Tensor]()
    for number, part in zip((0, full // span), parts, strict=True):
        if part.numel():
            part = part.gather(1, values[part].argsort(dim=1, stable=True))
            if snake:
                part[1 - number % 2 :: 2] = part[1 - number % 2 :: 2].flip(1)
            done.append(part.reshape(-1))
    return torch.cat(done) if done else order


def _snaked(indices: Iterable[int], span: int, values: Tensor) -> Iterator[int]:
    """A stream as `_windows` with `snake` sorts it."""
    stream, turned = iter(indices), False
    if not span:
        yield from stream
        return
    while window := list(islice(stream, span)):
        window.sort(key=lambda index: int(values[index]))
        yield from reversed(window) if turned else window
        turned = not turned
