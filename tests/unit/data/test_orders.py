"""torch's samplers by arithmetic: which items come, how often, and from anywhere."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from accelx.data.orders import Among, Cycled, Drawn, Seeded, Weighted
from accelx.loader import as_loader, batches
from accelx.permutation import uniform


def drawn(order, seed=0, epoch=0, count=None):
    """The indices of an epoch, or of its first positions."""
    return order.at(seed, epoch, torch.arange(count or order.length))


def chi2(found, expected):
    """Pearson's statistic over its degrees of freedom: about 1 where they agree."""
    counts = torch.bincount(found, minlength=len(expected)).double()
    want = expected.double() * len(found)
    there = want > 0
    assert int(counts[~there].sum()) == 0
    return float(((counts - want)[there] ** 2 / want[there]).sum()) / (there.sum() - 1)


WEIGHTS = torch.tensor([0.0, 1, 2, 3, 0, 4, 0.5, 0], dtype=torch.float64)
ORDERS = [
    Seeded(50, shuffle=True),
    Seeded(50),
    Among(torch.tensor([3, 9, 4, 1])),
    Drawn(7, 200),
    Cycled(7, 31),
    Weighted(WEIGHTS, 100, replacement=True),
    Weighted(WEIGHTS, 5, replacement=False),
]


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: type(o).__name__)
def test_any_positions_at_once_are_those_one_by_one(order):
    """A position's item depends on seed, epoch and position alone; shapes are kept."""
    whole = drawn(order, 3, 2).tolist()
    each = [int(order.at(3, 2, torch.tensor([p]))) for p in range(order.length)]
    assert each == whole
    backward = torch.arange(order.length).flip(0)[:4].view(2, 2)
    assert order.at(3, 2, backward).tolist() == [
        [whole[-1], whole[-2]],
        [whole[-3], whole[-4]],
    ]
    others = [drawn(order, 3, 3).tolist(), drawn(order, 4, 2).tolist()]
    plain = order == Seeded(50)
    assert (whole in others) == plain


def test_draws_with_replacement_have_equal_chances():
    """Each item comes as often as chance allows; a biased draw is found."""
    even = torch.full((7,), 1 / 7)
    assert chi2(drawn(Drawn(7, 70_000)), even) < 3
    biased = (uniform(5, torch.arange(70_000)) ** 1.05 * 7).long()
    assert chi2(biased, even) > 3  # the control


def test_more_items_than_a_float_can_tell_apart():
    """Beyond 2**32 items indices are of the hash itself, and stay in range."""
    n = 2**40 + 1
    found = drawn(Drawn(n, 10_000))
    assert found.min() >= 0
    assert found.max() < n
    assert found.double().mean() / n == pytest.approx(0.5, abs=0.02)


def test_a_cycle_gives_all_before_any_comes_again():
    """num_samples above n: whole rounds, each another order, then a part of one."""
    found = drawn(Cycled(7, 31)).tolist()
    rounds = [found[k : k + 7] for k in range(0, 31, 7)]
    assert all(sorted(one) == list(range(7)) for one in rounds[:4])
    assert len(set(rounds[4])) == 3
    assert len({tuple(one) for one in rounds[:4]}) == 4


def test_weights_are_chances():
    """With replacement items come in proportion to their weights, those of 0 never."""
    found = drawn(Weighted(WEIGHTS, 100_000, replacement=True))
    assert chi2(found, WEIGHTS / WEIGHTS.sum()) < 3
    flat = (WEIGHTS > 0).double()
    assert chi2(found, flat / flat.sum()) > 3  # the control


def test_without_replacement_as_one_after_another():
    """First and second draws have the chances of drawing from what is left."""
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    order = Weighted(weights, 3, replacement=False)
    pairs = Counter(tuple(drawn(order, 0, e).tolist()[:2]) for e in range(6000))
    for (a, b), count in pairs.items():
        p = weights[a] / 8 * weights[b] / (8 - weights[a])
        assert count / 6000 == pytest.approx(float(p), abs=0.03)
    assert len(pairs) == 6


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([0.0, 1e-300, 0.1, 1.0, 7.5, 1e300]), min_size=1),
    st.booleans(),
    st.integers(0, 5),
)
def test_what_has_no_weight_never_comes(weights, replacement, epoch):
    """Whatever the scale of the weights."""
    weights = torch.tensor(weights, dtype=torch.float64)
    some = int(weights.count_nonzero())
    if not some or not bool(weights.sum().isfinite()):
        return
    length = 50 if replacement else some
    found = drawn(Weighted(weights, length, replacement), 0, epoch)
    assert bool((weights[found] > 0).all())
    if not replacement:
        assert len(set(found.tolist())) == some


DATA = list(range(20))


def read(source, stop=None):
    """The items of an epoch, or of the first steps, in one list."""
    return torch.cat(list(batches(as_loader(source), 0, stop))).tolist()


def test_samplers_of_torch_are_taken():
    """Each gives the items that it is asked for, in batches as torch would cut them."""
    subset = DataLoader(DATA, 3, sampler=SubsetRandomSampler([4, 8, 15, 16]))
    assert sorted(read(subset)) == [4, 8, 15, 16]
    replaced = DataLoader(DATA, 3, sampler=RandomSampler(DATA, True, 50))
    assert len(read(replaced)) == 50
    assert len(as_loader(replaced)) == len(replaced) == 17
    again = DataLoader(DATA, 3, sampler=RandomSampler(DATA, num_samples=45))
    assert max(Counter(read(again)).values()) == 3
    first = DataLoader(DATA, 3, sampler=SequentialSampler(range(5)))
    assert read(first) == list(range(5)) == torch.cat(list(first)).tolist()
    weighted = DataLoader(DATA, 4, sampler=WeightedRandomSampler([0, 1, 2], 9))
    assert set(read(weighted)) <= {1, 2}
    own = BatchSampler(SequentialSampler(DATA), 6, drop_last=True)
    whole = DataLoader(DATA, batch_sampler=own)
    assert [b.tolist() for b in batches(as_loader(whole))] == [
        b.tolist() for b in whole
    ]


def test_a_generator_moves_the_order():
    """Its seed counts beside that of the loader; equal seeds give equal orders."""

    def order(n, seed=0):
        generator = torch.Generator().manual_seed(n)
        source = DataLoader(DATA, 20, shuffle=True, generator=generator)
        (batch,) = batches(as_loader(source, seed=seed))
        return batch.tolist()

    assert order(1) == order(1)
    assert len({tuple(order(n, seed)) for n in (1, 2) for seed in (0, 1)}) == 4
