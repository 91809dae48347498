"""Bytes that a stream read by one rank sends to the others.

    python -m accelx.spawn -n 4 benchmarks/dispatch.py

Twenty batches of 64 rows of 64 KiB over gloo on the loopback interface, whose counters
tell what was sent. accelerate sends every rank the whole batch; accelx sends it its
rows. The limit is what the other ranks must get: (ranks - 1) / ranks of a batch.
"""

from __future__ import annotations

import json
import time
from datetime import date
from itertools import islice
from pathlib import Path

import compare
import torch
from torch.utils.data import DataLoader, IterableDataset

import accelx as ax

ROWS, STEPS, WIDTH = 64, 20, 16 * 1024


class Lines(IterableDataset):
    """Rows that come one after another."""

    def __iter__(self):
        return (torch.full((WIDTH,), float(i)) for i in range(ROWS * STEPS))


def sent():
    """Bytes that the loopback interface has carried."""
    (line,) = (
        one for one in Path("/proc/net/dev").read_text().splitlines() if " lo:" in one
    )
    return int(line.split()[1])


def accelerate():
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    config = DataLoaderConfiguration(dispatch_batches=True, split_batches=True)
    loader = DataLoader(Lines(), ROWS)
    return Accelerator(cpu=True, dataloader_config=config).prepare(loader)


def accelx(env):
    return ax.feed(ax.shard_loader(env), DataLoader(Lines(), ROWS))


def measured(env, make):
    """(MiB that were sent, seconds, sum of what was read here)."""
    loader = make()
    ax.barrier(env)
    before, began = sent(), time.perf_counter()
    total = sum(float(batch[:, 0].sum()) for batch in islice(loader, STEPS))
    ax.barrier(env)
    return (sent() - before) / 2**20, time.perf_counter() - began, total


if __name__ == "__main__":
    env = ax.connect(device="cpu")
    whole = ROWS * STEPS * WIDTH * 4 / 2**20
    found = {"accelerate 1.15.0, dispatch_batches": measured(env, accelerate)}
    found["accelx"] = measured(env, lambda: accelx(env))
    for name, (_, _, total) in found.items():
        every = ax.reduce(env, torch.tensor(total, dtype=torch.float64), "sum")
        assert float(every) == sum(range(ROWS * STEPS)), name
    if env.main:
        limit = whole * (env.world - 1) / env.world
        rows = {"what the others must get": limit}
        rows |= {name: mib for name, (mib, _, _) in found.items()}
        title = f"MiB sent for {whole:.0f} MiB of rows, {env.world} ranks"
        lines = [f"### {title}", "", f"{date.today()}, one run.", ""]
        lines += ["| | MiB | of the limit |", "|---|---|---|"]
        lines += [f"| {k} | {v:.1f} | {v / limit:.2f} |" for k, v in rows.items()]
        name = f"dispatch_{env.world}"
        (compare.DOCS / f"{name}.md").write_text("\n".join(lines) + "\n")
        record = {"title": title, "when": str(date.today()), "rows": rows}
        text = json.dumps(record, indent=1) + "\n"
        (compare.HERE / "results" / f"{name}.json").write_text(text)
        print("\n".join(lines))
