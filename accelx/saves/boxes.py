"""Which bytes of a stored slice a wanted one needs: arithmetic on boxes of indices."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence

import attrs

Ints = tuple[int, ...]


@attrs.frozen
class Box:
    """The indices from `lo` up to `hi` in each dim of a tensor; () for a scalar."""

    lo: Ints
    hi: Ints

    @property
    def shape(self) -> Ints:
        """How many indices it has in each dim."""
        return tuple(map(operator.sub, self.hi, self.lo))  # as many of each

    @property
    def volume(self) -> int:
        """How many elements it holds."""
        return math.prod(self.shape)


def whole(shape: Sequence[int]) -> Box:
    """All of a tensor of that shape."""
    return Box((0,) * len(shape), tuple(shape))


def overlap(a: Box, b: Box) -> Box | None:
    """What lies in both; None where nothing does."""
    lo = tuple(map(max, a.lo, b.lo))
    hi = tuple(map(min, a.hi, b.hi))
    if any(low >= high for low, high in zip(lo, hi, strict=True)):
        return None
    return Box(lo, hi)


def strides(shape: Sequence[int]) -> Ints:
    """Row-major strides, in elements."""
    steps, step = list[int](), 1
    for size in reversed(shape):
        steps.append(step)
        step *= size
    return tuple(reversed(steps))


def first(part: Box, outer: Box) -> int:
    """The row-major position of `part`'s first element within `outer`."""
    steps = strides(outer.shape)
    return sum((p - o) * s for p, o, s in zip(part.lo, outer.lo, steps, strict=True))


def span(part: Box, outer: Box) -> tuple[int, int]:
    """Row-major positions within `outer` of `part`: its first, and behind its last."""
    steps = strides(outer.shape)
    start = first(part, outer)
    reach = sum((n - 1) * s for n, s in zip(part.shape, steps, strict=True))
    return start, start + reach + 1


def contiguous(part: Box, outer: Box) -> bool:
    """Whether `part` is one run of bytes in `outer`."""
    start, stop = span(part, outer)
    return stop - start == part.volume


def rows(box: Box, count: int) -> list[Box]:
    """`box` cut along dim 0 into boxes of at most `count` rows; a scalar is one."""
    if not box.lo:
        return [box]
    ends = range(box.lo[0], box.hi[0], max(1, count))
    return [
        Box((at, *box.lo[1:]), (min(at + max(1, count), box.hi[0]), *box.hi[1:]))
        for at in ends
    ]


def tile(boxes: Sequence[Box], shape: Sequence[int]) -> str | None:
    """Why `boxes` are not each element of a tensor once; None where they are."""
    outer = whole(shape)
    for box in boxes:
        if len(box.lo) != len(shape) or len(box.hi) != len(shape):
            return f"a slice has {len(box.lo)} dims of {len(shape)}"
        if not all(
            0 <= low < high <= n
            for low, high, n in zip(box.lo, box.hi, shape, strict=True)
        ):
            return f"the slice {box.lo} to {box.hi} is empty or outside"
    clash = _clash(boxes, len(shape))
    if clash is not None:
        return f"slices at {clash[0].lo} and {clash[1].lo} overlap"
    held = sum(box.volume for box in boxes)
    if held != outer.volume:
        return f"its slices hold {held} of {outer.volume} elements"
    return None


def _clash(boxes: Sequence[Box], dims: int) -> tuple[Box, Box] | None:
    """Two boxes that overlap, by a sweep along the dim with the most cuts."""
    if not dims:
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    dim = max(range(dims), key=lambda d: len({box.lo[d] for box in boxes}))
    open_: list[Box] = []
    for box in _by(boxes, dim):
        open_ = [other for other in open_ if other.hi[dim] > box.lo[dim]]
        for other in open_:
            if overlap(box, other) is not None:
                return other, box
        open_.append(box)
    return None


def _by(boxes: Iterable[Box], dim: int) -> list[Box]:
    return sorted(boxes, key=lambda box: box.lo[dim])
