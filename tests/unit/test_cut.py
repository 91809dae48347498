"""A batch is cut by rows, wherever they are, and parts of a report add up."""

import dataclasses

import pytest
import torch
from hypothesis import given, strategies as st

import accelx as ax
from accelx.cut import add, cut, rows_in
from accelx.records import Out
from accelx.rows import Rows, mark, row_weights, rows_of, stamp


@dataclasses.dataclass
class Batch:
    """A user's own batch."""

    x: torch.Tensor
    names: list


@given(st.integers(1, 12), st.integers(1, 7), st.integers(1, 3))
def test_every_row_is_in_one_part_in_order(length, n, ranks):
    """Parts put together are the batch, are marked, and differ by a row at most."""
    x = mark(torch.arange(length), length, length * ranks)
    parts = [args[0] for args in cut((x,), n, ranks)]
    real = [part for part in parts if rows_of(part).rows]
    assert torch.equal(torch.cat(real), x)
    sizes = [rows_of(part).rows for part in parts]
    assert sum(sizes) == length
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert len(parts) == (n if ranks > 1 else min(n, length))
    assert all(len(part) >= 1 for part in parts)
    assert all(rows_of(part).total == length * ranks for part in parts)


def test_rows_are_found_in_any_container():
    """Tensors with rows and lists of one entry a row are cut, the rest goes to each."""
    data = {
        "batch": Batch(torch.arange(4), ["a", "b", "c", "d"]),
        "pair": (torch.arange(8).view(4, 2), 3.5),
        "scale": torch.tensor(2.0),
        "note": "text",
        "none": None,
    }
    first, second = (args[0] for args in cut((data,), 2, 1))
    assert first["batch"].names == ["a", "b"]
    assert second["batch"].names == ["c", "d"]
    assert second["batch"].x.tolist() == [2, 3]
    assert second["pair"][0].tolist() == [[4, 5], [6, 7]]
    assert first["scale"] == second["scale"] == data["scale"]
    assert rows_of(data["scale"]) is None  # what the caller owns takes no mark
    assert (second["pair"][1], second["note"], second["none"]) == (3.5, "text", None)


def test_a_placeholder_is_cut_into_placeholders():
    """A rank without rows takes part in every microbatch."""
    parts = cut((mark(torch.ones(1, 2), 0, 5),), 3, 2)
    assert [rows_of(part) for part in parts] == [Rows(0, 5)] * 3


def test_rows_that_are_not_those_of_the_mark_are_refused():
    """Rows added after ax.feed would be weighed wrongly."""
    with pytest.raises(ax.DataError, match=r"says that it has 2 rows here, but .* 3"):
        cut((mark(torch.ones(3), 2, 4),), 2, 1)


def test_unmarked_rows_are_known_on_one_rank_alone():
    """On several, what others have is not known: total 0."""
    assert rows_in((torch.ones(3),), 1) == Rows(3, 3)
    assert rows_in((torch.ones(3),), 2) == Rows(3, 0)
    assert rows_in((7,), 1) == Rows(1, 1)


def test_reports_add_as_means_and_rows():
    """A mean over rows is weighed by rows, Means by their weights, rows are joined."""
    one = Out(torch.tensor(2.0), 1, aux={"y": torch.ones(1), "m": ax.Mean(1.0, 1)})
    two = Out(torch.tensor(5.0), 2, aux={"y": torch.zeros(2), "m": ax.Mean(4.0, 3)})
    whole = add([one, two])
    assert whole.loss == pytest.approx(4.0)
    assert whole.weight == 3
    assert whole.aux["y"].tolist() == [1, 0, 0]
    assert whole.aux["m"].value == pytest.approx(5 / 4)


def test_a_part_without_rows_adds_nothing_even_if_it_is_nan():
    """A placeholder's numbers are never looked at."""
    nothing = Out(torch.tensor(float("nan")), 0, aux=torch.ones(1))
    whole = add([Out(torch.tensor(3.0), 2, aux=torch.zeros(2)), nothing])
    assert whole.loss == 3.0
    assert whole.aux.tolist() == [0, 0]


@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(0, 30), st.sampled_from([1, 3])
)
def test_a_padded_batch_is_cut_into_one_shape(n, size, rows, ranks):
    """Every part has as many rows, its own count, and the weights of the whole."""
    rows = min(rows, n * size)
    whole = stamp(torch.arange(n * size), Rows(rows, 30, padded=True))
    parts = [args[0] for args in cut((whole,), n, ranks)]
    assert [part.shape for part in parts] == [(size,)] * n
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(torch.cat([row_weights(p) for p in parts]), row_weights(whole))
    marks = [rows_of(part) for part in parts]
    assert sum(one.rows for one in marks) == rows
    assert all(one.padded and one.total == 30 for one in marks)


def test_a_padded_batch_is_not_cut_unevenly():
    """Four or fewer microbatches of another shape would be compiled once more."""
    x = stamp(torch.ones(6), Rows(5, 5, padded=True))
    with pytest.raises(ax.DataError, match=r"accumulate\(4\) .* n = 1, 2, 3 or 6"):
        cut((x,), 4, 1)
    with pytest.raises(ax.DataError, match="3 rows here, of which 5 are real"):
        cut((stamp(torch.ones(3), Rows(5, 5, padded=True)),), 3, 1)


def test_a_scalar_ahead_of_the_rows_is_no_hindrance():
    """It is marked as they are, and has no rows to cut."""
    batch = mark({"heat": torch.tensor(2.0), "x": torch.arange(4)}, 4, 4)
    parts = [args[0] for args in cut((batch,), 2, 1)]
    assert [part["x"].tolist() for part in parts] == [[0, 1], [2, 3]]
