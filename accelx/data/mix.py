"""Which source each row of a mixture comes from, and which of its items it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from numbers import Integral, Real
from typing import Any

import attrs
import torch
from torch import Tensor

from accelx import fetch
from accelx.data.lengths import whole
from accelx.errors import DataError
from accelx.permutation import check_seed, key, permute

_MIX = 113  # names the order of a mixture's sources apart from that of a loader
PERIOD = 10_000  # rows in which each source comes its exact count of times, at most

Weight = int | float | Fraction


def mix(
    sources: Mapping[str, Any],
    weights: Mapping[str, Weight] | Sequence[Weight],
    seed: int = 0,
    *,
    shuffle: bool = True,
    length: int | None = None,
) -> Mixture:
    """One dataset of several, in exact proportions: a pure function of position.

    `sources` are map-style datasets by name, and `weights` positive numbers, by the
    same names or in the same order, of any sum. They are taken as the decimals that
    they are written as: 0.7 is 7/10. In each period, a common denominator of the
    weights, each source comes exactly its share of times, spread evenly: over any rows
    from the first, a source is off its share by at most (1 + number of sources * share)
    / 2 rows. Where the denominator is more than 10,000, the period is 10,000 and the
    counts are the nearest that sum to it; `proportions` and the printed form show them.

    The mixture is endless, cut into epochs of `length` rows, by default as many as all
    sources hold. A source goes through its items each once, then once more: its own
    epochs go on over those of the mixture, each in an order of its own by `seed`, or as
    they stand with `shuffle=False`. So `seed` and `shuffle` here order the rows; the
    `shuffle=` of a DataLoader over the mixture, and a loader's seed, change nothing.

    Raises DataError for an empty source, weights that do not fit, a source that would
    never come.
    """
    _check_sources(sources)
    named = _named(tuple(sources), weights)
    check_seed(seed)
    if length is None:
        length = sum(map(len, sources.values()))
    return Mixture(dict(sources), named, seed, shuffle, length)


@attrs.frozen(eq=False, repr=False)
class Mixture:
    """What `mix` gives: a map-style dataset with an order of its own.

    An index names an item of a source: the items of the first source come first, then
    those of the second. Which index stands at which row is what `order_at` says, and a
    loader of accelx asks it. torch's own DataLoader does not: give it
    `sampler=mixture.order(epoch)`.
    """

    sources: dict[str, Any]
    weights: dict[str, Weight]  # as they were given
    seed: int
    shuffle: bool
    length: int = attrs.field(validator=whole(1))  # rows of an epoch
    counts: dict[str, int] = attrs.field(init=False)  # rows of each in one period
    _sizes: tuple[int, ...] = attrs.field(init=False)
    _offsets: Tensor = attrs.field(init=False)  # (sources,) int64
    _source: Tensor = attrs.field(init=False)  # (period,) int64, of each row
    _turn: Tensor = attrs.field(init=False)  # (period,) int64, earlier rows of it

    def __attrs_post_init__(self) -> None:
        sizes = tuple(map(len, self.sources.values()))
        offsets = torch.tensor([0, *accumulate(sizes[:-1])])
        counts = _counts(self.asked)
        woven = _woven(counts.values())
        made = {"counts": counts, "_sizes": sizes, "_offsets": offsets}
        for name, value in {**made, "_source": woven[0], "_turn": woven[1]}.items():
            object.__setattr__(self, name, value)

    @property
    def asked(self) -> dict[str, Fraction]:
        """The share of rows that each source was to have, by its weight."""
        parts = {name: _exact(weight) for name, weight in self.weights.items()}
        return {name: part / sum(parts.values()) for name, part in parts.items()}

    @property
    def proportions(self) -> dict[str, Fraction]:
        """The share of rows that each source has, exactly, over a period."""
        period = sum(self.counts.values())
        return {name: Fraction(count, period) for name, count in self.counts.items()}

    def order_at(
        self,
        positions: Tensor,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        batch_size: int = 1,
    ) -> Tensor:
        """The indices at `positions` of an epoch: int64, of the same shape.

        Pure; time and memory are those of `positions`, wherever they lie. `shuffle`,
        `seed` and `batch_size` are a loader's and change nothing: see `mix`.
        """
        rows = positions.reshape(-1) + epoch * self.length
        period = len(self._source)
        cycle, slot = rows // period, rows % period
        source, turn = self._source[slot], self._turn[slot]
        out = torch.empty_like(rows)
        for number, count in enumerate(self.counts.values()):
            here = (source == number).nonzero().view(-1)
            if len(here):
                drawn = cycle[here] * count + turn[here]
                out[here] = self._items(number, drawn) + self._offsets[number]
        return out.view(positions.shape)

    def order(self, epoch: int = 0) -> list[int]:
        """The indices of an epoch, in order: a sampler for torch's own DataLoader."""
        return self.order_at(torch.arange(self.length), epoch=epoch).tolist()

    def source_of(self, index: int) -> str:
        """The name of the source that an index is of. Raises IndexError."""
        return tuple(self.sources)[self._place(index)[0]]

    def set_epoch(self, epoch: int) -> None:
        """Tell the sources that want to know which epoch of the mixture it is."""
        for source in self.sources.values():
            if hasattr(source, "set_epoch"):
                source.set_epoch(epoch)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        places = [self._place(index) for index in indices]
        found: list[Any] = [None] * len(places)
        for number, (name, source) in enumerate(self.sources.items()):
            here = [i for i, place in enumerate(places) if place[0] == number]
            if not here:
                continue
            try:
                read = fetch.items(source, [places[i][1] for i in here])
            except Exception as error:
                error.add_note(f"accelx: an item of the source {name!r}")
                raise
            for i, item in zip(here, read, strict=True):
                found[i] = item
        return found

    def _items(self, number: int, drawn: Tensor) -> Tensor:
        """The items that are a source's draws number `drawn`: (n,) int64."""
        size = self._sizes[number]
        epoch, at = drawn // size, drawn % size
        source = tuple(self.sources.values())[number]
        if not self.shuffle and not hasattr(source, "order_at"):
            return at
        own, out = key(_MIX, self.seed, number) >> 1, torch.empty_like(at)
        for one in epoch.unique().tolist():
            here = (epoch == one).nonzero().view(-1)
            out[here] = self._ordered(source, size, own, one, at[here])
        return out

    def _ordered(
        self, source: Any, size: int, seed: int, epoch: int, at: Tensor
    ) -> Tensor:
        """The items at rows `at` of one epoch of a source, in its own order if any."""
        if not hasattr(source, "order_at"):
            return permute(size, seed, epoch, at)
        words = {"shuffle": self.shuffle, "seed": seed, "epoch": epoch}
        return source.order_at(at, **words, batch_size=1)

    def _place(self, index: int) -> tuple[int, int]:
        """The source's number, and the item in it, of an index."""
        left = int(index)
        for number, size in enumerate(self._sizes):
            if 0 <= left < size:
                return number, left
            left -= size
        raise IndexError(
            f"an index of this mixture is one of 0 to {sum(self._sizes) - 1}, got "
            f"{index}; write mixture.order_at(positions, epoch=...) for the row at a "
            "position"
        )

    def __repr__(self) -> str:
        held = ", ".join(f"{n!r}: {_brief(s)}" for n, s in self.sources.items())
        parts = [f"{{{held}}}", repr(self.weights)]
        parts += [f"seed={self.seed}"] if self.seed else []
        parts += [] if self.shuffle else ["shuffle=False"]
        parts += [f"length={self.length}"] if self.length != sum(self._sizes) else []
        made = f"mix({', '.join(parts)})"
        if self.proportions == self.asked:
            return made
        given = ", ".join(f"{n} {c}/{PERIOD}" for n, c in self.counts.items())
        return f"{made}  # given: {given}"


