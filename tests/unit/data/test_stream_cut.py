"""Whole batches, cut into the rows of each rank."""

from __future__ import annotations

from collections import namedtuple

import attrs
import pytest
import torch
from hypothesis import given, strategies as st

import accelx as ax
from accelx.data.stream_cut import cut, rows_in

Pair = namedtuple("Pair", ["left", "right"])


@attrs.frozen
class Record:
    """A batch of a user's own type."""

    x: object
    name: str


def batch_of(n):
    """Tensors, texts, ragged tensors, columns, a number and a scalar, of n rows."""
    return {
        "pair": Pair(torch.arange(n), torch.arange(2 * n).view(n, 2)),
        "texts": [f"row {i}" for i in range(n)],
        "ragged": [torch.arange(i) for i in range(n)],
        "record": Record(torch.arange(n).double(), "same for all"),
        "scalar": torch.tensor(3.0),
        "number": 7,
    }


def shares(n, world):
    """How many of n rows each rank has."""
    return tuple(n * (r + 1) // world - n * r // world for r in range(world))


@given(st.integers(1, 12), st.integers(1, 6))
def test_the_parts_in_order_are_the_batch(n, world):
    """Leaf by leaf; torch's own split is the judge. Types are kept."""
    whole, counts = batch_of(n), shares(n, world)
    parts = cut(whole, counts)
    real = [part for part, count in zip(parts, counts, strict=True) if count]
    sizes = [count for count in counts if count]
    for judge, found in (
        (whole["pair"].left, [p["pair"].left for p in real]),
        (whole["pair"].right, [p["pair"].right for p in real]),
        (whole["record"].x, [p["record"].x for p in real]),
    ):
        for a, b in zip(judge.split(sizes), found, strict=True):
            assert torch.equal(a, b)
    assert [t for p in real for t in p["texts"]] == whole["texts"]
    lengths = [len(t) for p in real for t in p["ragged"]]
    assert n == 1 or lengths == list(range(n))
    for part in parts:
        assert type(part["pair"]) is Pair
        assert (part["record"].name, part["number"]) == ("same for all", 7)
        assert part["scalar"] == 3.0


@given(st.integers(1, 5), st.integers(2, 9))
def test_a_rank_without_rows_gets_the_first(n, world):
    """One row, of every leaf."""
    counts = shares(n, world)
    for part, count in zip(cut(batch_of(n), counts), counts, strict=True):
        assert len(part["pair"].left) == max(1, count)
        assert len(part["texts"]) == max(1, count)
        assert count or part["texts"] == ["row 0"]


def test_one_rank_gets_the_batch_itself():
    """Nothing is walked, nothing copied."""
    whole = object()
    assert cut(whole, (3,))[0] is whole


def test_a_list_of_columns_is_no_list_of_rows():
    """As a TensorDataset gives them: tensors that have all rows; also two of two."""
    columns = [torch.arange(2), torch.arange(2) * 10]
    first, second = cut(columns, (1, 1))
    assert [t.tolist() for t in first] == [[0], [0]]
    assert [t.tolist() for t in second] == [[1], [10]]
    ragged = [torch.arange(5), torch.arange(3)]
    assert [len(part[0]) for part in cut(ragged, (1, 1))] == [5, 3]


def test_marks_of_ranks_are_their_own():
    """A scalar is a tensor of its own in each part, since marks sit on tensors."""
    scalar = {"x": torch.arange(2), "s": torch.tensor(1.0)}
    one, two = cut(scalar, (1, 1))
    assert one["s"] is not two["s"]


def test_a_tensor_with_other_rows_is_refused():
    """By its path and shape, with what to do."""
    batch = {"x": torch.ones(4), "mask": [torch.ones(3, 3)]}
    with pytest.raises(ax.DataError, match=r"batch\['mask'\]\[0\] has shape \(3, 3\)"):
        cut(batch, (2, 2))


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        (torch.ones(5, 2), 5),
        ({"a": torch.tensor(1.0), "b": torch.ones(4)}, 4),
        (["a", "b", "c"], 3),
        ({"text": ["a", "b"]}, 2),
        (Record(["a"], "b"), 1),
        ((["a", "b"], 3), 2),
    ],
)
def test_how_many_rows_there_are(batch, rows):
    """Of the first tensor with a dimension, or else of the first list."""
    assert rows_in(batch, 2) == rows


@pytest.mark.parametrize("batch", [7, "text", {"a": 1}, torch.ones(0), []])
def test_what_has_no_rows_cannot_be_divided(batch):
    """One rank takes it as it is."""
    assert rows_in(batch, 1) == 1
    with pytest.raises(ax.DataError, match="wants batches with rows to divide"):
        rows_in(batch, 2)
