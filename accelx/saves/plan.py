"""Who writes what: each slice once, and about equally much on each rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import attrs

from accelx.saves.boxes import Box, Ints, whole
from accelx.saves.dtypes import KINDS
from accelx.saves.lie import Lie, Slice
from accelx.saves.manifest import Entry, Layout, Piece
from accelx.saves.strict import digest, dumps

SPLIT = 1 << 20  # bytes from which a tensor that all ranks hold is cut between them


@attrs.frozen(slots=False)
class Plan:
    """The tensors of a manifest, and how each is cut; part r is rank r's."""

    entries: Mapping[str, Entry]
    layouts: tuple[Layout, ...]

    @cached_property
    def said(self) -> Mapping[str, str]:
        """Of each tensor what ranks compare: dtype, shape and cuts."""
        cuts = [digest(repr(layout).encode()) for layout in self.layouts]
        return {
            k: f"{e.dtype} {e.shape} {cuts[e.layout]}" for k, e in self.entries.items()
        }

    @cached_property
    def digest(self) -> str:
        """One of `said`."""
        return digest(dumps(self.said))

    def of(self, part: int) -> list[tuple[str, int, Box]]:
        """What a part holds, in order: name, number of the piece, box."""
        mine: dict[int, list[int]] = {}
        for i, layout in enumerate(self.layouts):
            mine[i] = [k for k, piece in enumerate(layout) if piece.part == part]
        return [
            (name, k, self.layouts[entry.layout][k].box)
            for name, entry in self.entries.items()
            for k in mine[entry.layout]
        ]


@attrs.frozen
class Share:
    """A slice that one rank writes."""

    name: str
    entry: Entry
    piece: int  # its number in the tensor's layout
    box: Box
    shape: Ints
    cut: bool  # out of a tensor that this rank holds whole


@attrs.define(eq=False)
class Known:
    """What saves of one rank have in common while its tensors lie as they did."""

    rank: int
    world: int
    memo: dict[Any, Any] = attrs.field(factory=dict)  # of `lie`
    lies: list[tuple[str, Lie]] = attrs.field(factory=list)
    plan: Plan = attrs.field(factory=lambda: Plan({}, ()))
    shares: list[Share] = attrs.field(factory=list)  # this rank's

    def planned(self, lies: Mapping[str, Lie]) -> Plan:
        """`planned(lies, world)`; the same object while that would be equal."""
        now = list(lies.items())  # their order counts
        if now != self.lies:
            self.plan = planned(lies, self.world)
            self.shares = [
                _share(self.plan, lies, *one) for one in self.plan.of(self.rank)
            ]
            if self.lies:
                self.memo.clear()  # of shapes that may be gone
        self.lies = now
        return self.plan


def _share(
    plan: Plan, lies: Mapping[str, Lie], name: str, piece: int, box: Box
) -> Share:
    entry = plan.entries[name]
    cut = lies[name].slices is None and box != whole(entry.shape)
    return Share(name, entry, piece, box, box.shape, cut)


def planned(lies: Mapping[str, Lie], world: int) -> Plan:
    """The plan for tensors that lie so on `world` ranks; the same on each of them.

    A slice that several ranks hold is written by one of them, in turn. Tensors that all
    hold are laid end to end and cut into equal shares at rows of dim 0.
    """
    total = sum(_size(one) for one in lies.values() if one.slices is None)
    seen: dict[Layout, int] = {}
    cut: dict[tuple[int, int], int] = {}  # hashing 1,024 slices of each tensor is slow
    turns: dict[int, int] = {}
    entries: dict[str, Entry] = {}
    at = 0
    for number, (name, one) in enumerate(lies.items()):
        if one.slices is None:
            index = seen.setdefault(_shares(one, at, total, world), len(seen))
            at += _size(one)
        else:
            same = id(one.slices)
            if same not in turns:
                turns[same] = max((len(s.ranks) for s in one.slices), default=1)
            turn = number % turns[same]
            key = same, turn
            if key not in cut:
                layout = _in_turn(one.slices, turn)
                cut[key] = seen.setdefault(layout, len(seen))
            index = cut[key]
        entries[name] = Entry(one.dtype, one.shape, index, number)
    return Plan(entries, tuple(seen))


def _in_turn(slices: tuple[Slice, ...], turn: int) -> Layout:
    return tuple(Piece(s.box, s.ranks[turn % len(s.ranks)]) for s in slices)


def _size(one: Lie) -> int:
    return math.prod(one.shape) * KINDS[one.dtype].width


def _shares(one: Lie, at: int, total: int, world: int) -> Layout:
    """The rows of a tensor at byte `at` of `total`, by the rank that writes them."""
    size = _size(one)
    if not size:
        return ()
    owner = min(world - 1, (at + size // 2) * world // total)
    if size < SPLIT or not one.shape or world == 1:
        return (Piece(whole(one.shape), owner),)
    row = size // one.shape[0]
    ends = [_row(total * (r + 1) // world - at, row, one.shape) for r in range(world)]
    ends[-1] = one.shape[0]
    starts = [0, *ends[:-1]]
    return tuple(
        Piece(Box((low, *(0,) * (len(one.shape) - 1)), (high, *one.shape[1:])), r)
        for r, (low, high) in enumerate(zip(starts, ends, strict=True))
        if high > low
    )


def _row(byte: int, row: int, shape: Ints) -> int:
    return min(max(0, round(byte / row)), shape[0])
