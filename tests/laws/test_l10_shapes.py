"""L10 for batches by tokens and length, mixtures, packed sequences, augmentations.

Over all ranks the rows of a step are those of one process, from any step, on any ranks.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice, pairwise

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader, Dataset, TensorDataset

from accelx.data.lengths import by_length, by_tokens
from accelx.data.mix import mix
from accelx.data.pack import pack
from accelx.data.sample import sample_rng, seeded
from accelx.loader import Loader, as_loader, batches
from accelx.rows import rows_of

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=40)
SAMPLERS = st.builds(
    by_tokens,
    st.integers(9, 40),
    LENGTHS,
    shuffle=st.booleans(),
    padded=st.booleans(),
    window=st.integers(0, 2),
) | st.builds(
    by_length,
    st.integers(1, 7),
    LENGTHS,
    shuffle=st.booleans(),
    window=st.integers(1, 3),
)
MIXTURES = st.builds(
    lambda sizes, seed, length, shuffle: mix(
        {f"s{i}": Named(i, size) for i, size in enumerate(sizes)},
        [1 + i for i in range(len(sizes))],
        seed,
        length=length,
        shuffle=shuffle,
    ),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(0, 3),
    st.integers(1, 30),
    st.booleans(),
)
WORLDS = st.integers(1, 5)
SEEDS = st.integers(0, 3)
STEPS = st.integers(0, 25)


class Named(Dataset):
    """Items that know their source and index."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return torch.tensor([self.source, i])


class Augmented(Named):
    """Items with noise of their own, by `sample_rng`."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, i):
        return i, torch.rand((), generator=sample_rng(self.source, self.epoch, i))


class Global(Named):
    """Items that draw from torch's global generator."""

    def __getitem__(self, i):
        return i, torch.rand(())


def rows(batch):
    """What a rank's batch holds, without rows that only pad."""
    return (batch[0] if isinstance(batch, list) else batch)[: rows_of(batch).rows]


def union(loader, world, start, stop, read=rows):
    """The global batches of a span, put together from every rank's."""
    ranks = [attrs.evolve(loader, rank=r, world=world) for r in range(world)]
    parts = [batches(rank, start, stop) for rank in ranks]
    return [
        list(chain.from_iterable(read(batch).tolist() for batch in step))
        for step in zip(*parts, strict=True)
    ]


def sampled(sampler, seed):
    """A Loader over items that are their own index, by a batch sampler."""
    data = TensorDataset(torch.arange(len(sampler.lengths)))
    return as_loader(DataLoader(data, batch_sampler=sampler), seed=seed)


def epochs_of(sampler, seed):
    """All batches of all epochs, by the sampler itself."""
    epoch = 0
    while True:
        yield from sampler.over(seed, epoch)
        epoch += 1


