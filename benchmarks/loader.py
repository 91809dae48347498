"""Loading and seeking against torch's DataLoader, as ratios in one run.

    python benchmarks/loader.py [--rounds 5]

Prints two tables. Loading: microseconds a batch of 32, shuffled, the least of several
rounds that take turns. Seeking: milliseconds until the first index of a shuffled order
is known at a random position, median and worst of 101, and the growth of memory.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import islice
from random import Random
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from accelx.loader import Loader, as_loader, batches, local_indices

BATCH, STEPS = 32, 400


class Items(Dataset[Any]):
    """Rows read one by one, as most datasets are."""

    def __init__(self, n: int) -> None:
        self.x, self.y = torch.randn(n, 64), torch.randint(0, 10, (n,))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "y": self.y[index]}


class Bulk(Items):
    """Rows read a batch at a time, as from an Arrow file."""

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        x, y = self.x[indices], self.y[indices]
        return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def per_batch(open_batches: Callable[[], Iterable[Any]]) -> float:
    """Microseconds a batch, the opening of the epoch included."""
    start = time.perf_counter()
    count = sum(1 for _ in islice(open_batches(), STEPS))
    return (time.perf_counter() - start) / count * 1e6


def loading(rounds: int) -> None:
    """Print the table of loading."""
    n = BATCH * STEPS
    columns = TensorDataset(torch.randn(n, 64), torch.randint(0, 10, (n,)))
    cases: list[tuple[str, Any, int]] = [
        ("TensorDataset", columns, 0),
        ("items one by one", Items(n), 0),
        ("`__getitems__`", Bulk(n), 0),
        ("items, 2 workers", Items(n), 2),
    ]
    print("| items | torch, us | accelx, us | speed over torch |")
    print("|---|---|---|---|")
    for name, dataset, workers in cases:
        theirs = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers)
        ours = as_loader(theirs)
        pairs = [
            (per_batch(lambda: theirs), per_batch(lambda: batches(ours)))  # noqa: B023
            for _ in range(rounds)
        ]
        torch_us, accelx_us = (min(times) for times in zip(*pairs, strict=True))
        ratio = torch_us / accelx_us
        print(f"| {name} | {torch_us:.1f} | {accelx_us:.1f} | {ratio:.2f} |")


def peak() -> float:
    """MiB of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seeking() -> None:
    """Print the table of seeking."""
    print("| seek in a shuffled order | median, ms | worst, ms | memory, MiB |")
    print("|---|---|---|---|")
    draw = Random(0).randrange
    for n in (10**6, 10**9, 2**30 + 1, 10**12):
        loader = Loader(range(n), 1, shuffle=True)
        local_indices(loader, 0)  # the first call of all loads code
        before = peak()
        times = list[float]()
        for _ in range(101):
            step = draw(3 * n)
            start = time.perf_counter()
            local_indices(loader, step)
            times.append((time.perf_counter() - start) * 1e3)
        grown = peak() - before
        print(
            f"| accelx, {n:,} items | {statistics.median(times):.3f} | "
            f"{max(times):.3f} | {grown:.0f} |"
        )
    for n in (10**5, 10**6, 10**7):
        before, start = peak(), time.perf_counter()
        next(islice(RandomSampler(range(n)), n // 2, None))
        took = (time.perf_counter() - start) * 1e3
        print(
            f"| torch, the middle of {n:,} items | {took:.3f} | | "
            f"{peak() - before:.0f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    torch.set_num_threads(1)
    loading(parser.parse_args().rounds)
    print()
    seeking()
