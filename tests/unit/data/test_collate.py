"""Collating is torch's default_collate, to the type, the bit and the error."""

from __future__ import annotations

import collections
import enum

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from accelx.data.collate import collated, quick
from tests.unit.data.collating import facts, outcome

Pair = collections.namedtuple("Pair", ["x", "y"])
Level = enum.IntEnum("Level", "LOW HIGH")


class Named(dict):
    """A mapping with a type of its own."""


class Marked(Tensor):
    """A tensor with a type of its own."""


DTYPES = (torch.bool, torch.uint8, torch.int32, torch.float32, torch.float64)
KINDS = ("tensor", "array", "int", "float", "bool", "text", "pair", "scalar", "odd")
JAGGED = torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)
ODD = (
    *(None, 2**63, -(2**70), float("nan"), 1 + 2j, Level.LOW, b"abc", {}, (), []),
    *({1}, range(2), Named(x=1), Marked(), JAGGED, torch.eye(2).to_sparse()),
    *(torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.cdouble).conj()),
    *(np.arange(3)[::-1], np.arange(3, dtype=">i4"), np.float32(1.5), np.array(["a"])),
)


@st.composite
def leaves(draw, kind):
    """One item of a kind; dtypes and shapes are often, not always, alike."""
    shape = draw(st.sampled_from([(2,), (2,), (2,), (2, 0), (), (3,)]))
    number = draw(st.integers(-3, 300))
    if kind in ("tensor", "array"):
        dtype = draw(st.sampled_from((torch.float32, torch.float32, *DTYPES)))
        found = torch.full(shape, abs(number) % 7).to(dtype)
        if draw(st.booleans()) and found.dim():
            found = found.repeat_interleave(2, 0)[::2]
        return found if kind == "tensor" else found.numpy()
    if kind == "pair":
        return Pair(number, torch.tensor([number]))
    if kind == "odd":
        return draw(st.sampled_from(ODD))
    plain = {"int": number, "float": number / 3, "bool": number > 0}
    return {**plain, "text": str(number), "scalar": np.int16(number)}[kind]


@st.composite
def batches(draw, depth=2):
    """Items of one shape, of which some may be ragged or of another kind."""
    size = draw(st.integers(1, 5))
    shape = draw(st.sampled_from(["leaf", "tuple", "list", "dict"] if depth else "l"))
    if shape in ("leaf", "l"):
        usual = draw(st.sampled_from(KINDS))
        mixed = draw(st.integers(0, 9)) == 0
        kinds = st.sampled_from(KINDS) if mixed else st.just(usual)
        return [draw(leaves(draw(kinds))) for _ in range(size)]
    columns = [draw(batches(depth - 1)) for _ in range(draw(st.integers(0, 3)))]
    rows = [[c[i % len(c)] for c in columns] for i in range(size)]
    if draw(st.integers(0, 9)) == 0:
        rows[-1] = rows[-1] + [1]
    if shape == "dict":
        named = draw(st.sampled_from([dict, dict, Named]))
        return [named(zip("abcd", row, strict=False)) for row in rows]
    return [tuple(row) if shape == "tuple" else row for row in rows]


@given(batches())
def test_any_batch_is_what_torch_makes_of_it(batch):
    """Types, dtypes, strides, bits; for ragged and unknown items torch's own error."""
    assert outcome(collated, batch) == outcome(default_collate, batch)


KIND = st.sampled_from([lambda i: i, lambda i: i, lambda i: i / 3, bool, str])
STRAY = (True, 1, 0.5, "a", None, 2**63, Level.LOW, np.float64(1.5))


@given(st.lists(KIND, min_size=1, max_size=4), st.integers(0, 4), st.data())
def test_long_rows_of_numbers(kinds, copies, data):
    """Packed at once where all are of one kind and fit, else column by column."""
    kinds, n = kinds * copies, data.draw(st.integers(1, 3))
    batch = [[kind(i + j) for j, kind in enumerate(kinds)] for i in range(n)]
    if kinds and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(kinds) - 1))
        batch[-1][at] = data.draw(st.sampled_from(STRAY))
    for form in (list, tuple):
        found = [form(row) for row in batch]
        assert outcome(collated, found) == outcome(default_collate, found)


@pytest.mark.parametrize("odd", ODD, ids=lambda one: type(one).__name__)
def test_one_unusual_item_among_usual_ones(odd):
    """First or last, in each usual place."""
    for usual in (1, 1.5, "a", torch.ones(2), np.ones(2), (1, 2), [1], {"a": 1}):
        for batch in ([usual, odd], [odd, usual], [(usual, odd), (odd, usual)]):
            assert outcome(collated, batch) == outcome(default_collate, batch)


def test_control_the_facts_tell_batches_apart():
    """Another dtype, another container, another bit is seen."""
    same = [torch.ones(2), torch.ones(2).double(), torch.zeros(2), [1.0, 1.0]]
    same += [torch.ones(2, 2)[:, 0], (1.0, 1.0), {"a": 1}, Named(a=1)]
    seen = [repr(facts(one)) for one in same]
    assert len(set(seen)) == len(seen)


def test_what_the_user_changed_is_asked():
    """A function of theirs for a type, a default device, a mode of torch's calls."""
    assert quick(default_collate) is collated
    assert quick(list) is list
    default_collate_fn_map[dict] = lambda batch, collate_fn_map: len(batch)
    try:
        assert quick(default_collate) is default_collate
    finally:
        del default_collate_fn_map[dict]
    with torch.device("meta"):
        assert collated([1, 2]).device.type == "meta"
    assert collated([1, 2]).device.type == "cpu"


class Judged:
    """A collate_fn that compares ours with torch's where it runs: in a worker."""

    def __call__(self, items):
        assert torch.utils.data.get_worker_info() is not None
        return [repr(outcome(f, items[0])) for f in (collated, default_collate)]


def test_in_a_worker_it_is_what_torch_makes_there():
    """There torch takes the first one's dtype, and refuses gradients."""
    large = torch.ones(2**18)
    lists = [
        [torch.ones(2), torch.ones(2).double()],
        [torch.ones(2).double(), torch.ones(2)],
        [torch.ones(2, dtype=torch.int64), torch.ones(2)],
        [torch.ones(2), torch.ones(3)],
        [torch.ones(2, requires_grad=True)] * 2,
        [torch.ones(2), torch.ones(2, requires_grad=True)],
        [np.ones(2), np.ones(2)],
        [(large, 1), (large, 2)],
        [{"a": torch.ones(2, 0)}, {"a": torch.ones(2, 0)}],
    ]
    loader = DataLoader(lists, 1, num_workers=1, collate_fn=Judged())
    for batch, (ours, theirs) in zip(lists, loader, strict=True):
        assert ours == theirs, batch
