"""The report of a batch says what is in it, and its product is the batch."""

import dataclasses
import math

import attrs
import pytest
import torch
from hypothesis import given, strategies as st

import accelx as ax
from accelx.cut import cut
from accelx.report import describe
from accelx.rows import Rows, mark, rows_of, stamp


def plan(world, n, rank=0):
    env = ax.Env(rank, world)
    return ax.chain(ax.shard_loader(env), ax.shard_model(env), ax.accumulate(n))


@dataclasses.dataclass
class Pair:
    """A user's own batch."""

    x: torch.Tensor
    names: list


def test_a_report_prints_leaves_rows_and_the_product():
    """As it stands in the documentation."""
    batch = {"pair": Pair(torch.ones(8, 3), ["a"] * 8), "t": torch.tensor(1), "s": "hi"}
    assert repr(describe(plan(8, 2), mark(batch, 8, 64))).splitlines() == [
        "leaf            shape   dtype        device",
        "['pair'].x      (8, 3)  float32      cpu",
        "['pair'].names  (8,)    list of str",
        "['t']           ()      int64        cpu",
        "['s']                   str",
        "here 8 of 64 rows of weight 1",
        "8 ranks x 4 rows x 2 microbatches = 64 samples a step",
    ]


@pytest.mark.parametrize(
    ("tx", "batch", "tail"),
    [
        (
            ax.identity,
            torch.ones(1, 2),
            "here 1 of 1 rows of weight 1\n"
            "1 rank x 1 row x 1 microbatch = 1 sample a step",
        ),
        (
            plan(3, 2),
            stamp(torch.ones(4, 2), Rows(3, 10, padded=True)),
            "here 3 of 10 rows of weight 1, 1 of weight 0 (padding)\n"
            "3 ranks x 2 rows x 2 microbatches = 10 samples a step, 2 rows only pad",
        ),
        (
            plan(3, 1),
            mark(torch.ones(1, 2), 0, 2),
            "here 0 of 2 rows of weight 1, 1 of weight 0 (padding)\n"
            "3 ranks x 0 to 1 row x 1 microbatch = 2 samples a step",
        ),
        (
            plan(2, 2),
            torch.ones(5, 2),
            "here 5 rows of weight 1\n"
            "2 to 3 rows x 2 microbatches here; "
            "the batch does not say what other ranks have",
        ),
    ],
    ids=["one", "padded", "placeholder", "unmarked"],
)
def test_what_is_uneven_padded_or_unknown_is_said(tx, batch, tail):
    """One row, rows that pad, a rank without rows, a batch from elsewhere."""
    assert repr(describe(tx, batch)).endswith("cpu\n" + tail)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_the_product_is_that_of_the_microbatches(total, world, n, padded):
    """Least and most rows are those that `cut` gives all ranks together."""
    sizes = []
    most = n * math.ceil(math.ceil(total / world) / n)  # divides into n
    for rank in range(world):
        low, high = total * rank // world, total * (rank + 1) // world
        length = most if padded else max(1, high - low)
        batch = stamp(torch.ones(length), Rows(high - low, total, padded))
        parts = [args[0] for args in cut((batch,), n, world)]
        here = [len(p) if padded else rows_of(p).rows for p in parts]
        sizes += here + [0] * (n - len(here))  # on one rank empty ones are left out
        told = describe(plan(world, n, rank), batch)
        assert (told.rows, told.total, told.length) == (high - low, total, length)
        assert told.microbatches == n
    assert told.each == (min(sizes), max(sizes))
    if told.each[0] == told.each[1]:
        pads = world * n * told.each[0] - total
        assert told.line.endswith(" pad") == (pads > 0)


def test_a_report_is_a_record():
    """Equal by value, and frozen."""
    one, two = (describe(plan(2, 1), mark(torch.ones(2, 2), 2, 4)) for _ in "ab")
    assert one == two
    assert one != attrs.evolve(two, rows=1)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        one.rows = 3
    with pytest.raises(TypeError, match="describe"):
        describe(torch.ones(2), ax.identity)
