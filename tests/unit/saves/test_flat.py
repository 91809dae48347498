"""Runs of a tensor as boxes: each element once, in order, where it lies."""

import itertools
import math

import torch
from hypothesis import given, strategies as st

from accelx.saves.boxes import Box, tile
from accelx.saves.flat import Flat, blank, boxes, pieces
from accelx.saves.lie import here, lie, local_at

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def cuts(draw):
    """A tensor that counts its elements, and one of its runs over some ranks."""
    shape = draw(shapes)
    whole = torch.arange(math.prod(shape)).reshape(shape)
    inner = draw(st.lists(st.integers(0, whole.numel()), max_size=3))
    ends = [0, *sorted(inner), whole.numel()]
    return whole, tuple(itertools.pairwise(ends))


def of(whole, runs, rank):
    """What a rank holds of the tensor."""
    low, high = runs[rank]
    return Flat(whole.reshape(-1)[low:high], tuple(whole.shape), runs, rank)


@given(cuts())
def test_boxes_of_all_ranks_are_each_element_once(cut):
    """In few boxes: a run is at most the end of a row, rows and a beginning, a dim."""
    whole, runs = cut
    each = [boxes(run, tuple(whole.shape)) for run in runs]
    assert tile([box for run in each for box in run], whole.shape) is None
    assert all(len(run) <= max(1, 2 * whole.dim() - 1) for run in each)


@given(cuts())
def test_a_box_has_the_numbers_that_the_whole_tensor_has_there(cut):
    """And is a view of the run, so that what is read into it is there."""
    whole, runs = cut
    for rank in range(len(runs)):
        flat = of(whole.clone(), runs, rank)
        for box, memory in pieces(flat):
            place = tuple(slice(a, b) for a, b in zip(box.lo, box.hi, strict=True))
            assert torch.equal(memory, whole[place])
            assert torch.equal(local_at(flat, box), memory)
            memory.fill_(-1)
        assert (flat.local == -1).all()


@given(cuts())
def test_each_rank_says_the_same_of_who_holds_what(cut):
    """And finds its own boxes in it."""
    whole, runs = cut
    told = [lie("w", of(whole, runs, rank), {}) for rank in range(len(runs))]
    assert all(one == told[0] for one in told)
    assert told[0].shape == tuple(whole.shape)
    for rank in range(len(runs)):
        own = [s.box for s in told[0].slices if s.ranks == (rank,)]
        assert own == [box for box, _ in here(of(whole, runs, rank), {})]


def test_control_a_box_is_not_any_run():
    """The run from the middle of a row to the middle of the next is two boxes."""
    found = boxes((2, 5), (2, 4))
    assert found == [Box((0, 2), (1, 4)), Box((1, 0), (2, 1))]


def test_a_blank_one_lies_alike_in_memory_of_its_own():
    """In another dtype, too."""
    flat = of(torch.ones(4, 2), ((0, 3), (3, 8)), 1)
    made = blank(flat, torch.float64)
    assert (made.shape, made.runs, made.dtype) == (flat.shape, flat.runs, torch.float64)
    made.local.fill_(2)
    assert (flat.local == 1).all()
