"""Batches of cheap and of expensive items, beside torch's DataLoader and the peers.

    python benchmarks/loader.py [--rounds 9] [--cpu]

Shuffled, one rank, the opening of the epoch included. Cheap items are 64 numbers and a
label, from tensors, half of them by random_split, or NumPy arrays, or two numbers of a
list; rows of Hugging Face's datasets are 128 tokens and a label, without a format and
with that of torch; an expensive item takes a matrix product of about 0.4 ms. Each
group's first row is torch's plain DataLoader. The last group is the first batch of an
epoch of 10^6. With --cpu the time is that of the CPU, process and workers together: on
a busy machine others are in the elapsed time.
"""

from __future__ import annotations

import argparse
import os
import time
from itertools import islice

os.environ["OMP_NUM_THREADS"] = "1"
import compare
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    TensorDataset,
    random_split,
)

import accelx as ax

GOALS = {
    "TensorDataset of 32: accelx": "at most 0.77",
    "a split of 32: accelx": "at most 0.77",
    "datasets, lists of 32: accelx": "at most 0.77",
    "datasets, tensors of 32: accelx": "at most 0.77",
    "items of 32: accelx": "at most 1.0",
    "items of 32, 2 workers: accelx": "at most 1.0",
    "expensive items of 32, 2 workers: accelx": "at most 1.0",
}


class Items(Dataset):
    """Rows read one by one, as most datasets are."""

    def __init__(self, n):
        self.x, self.y = torch.randn(n, 64), torch.randint(0, 10, (n,))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index]}


class Bulk(Items):
    """Rows read a batch at a time, as from an Arrow file."""

    def __getitems__(self, indices):
        x, y = self.x[indices], self.y[indices]
        return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


class Arrays(Items):
    """Rows as NumPy has them."""

    def __getitem__(self, index):
        return {"x": self.x[index].numpy(), "y": int(self.y[index])}


class Expensive(Items):
    """Rows with work to do, as decoding an image is."""

    def __init__(self, n):
        super().__init__(n)
        self.weight, self.out = torch.randn(256, 256), torch.empty(256, 256)

    def __getitem__(self, index):
        # into memory of its own: malloc gives 256 KiB back each time or never, by luck
        work = torch.mm(self.weight, self.weight, out=self.out)
        return {"x": self.x[index] + work[0, :64] * 0, "y": self.y[index]}


def rows(n):
    """Rows that Hugging Face's datasets reads from Arrow memory."""
    import datasets

    tokens, labels = torch.randint(0, 50257, (n, 128)), torch.randint(0, 10, (n,))
    columns = {"tokens": tokens.tolist(), "label": labels.tolist()}
    return datasets.Dataset.from_dict(columns)


def accelerated(theirs, dispatch):
    """The same loader as accelerate prepares it, on one rank."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    config = DataLoaderConfiguration(dispatch_batches=dispatch)
    return Accelerator(cpu=True, dataloader_config=config).prepare(theirs)


def variants(name, dataset, size, workers=0, steps=None, peers=False):
    """The same DataLoader, iterated by torch, by peers and by accelx."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    words = {"batch_size": size, "num_workers": workers}
    theirs = DataLoader(dataset, shuffle=True, **words)
    spread = DistributedSampler(dataset, num_replicas=1, rank=0)
    tx = ax.shard_loader(ax.Env())
    ways = {"torch": lambda: theirs}
    if peers:
        ways |= {
            "DistributedSampler": lambda: DataLoader(dataset, sampler=spread, **words),
            "torchdata": lambda: StatefulDataLoader(dataset, shuffle=True, **words),
            "accelerate 1.15.0": lambda: accelerated(theirs, False),
            "accelerate, dispatched": lambda: accelerated(theirs, True),
        }
    ways["accelx"] = lambda: ax.feed(tx, theirs)
    made = {k: way() for k, way in ways.items() if k.startswith("accelerate")}

    def drain(key):
        def do():
            for _ in islice(made[key] if key in made else ways[key](), steps):
                pass

        return do

    return {f"{name}: {key}": drain(key) for key in ways}


def groups():
    """Each is compared within itself."""
    n = 32 * 100
    columns = TensorDataset(torch.randn(n, 64), torch.randint(0, 10, (n,)))
    yield variants("TensorDataset of 32", columns, 32, peers=True)
    half, _ = random_split(columns, [n // 2, n // 2])
    yield variants("a split of 32", half, 32)
    yield variants("items of 32", Items(n), 32, peers=True)
    yield variants("__getitems__ of 32", Bulk(n), 32)
    yield variants("datasets, lists of 32", rows(n), 32)
    yield variants("datasets, tensors of 32", rows(n).with_format("torch"), 32)
    yield variants("arrays of 32", Arrays(n), 32)
    numbers = [(i, float(i)) for i in range(n)]
    yield variants("list of numbers of 32", numbers, 32)
    yield variants("items of 32, 2 workers", Items(n), 32, 2, peers=True)
    yield variants("expensive items of 32", Expensive(320), 32)
    yield variants(
        "expensive items of 32, 2 workers", Expensive(960), 32, 2, peers=True
    )
    for size in (1, 256, 1024):
        yield variants(f"items of {size}", Items(max(400, 4 * size)), size)
    yield variants("first of 10^6", Items(10**6), 32, steps=1, peers=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu", action="store_true")
    chosen = parser.parse_args()
    rounds, clock = chosen.rounds, compare.cpu if chosen.cpu else time.perf_counter
    torch.set_num_threads(1)
    found = {}
    for group in groups():
        found |= compare.ratios(compare.interleaved(group, rounds, clock=clock))
    compare.write(
        "loader_cpu" if chosen.cpu else "loader",
        f"Batches, the opening of the epoch included{', CPU time' * chosen.cpu}",
        GOALS,
        found,
        unit="ms",
        per=1e3,
        rounds=rounds,
    )
