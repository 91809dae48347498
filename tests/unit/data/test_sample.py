"""What a sample draws is a function of seed, epoch and index, and of nothing else."""

from __future__ import annotations

import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader, Dataset, Subset

from accelx.data.mix import mix
from accelx.data.sample import SeededItems, sample_rng, seeded
from accelx.errors import DataError

SEEDS = st.integers(-(2**63), 2**63 - 1)
WHOLE = st.integers(0, 2**62)


class Noisy(Dataset):
    """Items that draw from the three global generators, as old augmentations do."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return torch.tensor([i, *drawn], dtype=torch.float64)


class Cropped(Dataset):
    """Items that draw from `sample_rng`, as new augmentations should."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.rand(2, generator=sample_rng(5, self.epoch, i))


def read(dataset, workers=0, order=range(12)):
    """The items, by torch's own loader."""
    loader = DataLoader(
        Subset(dataset, list(order)), 3, num_workers=workers, collate_fn=torch.stack
    )
    rows = torch.cat(list(loader))
    return dict(zip(order, rows.tolist(), strict=True))


def states():
    """Where the three global generators stand."""
    return random.getstate(), torch.get_rng_state(), np.random.get_state()


def same_states(a, b):
    """Whether they stand where they stood."""
    (_, keys, *rest), (_, others, *other) = a[2], b[2]
    alike = a[0] == b[0] and torch.equal(a[1], b[1]) and rest == other
    return alike and bool((keys == others).all())


@settings(max_examples=50)
@given(SEEDS, WHOLE, WHOLE)
def test_a_sample_draws_the_same_each_time(seed, epoch, index):
    """Two generators of the same three numbers give the same; the global one stays."""
    before = torch.get_rng_state()
    first, second = (sample_rng(seed, epoch, index) for _ in range(2))
    assert torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=second))
    assert first.initial_seed() == second.initial_seed()
    assert torch.equal(torch.get_rng_state(), before)


@given(SEEDS, WHOLE, WHOLE, st.integers(0, 2))
def test_another_seed_epoch_or_index_draws_other_numbers(seed, epoch, index, which):
    """Each of the three counts, and so does which of them a number is."""
    parts = [seed, epoch, index]
    parts[which] += -1 if parts[which] == 2**63 - 1 else 1
    assert sample_rng(*parts).initial_seed() != (
        sample_rng(seed, epoch, index).initial_seed()
    )


def test_the_numbers_of_neighbours_look_independent():
    """First draws of 10,000 neighbours spread evenly, and do not follow each other."""
    drawn = torch.stack(
        [torch.rand((), generator=sample_rng(0, 1, i)) for i in range(10_000)]
    )
    cells = Counter((drawn * 20).long().tolist())
    chi = sum((count - 500) ** 2 / 500 for count in cells.values())
    assert len(cells) == 20
    assert chi < 60  # 19 expected, deviation 6.2
    assert abs(torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1]) < 0.05


@pytest.mark.parametrize("make", [Cropped, lambda: seeded(Noisy(), 5)])
def test_workers_and_order_change_no_augmentation(make):
    """Two workers, or the other way round, give each item what one process gives."""
    alone = read(make())
    assert read(make(), workers=2) == alone
    assert read(make(), order=range(11, -1, -1)) == alone
    later = make()
    later.set_epoch(1)
    assert all(later_row != alone[i] for i, later_row in read(later).items())


def test_control_without_it_the_order_changes_the_augmentation():
    """The control: global generators give an item what its turn happens to be."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    first = read(Noisy())
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    assert read(Noisy(), order=range(11, -1, -1)) != first


def test_global_generators_are_put_back():
    """After an item, and after one that raises, they stand where they stood."""

    class Failing(Noisy):
        def __getitem__(self, i):
            super().__getitem__(i)
            raise KeyError(i)

    before = states()
    seeded(Noisy(), 0)[3]
    with pytest.raises(KeyError):
        seeded(Failing(), 0)[3]
    assert same_states(states(), before)
    Noisy()[3]  # the control: by itself it moves them
    assert not same_states(states(), before)


def test_seeded_draws_what_the_plain_generators_draw():
    """The judge: generators started by hand from the same number give these values."""
    start = sample_rng(7, 2, 4).initial_seed()
    items = seeded(Noisy(), 7)
    items.set_epoch(2)
    by_hand = torch.rand((), generator=torch.Generator().manual_seed(start))
    drawn = np.random.RandomState(start % 2**32).rand()
    assert items[4].tolist() == [4, random.Random(start).random(), drawn, by_hand]


def test_seeded_is_the_dataset_otherwise():
    """Length, attributes, order and epochs are the dataset's; it pickles."""
    inner = Cropped()
    inner.classes = ["a", "b"]
    items = seeded(inner, 3)
    items.set_epoch(6)
    assert (len(items), items.classes, inner.epoch, items.epoch) == (
        12,
        ["a", "b"],
        6,
        6,
    )
    assert not hasattr(items, "__getitems__")
    assert not hasattr(items, "order_at")
    mixed = seeded(mix({"a": [1]}, [1]), 0)
    assert hasattr(mixed, "order_at")
    assert not hasattr(mixed, "__getitems__")  # they would share their numbers
    again = pickle.loads(pickle.dumps(seeded(Noisy(), 3)))
    assert isinstance(again, SeededItems)
    assert torch.equal(again[5], seeded(Noisy(), 3)[5])
    assert repr(seeded([1], 3)) == "seeded([1], 3)"
    with pytest.raises(AttributeError, match="missing"):
        _ = items.missing


def test_the_numbers_never_change():
    """What was drawn last year is drawn again."""
    assert sample_rng(1, 2, 3).initial_seed() == 0x9D21BF335071BA2D


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ((2**63, 0, 0), "seed must be"),
        ((0, -1, 0), "at least 0, got epoch=-1, index=0"),
        ((0, 0, -2), "at least 0, got epoch=0, index=-2"),
    ],
)
def test_numbers_out_of_range_are_refused(parts, match):
    """Two of them could mean one sample."""
    with pytest.raises(DataError, match=match):
        sample_rng(*parts)
    with pytest.raises(TypeError):
        sample_rng(0, 0, 1.5)


def test_indices_of_numpy_and_torch_are_numbers_too():
    """An index may come out of an array."""
    seeds = {
        sample_rng(1, 0, i).initial_seed() for i in (3, np.int64(3), torch.tensor(3))
    }
    assert len(seeds) == 1


def test_a_stream_is_refused():
    """What has no items by index cannot be seeded by it."""
    with pytest.raises(DataError, match="items by index, got generator"):
        seeded((i for i in range(3)), 0)
