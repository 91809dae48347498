"""Marks of real rows travel on tensors, whatever container holds them."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, namedtuple

import attrs
import pytest
import torch
from hypothesis import given, strategies as st

from accelx.errors import DataError
from accelx.rows import (
    Rows,
    Waited,
    leading,
    mark,
    one_mark,
    row_weights,
    rows_of,
    stamp,
)

Pair = namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass(frozen=True)
class Plain:
    """A user's frozen dataclass."""

    x: object
    y: object


@attrs.frozen
class Attrs:
    """A user's attrs record."""

    x: object
    y: object


CONTAINERS = [
    lambda x, y: x,
    lambda x, y: [x, y],
    lambda x, y: ("text", x, y),
    lambda x, y: {"name": ["a"], "x": x, "y": y},
    lambda x, y: OrderedDict(x=x, y=y),
    lambda x, y: UserDict({"x": x, "deep": [{"y": y}]}),
    Pair,
    Plain,
    Attrs,
]


@pytest.mark.parametrize("make", CONTAINERS)
def test_a_mark_is_found_again_in_every_container(make):
    """The batch stays the same object, every tensor in it is marked."""
    x, y = torch.zeros(3, 2), torch.zeros(3)
    batch = make(x, y)
    assert rows_of(batch) is None
    assert leading(batch) == 3
    assert mark(batch, 2, 7) is batch
    assert rows_of("model", batch) == Rows(2, 7)
    assert rows_of(x) == Rows(2, 7)


def test_every_tensor_of_a_nested_batch_is_marked():
    """Whichever tensor the loss looks at, it carries the mark."""
    leaves = [torch.zeros(2), torch.zeros(()), torch.zeros(4, 1)]
    record = Rows(2, 2)
    stamp({"a": leaves[0], "b": (leaves[1], [leaves[2]])}, record)
    assert all(rows_of(leaf) is record for leaf in leaves)


def test_leading_skips_scalars():
    """A 0-dim tensor has no rows; the next one is asked."""
    assert leading(None, [torch.zeros(()), torch.zeros(5, 2)]) == 5
    assert leading("text", 3, torch.zeros(())) is None
    heat = mark({"heat": torch.zeros(()), "x": torch.zeros(5, 2)}, 5, 5)
    assert leading(heat) == 5  # marked, the scalar too


def test_only_a_placeholder_needs_a_tensor_to_be_marked():
    """Text alone passes on one rank; on several its rows could not be weighed."""
    batch = {"text": ["a", "b"]}
    assert rows_of(mark(batch, 2, 2)) is None
    for rows in (2, 0):
        with pytest.raises(DataError, match=rf"\({rows} of 4 here\).*collate_fn"):
            mark(batch, rows, 4)


class Bag:
    """A batch of a class that is no container to anybody."""

    def __init__(self):
        self.x = torch.ones(2, 3)


def test_an_object_of_the_user_s_own_carries_its_mark():
    """Its tensors cannot be seen, so it is marked itself."""
    assert rows_of(mark(Bag(), 2, 5)) == Rows(2, 5)
    assert rows_of(Bag()) is None


@given(st.integers(1, 9), st.integers(0, 9), st.booleans())
def test_weights_are_one_for_real_rows_and_come_first(length, rows, padded):
    """Their sum is the rows, their shape the batch's, whatever the container."""
    rows = min(rows, length) if padded else length
    x = torch.ones(length, 2, dtype=torch.float64)
    batch = stamp({"heat": torch.zeros(()), "x": x}, Rows(rows, 99, padded))
    weights = row_weights(batch)
    assert weights.tolist() == [1.0] * rows + [0.0] * (length - rows)
    assert (weights.dtype, weights.device) == (torch.float32, x.device)
    assert torch.equal(row_weights(torch.ones(length)), torch.ones(length))


def test_weights_of_what_has_no_rows_are_refused():
    """No tensor to count, and fewer or more rows than were marked."""
    with pytest.raises(DataError, match="got dict without a tensor"):
        row_weights({"heat": torch.zeros(())})
    with pytest.raises(DataError, match=r"says that it has 5 rows here, but .* 3"):
        row_weights(mark(torch.ones(3), 5, 5))
    with pytest.raises(DataError, match=r"says that it has 5 rows here, but .* 10"):
        row_weights(mark(torch.ones(10), 5, 5))
    assert row_weights(mark(torch.ones(2), 0, 5)).tolist() == [0.0, 0.0]


def test_waiting_is_no_part_of_what_a_mark_is():
    """Marks of one batch are one, however long it took; a step empties the count."""
    waited = Waited(0.5)
    one, other = Rows(2, 4, waited=waited), Rows(2, 4)
    assert one == other
    assert len({one, other}) == 1
    assert repr(one) == repr(other)
    one_mark((stamp(torch.ones(2), one), stamp(torch.ones(2), other)))
    assert (waited.take(), waited.take()) == (0.5, 0.0)
    assert one != Rows(2, 4, padded=True)
