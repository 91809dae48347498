"""L10: over all ranks the dataset's samples arrive each once, in the seeded order."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import attrs
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch.utils.data import DataLoader, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from accelx.loader import Loader, as_loader, batches, local_indices, rows_at, rows_here
from accelx.permutation import permute
from accelx.rows import rows_of


def dataset_of(n):
    """Items that know their own index."""
    return TensorDataset(torch.arange(n))


LOADERS = st.builds(
    Loader,
    st.integers(0, 40).map(dataset_of),
    st.integers(1, 9),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    seed=st.integers(0, 3),
)
WORLDS = st.integers(1, 5)
STEPS = st.integers(0, 30)


def reference(loader, epoch):
    """The batches of an epoch as torch's own DataLoader gives them in one process."""
    n = len(loader.dataset)
    order = torch.arange(n)
    if loader.shuffle and n:
        order = permute(n, loader.seed, epoch, order)
    return [
        indices.tolist()
        for (indices,) in DataLoader(
            Subset(loader.dataset, order.tolist()),
            batch_size=loader.batch_size,
            drop_last=loader.drop_last,
        )
    ]


def references(loader, start, stop):
    """The batches of steps `start` to `stop`, through as many epochs as it takes."""
    found, epoch = [], 0
    while len(found) < stop:
        found += reference(loader, epoch)
        epoch += 1
    return found[start:stop]


def real(batch):
    """The indices in a rank's batch, without rows that only pad."""
    return batch[0][: rows_of(batch).rows].tolist()


def joined(lists):
    """One list of many."""
    return list(chain.from_iterable(lists))


def on_rank(loader, rank, world):
    """The loader as another rank sees it."""
    return attrs.evolve(loader, rank=rank, world=world)


def union(loader, world, start, stop):
    """The global batches of a span, put together from every rank's."""
    parts = [batches(on_rank(loader, r, world), start, stop) for r in range(world)]
    return [joined(map(real, step)) for step in zip(*parts, strict=True)]


@settings(max_examples=400)
@given(LOADERS, WORLDS, st.data())
def test_the_union_of_the_ranks_is_what_one_process_reads(loader, world, data):
    """Over any span of steps and epochs, on any number of ranks, batch by batch."""
    assume(len(loader))
    start = data.draw(STEPS)
    stop = start + data.draw(STEPS)
    assert union(loader, world, start, stop) == references(loader, start, stop)


@given(LOADERS, WORLDS, st.integers(0, 2))
def test_an_epoch_holds_each_sample_once(loader, world, epoch):
    """Without drop_last all of them; with it all but the short batch at the end."""
    n, size = len(loader.dataset), loader.batch_size
    start = epoch * len(loader)
    found = joined(union(loader, world, start, start + len(loader)))
    assert len(found) == (n // size * size if loader.drop_last else n)
    assert max(Counter(found).values(), default=1) == 1
    assert len(loader) == len(reference(loader, epoch))


@given(LOADERS, WORLDS, WORLDS, STEPS, st.data())
def test_resuming_gives_the_tail_on_any_number_of_ranks(loader, was, now, stop, data):
    """Stopped anywhere and resumed elsewhere, the samples are those of a whole run."""
    assume(len(loader))
    middle = data.draw(st.integers(0, stop))
    first, second = union(loader, was, 0, middle), union(loader, now, middle, stop)
    assert first + second == references(loader, 0, stop)


@given(LOADERS, WORLDS, STEPS)
def test_a_rank_without_rows_has_one_row_that_counts_for_nothing(loader, world, step):
    """Each rank has a batch at each step, and the marks add up to the real rows."""
    assume(len(loader))
    whole = rows_at(loader, step)
    marks = []
    for rank in range(world):
        here = on_rank(loader, rank, world)
        (batch,) = batches(here, step, step + 1)
        marks.append(rows_of(batch))
        assert rows_of(batch) == rows_here(here, step)
        assert len(batch[0]) == max(1, marks[-1].rows)
        assert batch[0].tolist() == local_indices(here, step)
        assert marks[-1].rows or batch[0].tolist() == whole[:1]
    assert sum(mark.rows for mark in marks) == len(whole) == marks[0].total
    assert max(m.rows for m in marks) - min(m.rows for m in marks) <= 1


@given(LOADERS, WORLDS, STEPS)
def test_static_shapes_add_rows_that_count_for_nothing(loader, world, stop):
    """One shape on each rank at each step; the real rows are those without it."""
    assume(len(loader))
    static = loader.with_static_shapes()
    for rank in range(world):
        found = list(batches(on_rank(static, rank, world), 0, stop))
        assert {len(b[0]) for b in found} <= {-(-loader.batch_size // world)}
        assert all(rows_of(b).padded for b in found)
    assert union(static, world, 0, stop) == references(loader, 0, stop)


@given(LOADERS)
def test_the_order_depends_on_seed_and_epoch(loader):
    """Shuffled epochs differ, and so do seeds; epochs in order are all the same."""
    assume(len(loader.dataset) > 12 and not loader.drop_last)
    other = attrs.evolve(loader, seed=loader.seed + 1)
    spans = [(loader, 0), (loader, len(loader)), (other, 0)]
    orders = [joined(union(x, 1, k, k + len(x))) for x, k in spans]
    assert len({tuple(order) for order in orders}) == (3 if loader.shuffle else 1)


def test_control_torch_repeats_samples():
    """The control: over 2 ranks, DistributedSampler gives one of 23 samples twice."""
    loader = Loader(dataset_of(23), 4, shuffle=True)
    theirs = [
        DistributedSampler(loader.dataset, num_replicas=2, rank=r) for r in range(2)
    ]
    assert max(Counter(list(theirs[0]) + list(theirs[1])).values()) == 2
    ours = joined(union(loader, 2, 0, len(loader)))
    assert max(Counter(ours).values()) == 1


def test_control_rows_that_pad_are_no_samples():
    """The control: counted as samples, the rows of ranks without any come twice."""
    loader = Loader(dataset_of(5), 4)
    parts = [list(batches(on_rank(loader, r, 3))) for r in range(3)]
    counted = joined(step[0].tolist() for part in parts for step in part)
    assert sorted(counted) != list(range(5))
    kept = joined(real(step) for part in parts for step in part)
    assert sorted(kept) == list(range(5))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_workers_change_nothing(shuffle, world):
    """Two worker processes give the batches that none gives, through three epochs."""
    source = DataLoader(
        dataset_of(11), 4, shuffle=shuffle, num_workers=2, collate_fn=collate_pairs
    )
    for rank in range(world):
        loader = as_loader(source, seed=5, rank=rank, world=world)
        alone = attrs.evolve(loader, num_workers=0)
        ours, theirs = list(batches(loader, 2, 8)), list(batches(alone, 2, 8))
        assert [b["index"].tolist() for b in ours] == [
            b["index"].tolist() for b in theirs
        ]
        assert [rows_of(b) for b in ours] == [rows_of(b) for b in theirs]
        assert len(ours) == 6


def collate_pairs(items):
    """A collate_fn of the user's own."""
    return {"index": torch.stack([item[0] for item in items]), "many": len(items)}
