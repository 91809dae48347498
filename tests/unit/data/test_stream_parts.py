"""Parts of streams in torch's workers: each reads its own, and goes on by its own."""

from __future__ import annotations

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import accelx as ax
from accelx.data.stream import Reading, as_stream, guarantee_of, read
from accelx.data.stream_parts import part_of, tell
from tests.streaming import Parted, Plain, batch_of, ids


class Remembered(list):
    """A part that knows where it stands."""

    def __init__(self, rows):
        super().__init__(rows)
        self.at = self.start = 0

    def __iter__(self):
        self.at, self.start = self.start, 0
        while self.at < len(self):
            self.at += 1
            yield self[self.at - 1]

    def state_dict(self):
        return {"at": self.at, "seen": torch.tensor(self.at)}

    def load_state_dict(self, state):
        assert int(state["seen"]) == state["at"]
        self.start = state["at"]


class Stateful(Parted):
    """Shards whose parts have a state, as the whole has."""

    def split_by_rank(self, rank, world):
        return Remembered(super().split_by_rank(rank, world))

    def state_dict(self):
        raise AssertionError("the parts are asked")

    load_state_dict = state_dict


def loader_of(dataset, size=4, **settings):
    """A torch DataLoader over it."""
    return DataLoader(dataset, batch_size=size, collate_fn=batch_of, **settings)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_each_worker_reads_its_own_part(workers):
    """Each row once; shards to the workers in turn."""
    stream = as_stream(loader_of(Parted([3, 5, 1, 4]), num_workers=workers))
    found = [ids(batch) for batch in read(stream)]
    assert [len(rows) for rows in found] == [4, 4, 4, 1]
    assert sorted(i for rows in found for i in rows) == list(range(13))


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_with_a_state_go_on(workers):
    """States hold tensors too; rows of a worker that has ended stay gone."""
    source = Stateful([3, 9, 1, 4])
    stream = as_stream(loader_of(source, num_workers=workers))
    assert guarantee_of(stream) == "same-ranks"
    whole = [ids(b) for b in read(stream, 0, 7)]
    for stop in (1, 3, 5) if not workers else (3,):
        memory, other = Reading(ax.Env()), Reading(ax.Env())
        list(read(stream, 0, stop, memory))
        other.load_state_dict(memory.state_dict())
        assert [ids(b) for b in read(stream, stop, 7, other)] == whole[stop:]


def test_workers_see_the_dataset_and_not_what_is_around_it():
    """A worker_init_fn that sets its worker's span, as torch's own page shows it."""

    class Span(IterableDataset):
        start, end = 0, 12

        def __iter__(self):
            return iter(range(self.start, self.end))

    def init(worker):
        dataset = get_worker_info().dataset
        assert type(dataset) is Span
        dataset.start, dataset.end = worker * 6, worker * 6 + 6

    source = loader_of(Span(), 3, num_workers=2, worker_init_fn=init)
    judge = [ids(batch) for batch in source]
    assert [ids(batch) for batch in read(as_stream(source))] == judge
    assert sorted(i for rows in judge for i in rows) == list(range(12))


def shuffled():
    """A streamed table, whose shards and rows each epoch has in another order."""
    table = datasets.Dataset.from_dict({"i": list(range(24))})
    return table.to_iterable_dataset(num_shards=4).shuffle(seed=3, buffer_size=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_of_a_shuffled_stream_differ_and_come_again(workers):
    """As `set_epoch` has them: datasets' own iteration is the judge."""
    source = shuffled()
    stream = as_stream(loader_of(source, 8, num_workers=workers))
    found = [ids(batch) for batch in read(stream, 0, 9)]
    epochs = [sum(found[k : k + 3], []) for k in (0, 3, 6)]  # noqa: RUF017
    assert [sorted(epoch) for epoch in epochs] == [list(range(24))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for epoch, rows in enumerate(epochs):
        judge = shuffled()
        judge.set_epoch(epoch)
        wanted = [ids(b) for b in loader_of(judge, 8, num_workers=workers)]
        assert sum(wanted, []) == rows  # noqa: RUF017
    assert source.epoch == 0  # the user's own object is left alone


def test_a_part_of_a_divided_stream_shuffles_with_the_others():
    """All readers know the epoch, so that no shard is read twice."""
    for epoch in (0, 1):
        rows = [r["i"] for k in range(2) for r in part_of(shuffled(), k, 2, epoch)]
        assert sorted(rows) == list(range(24))


def test_who_is_told_the_epoch():
    """The dataset; of a loader its sampler, batch sampler and dataset."""
    plain = Plain(3)
    tell(plain, 1)
    tell(DataLoader(plain, batch_size=None), 2)
    tell([1, 2], 3)
    assert plain.told == [1, 2]
