"""Tensors indexed whole, under Subsets too, give the batch that torch makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from accelx.data.tensors import indexed, reads_tensors
from accelx.fetch import fetcher
from accelx.loader import as_loader, batches, rows_at
from tests.unit.data.collating import facts, outcome

N = 12
DATA = TensorDataset(
    torch.arange(N),
    torch.randn(N, 3),
    torch.randn(2, N).T.to(torch.bfloat16),
    torch.rand(N, 2, 2) > 0.5,
)
FORMS = {
    "list": list,
    "tuple": tuple,
    "tensor": lambda at: torch.tensor(at, dtype=torch.int64),
    "int32": lambda at: torch.tensor(at, dtype=torch.int32),
    "array": lambda at: np.array(at, dtype=np.int64),
    "bytes": lambda at: np.array(at).astype(np.uint8),
}


def ours(dataset):
    """What reads a batch of `dataset` from a list of indices."""
    return fetcher(dataset, default_collate)[1]


def theirs(dataset):
    """What torch's DataLoader does."""
    many = getattr(dataset, "__getitems__", lambda at: [dataset[i] for i in at])
    return lambda at: default_collate(many(at))


@st.composite
def subsets(draw):
    """A Subset, or one of one, by indices of several kinds; they may repeat."""
    data, n = DATA, N
    for _ in range(draw(st.integers(1, 3))):
        low = draw(st.sampled_from([0, 0, 0, -n]))
        at = draw(st.lists(st.integers(low, n - 1), min_size=1, max_size=9))
        data, n = Subset(data, FORMS[draw(st.sampled_from(sorted(FORMS)))](at)), len(at)
    return data


@given(subsets(), st.data())
def test_a_subset_is_read_as_torch_reads_it(data, draw):
    """To the bit; negative indices and those that are tensors, too."""
    each = st.integers(0, len(data) - 1)
    at = draw.draw(st.lists(each, min_size=1, max_size=5))
    assert outcome(ours(data), at) == outcome(theirs(data), at)


ODD = (
    *([True, False, True], [0, 1, N], [0, -N - 1, 0], [0, 1.0, 2], ["a", 1, 2], [0, 1]),
    *(torch.tensor([True, False, True]), np.array([True, False, True]), torch.eye(3)),
    *(torch.eye(3).long(), {0: 1, 1: 2, 2: 3}, {0: 1}, [2**70, 0, 0], [None, 0, 0]),
)


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_what_is_no_place_of_a_row_is_left_to_torch(odd):
    """Masks, places beyond the end, what is no number: torch's result or error."""
    three = Subset(DATA, torch.tensor([4, 5, 6]))
    for data in (
        Subset(DATA, odd),
        Subset(Subset(DATA, odd), [0, 1]),
        Subset(three, odd),
    ):
        for at in ([0], [0, 1, 2], [2, 0]):
            assert outcome(ours(data), at) == outcome(theirs(data), at)


def test_control_the_usual_ones_are_indexed_whole():
    """What is compared with torch's is not torch's own."""
    every = list(range(N))
    for name, form in FORMS.items():
        found = indexed(Subset(DATA, form(every)), [3, 1])
        assert (found is None) == (name == "int32"), name
    assert indexed(Subset(DATA, [-1, 0]), [0]) is None
    assert facts(ours(DATA)(torch.tensor([3, 1]))) != facts(theirs(DATA)([3, 2]))


class Doubled(Subset):
    """A Subset with items of its own."""

    def __getitem__(self, index):
        return tuple(2 * part for part in super().__getitem__(index))

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def test_a_subset_of_the_users_own_is_asked():
    """And so is a Subset of it, and one whose tensors cannot be indexed whole."""
    own = Doubled(DATA, [4, 5, 6])
    odd = Subset(TensorDataset(torch.ones(3, 2, requires_grad=True)), [0, 1])
    for data in (own, Subset(own, [2, 0]), odd):
        assert not reads_tensors(data)
        assert outcome(ours(data), [1, 0]) == outcome(theirs(data), [1, 0])


def test_workers_and_devices_by_default_change_nothing():
    """A TensorDataset and a Subset of one, read by a worker; a default device."""
    for data in (DATA, Subset(DATA, [7, 2, 9, 4, 4])):
        loader = as_loader(DataLoader(data, 3, shuffle=True, num_workers=1))
        for step, batch in enumerate(batches(loader)):
            assert facts(batch) == facts(theirs(data)(rows_at(loader, step)))
    with torch.device("meta"):
        found = ours(Subset(DATA, [7, 2]))([1, 0])
    assert found[0].tolist() == [2, 7]
