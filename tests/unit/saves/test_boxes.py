"""Arithmetic on boxes, against arrays in which every element is its own number."""

import numpy as np
from hypothesis import given, strategies as st

from accelx.saves import boxes
from accelx.saves.boxes import Box

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def box_in(draw, shape):
    """A box of at least one element within `shape`."""
    lo = tuple(draw(st.integers(0, n - 1)) for n in shape)
    hi = tuple(draw(st.integers(low + 1, n)) for low, n in zip(lo, shape, strict=True))
    return Box(lo, hi)


@st.composite
def shape_and_boxes(draw, count):
    """A shape and boxes within it."""
    shape = draw(SHAPES)
    return shape, [draw(box_in(shape)) for _ in range(count)]


def numbers(shape):
    """Each element is its row-major position."""
    return np.arange(np.prod(shape, dtype=int)).reshape(shape)


def cut(array, box, outer=None):
    """The elements of an array, which holds `outer`, that lie in `box`."""
    start = outer.lo if outer else (0,) * len(box.lo)
    return array[
        tuple(
            slice(low - o, high - o)
            for low, high, o in zip(box.lo, box.hi, start, strict=True)
        )
    ]


@given(shape_and_boxes(2))
def test_an_overlap_is_what_lies_in_both(case):
    """The set of elements of the overlap is the intersection of the sets."""
    shape, (a, b) = case
    whole = numbers(shape)
    both = boxes.overlap(a, b)
    common = set(cut(whole, a).ravel()) & set(cut(whole, b).ravel())
    assert common == (set() if both is None else set(cut(whole, both).ravel()))
    assert both == boxes.overlap(b, a)


@given(shape_and_boxes(1), st.data())
def test_a_span_is_where_the_elements_lie(case, data):
    """First and last position of a part within an outer box, and if it is a run."""
    shape, (outer,) = case
    inner = data.draw(box_in(outer.shape))
    part = Box(
        tuple(a + o for a, o in zip(inner.lo, outer.lo, strict=True)),
        tuple(a + o for a, o in zip(inner.hi, outer.lo, strict=True)),
    )
    held = numbers(outer.shape)
    wanted = cut(held, part, outer).ravel()
    assert boxes.span(part, outer) == (wanted.min(), wanted.max() + 1)
    assert boxes.first(part, outer) == wanted[0]
    run = len(wanted) == wanted.max() - wanted.min() + 1
    assert boxes.contiguous(part, outer) == run
    assert part.volume == len(wanted)
    assert boxes.whole(shape).volume == np.prod(shape, dtype=int)


@given(SHAPES)
def test_strides_are_those_of_numpy(shape):
    """In elements, row-major."""
    wanted = tuple(s // 8 for s in np.zeros(shape, dtype=np.int64).strides)
    assert boxes.strides(shape) == wanted


@given(shape_and_boxes(1), st.integers(-1, 7))
def test_rows_are_the_box_in_order(case, count):
    """Cut along dim 0 into at most `count` rows, none lost, none twice."""
    shape, (box,) = case
    parts = boxes.rows(box, count)
    whole = numbers(shape)
    joined = np.concatenate([cut(whole, part).ravel() for part in parts])
    assert list(joined) == list(cut(whole, box).ravel())
    assert all(not p.lo or p.shape[0] <= max(count, 1) for p in parts)


@given(shape_and_boxes(4), st.integers(0, 4))
def test_a_tiling_is_each_element_once(case, count):
    """None where every element is counted once, and else a reason."""
    shape, found = case
    found = found[:count]
    seen = np.zeros(shape, dtype=int)
    for box in found:
        seen[tuple(slice(a, b) for a, b in zip(box.lo, box.hi, strict=True))] += 1
    assert (boxes.tile(found, shape) is None) == bool((seen == 1).all())


@st.composite
def tilings(draw):
    """A shape cut at random into boxes that hold each element once."""
    shape = draw(SHAPES)
    parts = [boxes.whole(shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        box = parts.pop(draw(st.integers(0, len(parts) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(box.lo[dim], box.hi[dim]))
        for lo, hi in ((box.lo[dim], at), (at, box.hi[dim])):
            if lo < hi:
                low, high = list(box.lo), list(box.hi)
                low[dim], high[dim] = lo, hi
                parts.append(Box(tuple(low), tuple(high)))
    return shape, draw(st.permutations(parts))


@given(tilings(), st.data())
def test_a_cut_tensor_is_a_tiling_until_a_box_goes_comes_or_moves(case, data):
    """However it is cut; without a box, with one twice, or one outside it is none."""
    shape, parts = case
    assert boxes.tile(parts, shape) is None
    one = data.draw(st.sampled_from(parts))
    assert "overlap" in boxes.tile([*parts, one], shape)
    rest = list(parts)
    rest.remove(one)
    assert "hold" in boxes.tile(rest, shape)
    if shape:
        moved = Box(tuple(n + 9 for n in one.lo), tuple(n + 9 for n in one.hi))
        assert "outside" in boxes.tile([*rest, moved], shape)
        assert "dims" in boxes.tile([Box((0,) * 9, (1,) * 9)], shape)


def test_an_empty_tensor_has_no_slices():
    """No box at all is its tiling, and any box is too many."""
    assert boxes.tile([], (3, 0)) is None
    assert "empty" in boxes.tile([Box((0, 0), (3, 0))], (3, 0))
