"""What real ranks read: together each sample once, or an error in place of a hang."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    TensorDataset,
)

import accelx as ax
from accelx.testing import run

pytestmark = pytest.mark.multi


class Here(Sampler):
    """A sampler that each process would order by itself."""

    def __iter__(self):
        start = torch.distributed.get_rank()
        return iter([start, *(i for i in range(7) if i != start)])

    def __len__(self):
        return 7


class Epochal(Dataset):
    """Items that know the epoch in which they are read."""

    def __init__(self, n=11):
        self.n, self.epoch = n, None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return torch.tensor([index, self.epoch])


class Fatal(Epochal):
    """Whose item 9 kills the process that reads it."""

    def __getitem__(self, index):
        if index == 9:
            time.sleep(0.2)  # the program waits for the batch, where it hears of it
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(index)


class SlowParts(IterableDataset):
    """A stream whose parts take the longer the higher the rank; whole, for rank 0."""

    def __iter__(self):
        return iter(range(11))

    def split_by_rank(self, rank, world):
        for i in range(rank, 11, world):
            time.sleep(0.01 * rank)
            yield i


class Slow(Epochal):
    """Whose items take longer on rank 1."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def __getitem__(self, index):
        time.sleep(0.01 * self.rank)
        return torch.tensor(index)


def said(env, source, start=0, seed=0):
    """What `feed` raises on this rank."""
    tx = ax.shard_loader(env, seed=seed)
    with pytest.raises(ax.DataError) as caught:
        list(ax.feed(tx, source, start=start, stop=start + 3))
    return str(caught.value)


def told(env):
    data = TensorDataset(torch.arange(7 + env.rank))
    same = TensorDataset(torch.arange(7))
    shuffled = DataLoader(same, 4, shuffle=True)
    return {
        "size": said(env, DataLoader(data, 4)),
        "batch": said(env, DataLoader(same, 4 + env.rank)),
        "seed": said(env, shuffled, seed=env.rank),
        "start": said(env, shuffled, start=env.rank),
        "sampler": said(env, DataLoader(same, 4, sampler=Here())),
        "alone": [b[0].tolist() for b in ax.feed(ax.shard_loader(ax.Env()), shuffled)],
    }


def test_ranks_that_would_read_from_different_data_say_so():
    """Length, batch size, seed, start, a sampler of the process's own: on all ranks."""
    for texts in run(2)(told)():
        assert "7 items, batch_size=4" in texts["size"]
        assert "8 items" in texts["size"].partition("rank 0")[2]
        assert "batch_size=5" in texts["batch"]
        for text in (texts[k] for k in ("seed", "start", "sampler")):
            assert "the same data in the same order" in text
            assert "on rank 0" in text
            assert "on rank 1" in text
        alone = [i for batch in texts["alone"] for i in batch]
        assert sorted(alone) == list(range(7))  # the control


def epochs(env, workers, start):
    source = DataLoader(Epochal(), 4, shuffle=True, num_workers=workers)
    tx = ax.shard_loader(env, seed=5)
    rows = []
    for batch in ax.feed(tx, source, start=start, stop=9):
        rows.append(ax.gather_rows(env, batch, batch).tolist())
    return rows


def read(env):
    return [
        *(epochs(env, workers, 0) for workers in (0, 2)),
        *(epochs(env, workers, 4) for workers in (0, 2)),
        [
            len(list(ax.feed(ax.shard_loader(env), DataLoader(range(k), 4))))
            for k in (0, 1)
        ],
        [
            int(b.sum())
            for b in ax.feed(ax.shard_loader(env), DataLoader(Slow(env.rank), 6))
        ],
        [
            ax.gather_rows(env, batch, batch).tolist()
            for batch in ax.feed(ax.shard_loader(env), DataLoader(SlowParts(), 6))
        ],
    ]


def test_a_dataset_is_told_the_epoch_wherever_it_is_read():
    """On 1 and 3 ranks, by no worker and by two, from the start and gone on with.

    Ranks that are slow change nothing, whether each reads its own or they meet.
    """
    ((one, two, late, later, counts, _, _),) = run(1)(read)()
    assert one == two
    assert late == later == one[4:]
    flat = [row for step in one[:3] for row in step]
    assert sorted(index for index, _ in flat) == list(range(11))
    assert {epoch for _, epoch in flat} == {0}
    assert {epoch for step in one[3:6] for _, epoch in step} == {1}
    assert counts == [0, 1]
    three = run(3)(read)()
    assert [each[:5] for each in three] == [[one, two, late, later, counts]] * 3
    assert sum(sum(each[5]) for each in three) == sum(range(11))
    parts = three[0][6]
    assert [each[6] for each in three] == [parts] * 3
    assert [len(step) for step in parts] == [6, 5]
    assert sorted(row for step in parts for row in step) == list(range(11))


def killed(env):
    found = ax.feed(ax.shard_loader(env), DataLoader(Fatal(12), 4, num_workers=2))
    if not env.main:
        return [len(batch) for batch in found]
    with pytest.raises(RuntimeError) as caught:
        list(found)
    return [str(caught.value), *caught.value.__notes__]


def test_a_worker_that_is_killed_is_an_error_that_says_where():
    """Not a hang: the process, the signal, the step and the rank; others read on."""
    (text, *notes), other = run(2)(killed)()
    assert re.search("worker .*(killed by signal: Killed|exited unexpectedly)", text)
    assert re.search(r"while getting the batch of step \d on rank 0 of 2", notes[-1])
    assert other == [2, 2, 2]
