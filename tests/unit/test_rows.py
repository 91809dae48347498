"""Marks of real rows travel on tensors, whatever container holds them."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, namedtuple

import attrs
import pytest
import torch

from accelx.errors import DataError
from accelx.rows import Rows, leading, mark, rows_of, stamp

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