@settings(max_examples=150)
@given(SAMPLERS, SEEDS, st.integers(0, 4), WORLDS)
def test_ranks_cut_a_global_batch_and_lose_nothing(sampler, seed, epoch, world):
    """By arithmetic alone: each rank's rows, in order of rank, are the batch."""
    found = []
    for batch in sampler.over(seed, epoch):
        m = len(batch)
        cuts = [m * r // world for r in range(world + 1)]
        parts = [batch[a:b] for a, b in pairwise(cuts)]
        assert list(chain.from_iterable(parts)) == batch
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        found += batch
    assert sorted(found) == list(range(len(sampler.lengths)))


@settings(max_examples=150)
@given(SAMPLERS, SEEDS, WORLDS, st.data())
def test_the_union_of_the_ranks_is_the_samplers(sampler, seed, world, data):
    """Over any span of steps and epochs, though epochs differ in their batches."""
    loader = sampled(sampler, seed)
    start = data.draw(STEPS)
    stop = start + data.draw(STEPS)
    judged = list(islice(epochs_of(sampler, seed), start, stop))
    assert union(loader, world, start, stop) == judged


@settings(max_examples=100)
@given(SAMPLERS, SEEDS, WORLDS, WORLDS, STEPS, st.data())
def test_resuming_gives_the_tail_on_any_ranks(sampler, seed, was, now, stop, data):
    """Stopped anywhere and resumed on others, the batches are those of a whole run."""
    loader, middle = sampled(sampler, seed), data.draw(st.integers(0, stop))
    first = union(loader, was, 0, middle)
    second = union(loader, now, middle, stop)
    assert first + second == list(islice(epochs_of(sampler, seed), stop))


@given(SAMPLERS, WORLDS)
def test_torch_reads_the_first_epoch_alike(sampler, world):
    """The judge: torch's plain DataLoader over the same sampler, in one process."""
    data = TensorDataset(torch.arange(len(sampler.lengths)))
    judged = [b.tolist() for (b,) in DataLoader(data, batch_sampler=sampler)]
    loader = sampled(sampler, 0)
    assert union(loader, world, 0, len(judged)) == judged


def test_control_batches_cut_by_each_rank_alone_are_others():
    """The control: where each rank cuts every other item, batches pass the budget."""
    lengths = [1 + i * 5 % 8 for i in range(40)]
    sampler = by_tokens(16, lengths)
    halves = [list(sampler(range(r, 40, 2))) for r in range(2)]
    steps = [a + b for a, b in zip(*halves, strict=False)]
    assert max(sum(lengths[i] for i in step) for step in steps) > 16
    ours = union(sampled(sampler, 0), 2, 0, len(sampler))
    assert max(sum(lengths[i] for i in step) for step in ours) <= 16
    assert len(halves[0]) != len(halves[1])  # and one rank waits for the other


@settings(max_examples=100)
@given(MIXTURES, st.integers(1, 6), WORLDS, st.booleans(), st.data())
def test_a_mixture_is_the_same_on_any_ranks(mixture, size, world, shuffle, data):
    """From any step: the judge is torch's DataLoader over each epoch's order."""
    loader = as_loader(DataLoader(mixture, size, shuffle=shuffle), seed=7)
    start = data.draw(STEPS)
    stop = start + data.draw(STEPS)
    judged, epoch = [], 0
    while len(judged) < stop:
        judged += DataLoader(mixture, size, sampler=mixture.order(epoch))
        epoch += 1
    assert union(loader, world, start, stop) == [b.tolist() for b in judged[start:stop]]


@settings(max_examples=50)
@given(MIXTURES, st.integers(1, 6), WORLDS)
def test_a_mixture_gives_each_source_its_epochs(mixture, size, world):
    """Through the loader, over its epochs: each n rows of a source are its n items."""
    whole = mix(mixture.sources, list(mixture.weights.values()), length=size * 7)
    found = list(chain.from_iterable(union(Loader(whole, size), world, 0, 20)))
    for number, source in enumerate(mixture.sources.values()):
        items, n = [item for which, item in found if which == number], len(source)
        for low in range(0, len(items) - n + 1, n):
            assert sorted(items[low : low + n]) == list(range(n))


def test_control_a_mixture_drawn_by_chance_misses_the_shares():
    """The control: 100 weighted draws of 20 items come unevenly, ours 7 and 3 times."""
    torch.manual_seed(0)
    weights = torch.tensor([0.7] * 10 + [0.3] * 10)
    drawn = Counter(torch.multinomial(weights, 100, replacement=True).tolist())
    assert sorted(drawn.values()) != [3] * 10 + [7] * 10
    mixture = mix({"a": Named(0, 10), "b": Named(1, 10)}, [0.7, 0.3], length=100)
    (found,) = union(Loader(mixture, 100), 3, 0, 1)
    assert sorted(Counter(map(tuple, found)).values()) == [3] * 10 + [7] * 10


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 8), st.booleans(), st.integers(1, 4), WORLDS, SEEDS)
def test_packed_sequences_are_the_same_on_any_ranks(n, length, cut, size, world, seed):
    """A shuffled epoch over ranks holds each sequence of the stream once."""
    documents = [[100 * i + j for j in range(k)] for i, k in enumerate(n)]
    packing = pack(max(length, cut or 9), cut=cut)
    loader = Loader(packing(documents, n), size, shuffle=True, seed=seed)

    def read(batch):
        marked = rows_of(*batch.values()).rows
        return batch["input_ids"][:marked]

    found = chain.from_iterable(union(loader, world, 0, len(loader), read))
    assert sorted(found) == sorted(s["input_ids"].tolist() for s in packing(documents))


def noise(loader, world, stop):
    """What each sample of each step drew, over all ranks."""
    ranks = [attrs.evolve(loader, rank=r, world=world) for r in range(world)]
    parts = [list(batches(rank, 0, stop)) for rank in ranks]
    return [
        {
            i: drawn
            for batch in step
            for i, drawn in list(zip(*map(torch.Tensor.tolist, batch), strict=True))[
                : rows_of(batch).rows
            ]
        }
        for step in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("make", [Augmented, lambda *a: seeded(Global(*a), 5)])
def test_augmentations_are_the_same_on_any_ranks_and_workers(make):
    """Through two epochs: one process, three ranks, two workers; epochs differ."""
    loader = Loader(make(5, 8), 4, shuffle=True, seed=1)
    alone = noise(loader, 1, 4)
    assert noise(loader, 3, 4) == alone
    assert noise(attrs.evolve(loader, num_workers=2), 2, 4) == alone
    first, second = ({**alone[i], **alone[i + 1]} for i in (0, 2))
    assert first.keys() == second.keys()
    assert not set(first.values()) & set(second.values())


def test_control_global_generators_differ_on_other_ranks():
    """The control: by the global generator a sample draws what its turn gives."""
    loader = Loader(Global(5, 8), 4, shuffle=True, seed=1)
    torch.manual_seed(0)
    alone = noise(loader, 1, 4)
    torch.manual_seed(0)
    assert noise(loader, 3, 4) != alone
