"""Whether a tensor is the same in two checkpoints: by digests, or by its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import attrs

from accelx.saves.boxes import Box, rows, strides, whole
from accelx.saves.commit import Found, open_manifest
from accelx.saves.manifest import Entry, Index, Manifest
from accelx.saves.verify import open_index
from accelx.storage import Store

LOT = 64 << 20  # bytes of each side that are in memory at once, about
Pair = tuple[str, str]  # a tensor's name in the one checkpoint and in the other
Block = tuple[Pair, Box, str]  # rows of a tensor, and its dtype


@attrs.define(eq=False)
class Side:
    """One of two checkpoints."""

    store: Store
    manifest: Manifest
    indices: dict[int, Index] = attrs.field(factory=dict)


def opened(one: Found) -> Side:
    """A checkpoint that is to be compared."""
    return Side(*open_manifest(one))


def digests(side: Side, entry: Entry) -> dict[Box, tuple[str, ...]]:
    """Each slice of a tensor with the digests of its chunks, from the indices alone."""
    found: dict[Box, tuple[str, ...]] = {}
    for k, piece in enumerate(side.manifest.layouts[entry.layout]):
        if piece.part not in side.indices:
            index = open_index(side.store, side.manifest, piece.part, True)
            side.indices[piece.part] = index
        found[piece.box] = side.indices[piece.part].slices[entry.number, k].digests
    return found


def cut_alike(left: Manifest, right: Manifest, layouts: tuple[int, int]) -> bool:
    """Whether two layouts are the same slices and digests, in whatever parts."""
    ours, theirs = left.layouts[layouts[0]], right.layouts[layouts[1]]
    boxes = {piece.box for piece in ours}
    return left.chunk == right.chunk and boxes == {piece.box for piece in theirs}


def other_bytes(
    left: Side, right: Side, pairs: Sequence[Pair], told: Callable[[int], None]
) -> set[Pair]:
    """Those of `pairs`, of one dtype and shape each, whose bytes are not the same.

    Reads both sides, a lot at a time, and checks the digests of what it reads. Imports
    torch. Raises DamagedError.
    """
    import torch

    from accelx.saves.memory import flat
    from accelx.saves.read import Want, reader

    def numbers(read: Any, lot: Sequence[Block], side: int) -> list[Any]:
        wants = list[Any]()
        for pair, box, dtype in lot:
            kind = getattr(torch, dtype)
            out = torch.empty(box.shape, dtype=kind, device="cpu")
            wants.append(Want(pair[side], box, out))
        read(wants)
        return [flat(want.out) for want in wants]

    other = set[Pair]()
    ours = reader(left.store, left.manifest, True)
    theirs = reader(right.store, right.manifest, True)
    with ours as read_left, theirs as read_right:
        for lot in _lots(left.manifest, pairs):
            a, b = numbers(read_left, lot, 0), numbers(read_right, lot, 1)
            told(sum(one.numel() for one in a))
            for (pair, _, _), x, y in zip(lot, a, b, strict=True):
                if not torch.equal(x, y):
                    other.add(pair)
    return other


def _lots(manifest: Manifest, pairs: Iterable[Pair]) -> Iterator[list[Block]]:
    """The tensors in blocks of rows, as many together as make a lot."""
    lot, held = list[Block](), 0
    for pair in pairs:
        entry = manifest.tensors[pair[0]]
        row = strides(entry.shape)[0] * entry.width if entry.shape else entry.width
        for box in rows(whole(entry.shape), LOT // max(row, 1)):
            lot.append((pair, box, entry.dtype))
            held += box.volume * entry.width
            if held >= LOT:
                yield lot
                lot, held = [], 0
    if lot:
        yield lot