def _brief(source: Any) -> str:
    return f"<{type(source).__name__} of {len(source)}>"


def _check_sources(sources: Any) -> None:
    if not isinstance(sources, Mapping) or not sources:
        raise DataError(
            "mix wants datasets by name, got "
            f"{'none' if isinstance(sources, Mapping) else type(sources).__name__}; "
            'write mix({"a": first, "b": second}, {"a": 0.7, "b": 0.3})'
        )
    for name, source in sources.items():
        if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise DataError(
                "a source of a mixture must have a length and items by index, got "
                f"{type(source).__name__} for {name!r}; give a map-style dataset"
            )
        if isinstance(source, Mixture):
            raise DataError(
                "a source of a mixture has each of its items once an epoch, got the "
                f"mixture {name!r}; mix the sources inside it instead"
            )
        if not len(source):
            raise DataError(
                f"a source of a mixture needs items, got none in {name!r}; leave it out"
            )


def _named(names: tuple[str, ...], weights: Any) -> dict[str, Weight]:
    """One weight for each source, by name; what is no positive number is refused."""
    if not isinstance(weights, Mapping):
        values = list(weights)
        if len(values) != len(names):
            raise DataError(
                f"mix wants one weight for each of {len(names)} sources, got "
                f"{len(values)}; write them by name: {{{names[0]!r}: ...}}"
            )
        weights = dict(zip(names, values, strict=True))
    if set(names) != set(weights):
        raise DataError(
            f"mix wants one weight for each of {sorted(names)}, got weights for "
            f"{sorted(map(str, weights))}; name each source once"
        )
    for name, weight in weights.items():
        if not isinstance(weight, Real) or not math.isfinite(weight) or weight <= 0:
            raise DataError(
                f"a weight is a number above 0, got {weight!r} for {name!r}; leave out "
                "a source that is not to come"
            )
    return {name: _plain(weights[name]) for name in names}


def _plain(weight: Real) -> Weight:
    """A number of Python's own; a float32 is the decimal that it prints as."""
    if isinstance(weight, Integral):
        return int(weight)
    return weight if isinstance(weight, Fraction) else float(str(weight))


def _exact(weight: Weight) -> Fraction:
    """The decimal that was written: 0.1 is 1/10, not the binary number next to it."""
    return Fraction(repr(weight) if isinstance(weight, float) else weight)


def _counts(shares: dict[str, Fraction]) -> dict[str, int]:
    """Rows of each source in a period: exact, or by the largest remainders."""
    period = math.lcm(*(share.denominator for share in shares.values()))
    if period <= PERIOD:
        return {name: int(share * period) for name, share in shares.items()}
    counts = {name: int(share * PERIOD) for name, share in shares.items()}
    left = sorted(shares, key=lambda name: counts[name] - shares[name] * PERIOD)
    for name in left[: PERIOD - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if not count:
            raise DataError(
                f"a source must come at least once in {PERIOD} rows, got a share of "
                f"{float(shares[name]):.3g} for {name!r}; write at least "
                f"{1 / PERIOD}, or leave it out"
            )
    return counts


def _woven(counts: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Of each row of a period, its source and how often that came before.

    The k-th row of a source of c stands at (k + 1/2) / c of the period; all are merged
    by that, equal ones in the order of the sources. Divisions of whole numbers up to
    20,000 round equal quotients equally and different ones differently.
    """
    turns = [torch.arange(count) for count in counts]
    sources = torch.cat([torch.full_like(t, i) for i, t in enumerate(turns)])
    places = torch.cat([(2 * t + 1).double() / (2 * len(t)) for t in turns])
    order = places.argsort(stable=True)
    return sources[order], torch.cat(turns)[order]
