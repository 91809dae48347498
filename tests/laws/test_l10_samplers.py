"""L10 with samplers: the ranks together read what one process and one sampler read."""

from __future__ import annotations

import random
from itertools import chain, islice

import attrs
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from accelx.loader import as_loader, batches
from accelx.rows import rows_of


class Walked(Sampler):
    """A sampler of the user's own, which draws from Python's generator."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return (random.randrange(self.n) for _ in range(2 * self.n + 1))

    def __len__(self):
        return 2 * self.n + 1


class Whole(Dataset):
    """A map-style dataset whose items are batches."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return [torch.arange(index * 10, index * 10 + 5 + index % 3)]


def weighted(n, size, drop_last, workers):
    """Every second item, with replacement."""
    sampler = WeightedRandomSampler([i % 2 for i in range(n)], 2 * n)
    return cut(n, size, drop_last, workers, sampler)


def cut(n, size, drop_last, workers, sampler):
    data = TensorDataset(torch.arange(n))
    return DataLoader(
        data, size, sampler=sampler, drop_last=drop_last, num_workers=workers
    )


def own_batches(n, size, drop_last, workers):
    """A batch sampler that torch did not write."""
    sampler = Batches(Walked(n), size, drop_last)
    data = TensorDataset(torch.arange(n))
    return DataLoader(data, batch_sampler=sampler, num_workers=workers)


class Named(Dataset):
    """Items by the texts of their numbers, and lists of items by lists of them."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        if isinstance(key, list):
            return [torch.tensor(key)]
        assert isinstance(key, str)
        return [torch.tensor(int(key))]


class Names(Walked):
    """Draws texts."""

    def __iter__(self):
        return map(str, super().__iter__())


def lists(n, size, drop_last, workers):
    """torch's batch sampler as a sampler: the dataset makes a batch of a list."""
    sampler = BatchSampler(Walked(n), size, drop_last)
    return DataLoader(Named(n), None, sampler=sampler, num_workers=workers)


def keys(n, size, drop_last, workers):
    """A dataset that knows its items by texts."""
    more = {"drop_last": drop_last, "num_workers": workers}
    return DataLoader(Named(n), size, sampler=Names(n), **more)


class Batches(BatchSampler):
    """torch's, as a class of the user's own."""


KINDS = {
    "subset": lambda n, *a: cut(n, *a, SubsetRandomSampler(range(0, n, 2))),
    "replaced": lambda n, *a: cut(n, *a, RandomSampler(range(n), True, n + 3)),
    "cycled": lambda n, *a: cut(n, *a, RandomSampler(range(n), num_samples=2 * n + 1)),
    "weighted": weighted,
    "walked": lambda n, *a: cut(n, *a, Walked(n)),
    "batches": own_batches,
    "items": lambda n, size, drop, workers: DataLoader(
        Whole(n), batch_size=None, shuffle=True, num_workers=workers
    ),
    "items walked": lambda n, size, drop, workers: DataLoader(
        Whole(n), batch_size=None, sampler=Walked(n), num_workers=workers
    ),
    "lists": lambda n, *a: lists(n, *a),
    "keys": lambda n, *a: keys(n, *a),
}


def on(loader, rank, world):
    return attrs.evolve(loader, rank=rank, world=world)


def real(batch):
    return batch[0][: rows_of(batch).rows].tolist()


def union(loader, world, start, stop):
    """The global batches of a span, put together from every rank's."""
    parts = [batches(on(loader, r, world), start, stop) for r in range(world)]
    return [list(chain(*map(real, step))) for step in zip(*parts, strict=True)]


def judge(source, found):
    """What torch's own loader reads, in one process, in batches given by index."""
    if isinstance(source.dataset, Whole):
        index = {tuple(b[0].tolist()): i for i, b in enumerate(iterated(source))}
        whole = DataLoader(
            source.dataset, None, sampler=[index[tuple(f)] for f in found]
        )
    elif isinstance(source.dataset, Named):
        texts = [list(map(str, batch)) for batch in found]
        way = {"batch_sampler": texts}
        if source.batch_size is None:
            way = {"batch_size": None, "sampler": found}
        whole = DataLoader(source.dataset, **way)
    else:
        whole = DataLoader(source.dataset, batch_sampler=found)
    return [batch[0].tolist() for batch in whole]


def iterated(source):
    return DataLoader(source.dataset, batch_size=None)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(KINDS)),
    st.integers(2, 20),
    st.integers(1, 7),
    st.booleans(),
    st.integers(1, 4),
    st.integers(1, 4),
    st.data(),
)
def test_any_sampler_any_ranks_any_stop(kind, n, size, drop_last, was, now, data):
    """Stopped anywhere and gone on with elsewhere: one process's batches, in order."""
    source = KINDS[kind](n, size, drop_last, 0)
    loader = as_loader(source, seed=3)
    if not len(loader):
        return
    stop = data.draw(st.integers(1, 2 * len(loader) + 1))
    middle = data.draw(st.integers(0, stop))
    one = union(loader, 1, 0, stop)
    assert one == judge(source, one)
    assert union(loader, was, 0, middle) + union(loader, now, middle, stop) == one
    assert len(list(batches(loader))) == len(loader)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(KINDS)),
    st.integers(2, 12),
    st.integers(1, 5),
    st.booleans(),
    st.tuples(st.integers(1, 3), st.integers(0, 2)),
    st.tuples(st.integers(1, 3), st.integers(0, 2)),
    st.data(),
)
def test_any_workers_too(kind, n, size, drop_last, was, now, data):
    """The same with (ranks, workers) before the stop and others after it."""
    plain = as_loader(KINDS[kind](n, size, drop_last, 0), seed=3)
    if not len(plain):
        return
    stop = data.draw(st.integers(1, len(plain) + 2))
    middle = data.draw(st.integers(0, stop))
    found = []
    for (world, workers), low, high in ((was, 0, middle), (now, middle, stop)):
        loader = as_loader(KINDS[kind](n, size, drop_last, workers), seed=3)
        found += union(loader, world, low, high)
    assert found == union(plain, 1, 0, stop)


def test_workers_change_no_batch():
    """Two workers and none, for each kind of sampler, through the end of an epoch."""
    for kind in KINDS:
        plain, working = (as_loader(KINDS[kind](9, 4, False, w)) for w in (0, 2))
        stop = len(plain) + 2
        for rank in range(2):
            two = islice(batches(on(working, rank, 2), 1, stop), stop)
            none = batches(on(plain, rank, 2), 1, stop)
            assert list(map(real, two)) == list(map(real, none)), kind


def test_control_each_rank_with_a_sampler_of_its_own():
    """The control: ranks that draw for themselves read rows of several batches."""
    random.seed(0)
    alone = DataLoader(range(9), 4, sampler=Walked(9))
    ranks = [next(iter(alone)) for _ in range(2)]
    halves = [batch[:2].tolist() for batch in ranks]
    loader = as_loader(DataLoader(TensorDataset(torch.arange(9)), 4, sampler=Walked(9)))
    assert halves[0] + halves[1] != ranks[0].tolist()
    (ours,) = union(loader, 2, 0, 1)
    assert ours == union(loader, 1, 0, 1)[0]
