"""Batches of cheap items, against torch's DataLoader.

    python benchmarks/loader.py [--rounds 15]

Batches of 32 rows of 64 numbers and a label, shuffled, the opening of the epoch
included.
"""

from __future__ import annotations

import argparse
import os
from itertools import islice

os.environ["OMP_NUM_THREADS"] = "1"
import compare
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import accelx as ax

BATCH, STEPS = 32, 200
N = BATCH * STEPS


class Items(Dataset):
    """Rows read one by one, as most datasets are."""

    def __init__(self):
        self.x, self.y = torch.randn(N, 64), torch.randint(0, 10, (N,))

    def __len__(self):
        return N

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index]}


class Bulk(Items):
    """Rows read a batch at a time, as from an Arrow file."""

    def __getitems__(self, indices):
        x, y = self.x[indices], self.y[indices]
        return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def drain(batches):
    for _ in islice(batches(), STEPS):
        pass


def pair(name, dataset, workers=0):
    """The same DataLoader, iterated by torch and by accelx."""
    theirs = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers)
    tx = ax.shard_loader(ax.Env())
    return {
        f"{name}: torch": lambda: drain(lambda: iter(theirs)),
        f"{name}: accelx": lambda: drain(lambda: ax.feed(tx, theirs)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    columns = TensorDataset(torch.randn(N, 64), torch.randint(0, 10, (N,)))
    groups = [
        pair("TensorDataset", columns),
        pair("items one by one", Items()),
        pair("__getitems__", Bulk()),
        pair("items, 2 workers", Items(), workers=2),
    ]
    found = {}
    for group in groups:
        found |= compare.ratios(compare.interleaved(group, rounds))
    compare.write(
        "loader",
        "A shuffled batch of 32 cheap rows",
        {},
        found,
        unit="us a batch",
        per=1e6 / STEPS,
        rounds=rounds,
    )
