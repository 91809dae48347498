"""Streams that the tests read: plain ones, ones with a state, parts, and failures."""

from __future__ import annotations

import itertools
import os
import random
import signal

import torch
from torch.utils.data import IterableDataset, get_worker_info


class Plain(IterableDataset):
    """Numbers one after another; workers share them out between them."""

    def __init__(self, n):
        self.n = n
        self.told = []

    def set_epoch(self, epoch):
        self.told.append(epoch)

    def __iter__(self):
        info = get_worker_info()
        start, step = (0, 1) if info is None else (info.id, info.num_workers)
        epoch = self.told[-1] if self.told else 0
        return (epoch * 1000 + i for i in range(start, self.n, step))


class Drawing(Plain):
    """Numbers in an order drawn from Python's global generator."""

    def __iter__(self):
        order = list(range(self.n))
        random.shuffle(order)
        return iter(order)


class Counting(IterableDataset):
    """Numbers, with a state that says which one comes next."""

    def __init__(self, n):
        self.n = n
        self.at = self.start = self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        self.at, self.start = self.start, 0
        while self.at < self.n:
            self.at += 1
            yield self.epoch * 1000 + self.at - 1
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.start = state["at"]


class Buffered(Counting):
    """Rows that pass through a buffer, which the state names as it stands."""

    def __init__(self, n):
        super().__init__(n)
        self.buffer, self.loaded = [], []

    def __iter__(self):
        self.buffer, self.loaded = self.loaded, []
        for i in super().__iter__():
            self.buffer.append(i)
            if len(self.buffer) == 3:
                yield self.buffer.pop(0)
        while self.buffer:
            yield self.buffer.pop(0)

    def state_dict(self):
        return {"at": self.at, "buffer": self.buffer}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.loaded = state["buffer"]


class Parted(IterableDataset):
    """Shards of given sizes, of which each reader gets every so many-th."""

    def __init__(self, sizes):
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self.shards = [list(range(a, b)) for a, b in itertools.pairwise(ends)]

    def split_by_rank(self, rank, world):
        return list(itertools.chain(*self.shards[rank::world]))

    def __iter__(self):
        return itertools.chain(*self.shards)


class Failing(Plain):
    """Raises at item `at`, or kills the process that reads it."""

    def __init__(self, n, at, kill=False):
        super().__init__(n)
        self.at, self.kill = at, kill

    def split_by_rank(self, rank, world):
        return self._until(range(rank, self.n, world))

    def __iter__(self):
        return self._until(super().__iter__())

    def _until(self, items):
        for i in items:
            if i == self.at:
                if self.kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise LookupError(f"item {i} is not there")
            yield i


class FailingWhole(Failing):
    """The same where it cannot be divided."""

    split_by_rank = property()  # no attribute at all


class Batches:
    """Whole batches of several shapes, with a state of their own."""

    def __init__(self, sizes):
        self.sizes = list(sizes)
        self.at = self.start = 0

    def __iter__(self):
        self.at, self.start = self.start, 0
        while self.at < len(self.sizes):
            self.at += 1
            low, high = sum(self.sizes[: self.at - 1]), sum(self.sizes[: self.at])
            yield batch_of(range(low, high))
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.start = state["at"]


def batch_of(rows):
    """Tensors, texts and ragged tensors of number rows, as a nested batch."""
    ids = [row["i"] if isinstance(row, dict) else row for row in rows]
    return {
        "i": torch.tensor(ids),
        "rest": ([f"row {i}" for i in ids], [torch.arange(i % 4) for i in ids]),
    }


def ids(batch):
    """The numbers in a batch whose parts all belong together."""
    found = batch["i"].tolist()
    texts, ragged = batch["rest"]
    assert texts == [f"row {i}" for i in found]
    assert [r.tolist() for r in ragged] == [list(range(i % 4)) for i in found]
    return found
