"""Who writes what: each slice once, and about equally much on each rank."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs

from accelx.saves.boxes import Box, Ints, whole
from accelx.saves.dtypes import KINDS
from accelx.saves.lie import Lie, Slice
from accelx.saves.manifest import Entry, Layout, Piece

SPLIT = 1 << 20  # bytes from which a tensor that all ranks hold is cut between them


@attrs.frozen
class Plan:
    """The tensors of a manifest, and how each is cut; part r is rank r's."""

    entries: Mapping[str, Entry]
    layouts: tuple[Layout, ...]

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
