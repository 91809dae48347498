"""Samplers of the user's own are walked: alike each time, and leaving no trace."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler

from accelx.data.afresh import afresh
from accelx.data.walks import by_batches, by_indices
from accelx.errors import DataError
from accelx.loader import as_loader, batches, rows_at

DATA = list(range(30))


class Dice(Sampler):
    """Draws from every global generator, and says nothing of its length."""

    def __iter__(self):
        for _ in range(23):
            third = int(torch.randint(10, ()))
            yield random.randrange(10) + np.random.randint(10) + third


class Epochal(Sampler):
    """Shuffles by an epoch that it is told, as torch's distributed sampler does."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        yield from random.Random(self.epoch).sample(DATA, 30)

    def __len__(self):
        return 30


class Growing:
    """A batch sampler whose batches are of several sizes."""

    def __iter__(self):
        yield from ([0], [1, 2], [3, 4, 5], [6, 7, 8, 9])

    def __len__(self):
        return 4


class Lying(Growing):
    """It says that there are five batches."""

    def __len__(self):
        return 5


def states():
    return (
        random.getstate(),
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
    )


def test_a_walk_is_the_same_each_time_and_leaves_no_trace():
    """Whatever the global generators say before, and they are left as they were."""
    walk = by_indices(Dice(), 4, False)
    first = list(walk.over(0, 0))
    random.seed(5), torch.manual_seed(5), np.random.seed(5)
    before = states()
    assert list(walk.over(0, 0)) == first
    assert states() == before
    assert list(walk.over(0, 1)) != first
    assert list(walk.over(1, 0)) != first
    list(Dice())  # the control
    assert states() != before
    assert [len(batch) for batch in first] == [4, 4, 4, 4, 4, 3]
    assert walk.count(0, 0) == 6


class Several(Sampler):
    """Random samplers without a generator, one after another."""

    def __init__(self, count):
        self.each = [RandomSampler(range(9)) for _ in range(count)]

    def __iter__(self):
        return (row for one in self.each for row in one)


def test_samplers_inside_one_draw_each_from_a_generator_of_its_own():
    """All begin alike, and none goes on where another ended."""
    (first, *rest) = [list(one) for one in afresh(Several(20), 5, 0).each]
    assert all(one == first for one in rest)
    shared = torch.Generator().manual_seed(5)
    a, b = (list(RandomSampler(range(9), generator=shared)) for _ in range(2))
    assert a == first != b  # what one generator for all would give


def test_between_two_draws_the_program_has_its_own_generators():
    """What is drawn while a walk waits neither moves it nor is moved by it."""
    walk = by_indices(Dice(), 4, False)
    found = []
    torch.manual_seed(0)
    for batch in walk.over(0, 0):
        found.append(batch)
        torch.rand(3)
    assert found == list(walk.over(0, 0))
    torch.manual_seed(0)
    drawn = torch.rand(3 * len(found) + 1)[-1]
    torch.manual_seed(0)
    for _ in walk.over(0, 0):
        torch.rand(3)
    assert torch.rand(1) == drawn


def test_steps_go_through_the_epochs():
    """With a length that is said or not; each epoch is told to the sampler."""
    for sampler, count in ((Epochal(), 8), (Dice(), 6)):
        source = DataLoader(DATA, 4, sampler=sampler)
        loader = as_loader(source)
        assert len(loader) == count
        walk = by_indices(sampler, 4, False)
        whole = [b for epoch in range(3) for b in walk.over(0, epoch)]
        for step in (0, 1, count - 1, count, 2 * count + 3):
            assert rows_at(loader, step) == whole[step]
        found = [b.tolist() for b in batches(loader, 2, 2 * count + 1)]
        assert found == whole[2 : 2 * count + 1]
    assert next(walk.over(0, 0)) != next(walk.over(0, 1))
    judge = [random.Random(e).sample(DATA, 30)[:4] for e in range(2)]
    told = by_indices(Epochal(), 4, True)
    assert [next(told.over(0, e)) for e in range(2)] == judge
    assert told.count(0, 0) == 7


def test_a_list_of_indices_is_a_sampler():
    """As torch takes it."""
    source = DataLoader(DATA, 2, sampler=[4, 1, 1, 7, 9], drop_last=True)
    assert [b.tolist() for b in batches(as_loader(source))] == [[4, 1], [1, 7]]
    assert [b.tolist() for b in source] == [[4, 1], [1, 7]]


def test_batches_of_several_sizes():
    """A batch sampler's batches are the global ones."""
    source = DataLoader(DATA, batch_sampler=Growing())
    found = [b.tolist() for b in batches(as_loader(source), 2, 6)]
    assert found == [b.tolist() for b in [*source, *source][2:6]]


def test_samplers_that_cannot_be_counted_on():
    """A length that is not true, indices out of range, and nothing at all."""
    with pytest.raises(DataError, match=r"Lying.*its length says, 5, but gave 4"):
        list(batches(as_loader(DataLoader(DATA, batch_sampler=Lying())), 0, 6))
    with pytest.raises(DataError, match=r"list wants .* indices of 30 items, got \[30"):
        list(batches(as_loader(DataLoader(DATA, 2, sampler=[30, 1]))))
    with pytest.raises(DataError, match="got a batch without any"):
        list(batches(as_loader(DataLoader(DATA, batch_sampler=[[]]))))
    with pytest.raises(DataError, match="need batches, got none"):
        list(batches(as_loader(DataLoader(DATA, 2, sampler=[])), 0, 1))


class Seeded:
    """A batch sampler that is a function of seed and epoch, of uneven epochs."""

    def over(self, seed, epoch):
        return iter([[seed], [epoch, epoch + 1], [7]][: epoch + 1])

    def __iter__(self):
        return self.over(0, 0)


def test_a_seeded_batch_sampler_is_a_function_of_seed_and_epoch():
    """Epochs of 1, 2 and 3 batches: steps are found by counting."""
    walk = by_batches(Seeded())
    whole = [b for _, b in islice(walk.batches(4, 0, 6), 6)]
    assert whole == [[4], [4], [1, 2], [4], [2, 3], [7]]
    assert [walk.find(4, step) for step in range(6)] == [
        *((0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)),
    ]
    assert list(walk.batches(4, 2, 5)) == [(1, [1, 2]), (2, [4]), (2, [2, 3])]
    assert list(walk.batches(4, 2, 2)) == []
