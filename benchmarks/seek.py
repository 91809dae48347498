"""The first index of a shuffled order, and the first batch, far inside it.

    python benchmarks/seek.py [--rounds 15]

By hand, accelerate and Fabric walk there: half-way through 10^6 samples. accelx
computes it, there and at 1 %, 50 % and 99 % of 10^7 and 10^9. Memory is what the
process grew by at its peak.
"""

from __future__ import annotations

import argparse
import os
import resource
from itertools import islice

os.environ["OMP_NUM_THREADS"] = "1"
import compare
import torch
from torch.utils.data import DataLoader, RandomSampler

import accelx as ax
from accelx.loader import as_loader, local_indices

N, BATCH = 10**6, 1000


def peak():
    """MiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def by_hand():
    next(islice(RandomSampler(range(N)), N // 2, None))


def accelerate():
    from accelerate import Accelerator, skip_first_batches

    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(range(N), BATCH, shuffle=True))
    return lambda: next(iter(skip_first_batches(loader, N // 2 // BATCH)))


def fabric():
    from lightning_fabric import Fabric

    loader = DataLoader(range(N), BATCH, shuffle=True)
    loader = Fabric(accelerator="cpu", devices=1).setup_dataloaders(loader)
    return lambda: next(islice(loader, N // 2 // BATCH, None))


def accelx(n):
    """The index alone, as a loader computes it."""
    loader = as_loader(DataLoader(range(n), 1, shuffle=True))
    return lambda: local_indices(loader, n // 2)


def accelx_feed(n, percent):
    """A batch of 32, through a whole pipeline's feed."""
    tx = ax.shard_loader(ax.Env(), seed=0)
    loader = DataLoader(range(n), 32, shuffle=True)
    start = n * percent // 100 // 32
    return lambda: next(ax.feed(tx, loader, start=start))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    far = accelx(10**9)
    far()
    before = peak()
    far()
    grown = {"accelx, 10^9": peak() - before}
    before = peak()
    by_hand()
    grown["by hand, 10^6"] = peak() - before
    variants = {
        "by hand, 10^6": by_hand,
        "accelerate 1.15.0, 10^6": accelerate(),
        "fabric 2.6.6, 10^6": fabric(),
        "accelx, 10^6": accelx(N),
        "accelx, 10^9": far,
        **{
            f"accelx resumes, 10^{power} at {percent} %": accelx_feed(
                10**power, percent
            )
            for power in (7, 9)
            for percent in (1, 50, 99)
        },
    }
    found = compare.ratios(compare.interleaved(variants, rounds))
    goals = {k: "under 10 ms" for k in variants if "resumes" in k}
    goals["accelx, 10^9"] = "under 1 ms, memory constant"
    for name, mib in grown.items():
        found[name]["MiB"] = mib
    compare.write(
        "seek",
        "First index half-way through a shuffled dataset",
        goals,
        found,
        unit="ms",
        per=1e3,
        rounds=rounds,
    )
    print(f"memory grown, MiB: {grown}")
