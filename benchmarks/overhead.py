"""Where the microseconds of a step on one rank go, beside the work itself.

    python benchmarks/overhead.py [--rounds 2000]

Times single steps by hand and by accelx in turn, and each thing that accelx does by
itself; writes docs/benchmarks/overhead.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
from time import perf_counter

os.environ["OMP_NUM_THREADS"] = "1"
import compare
import step as work
import torch
from torch import nn

import accelx as ax
from accelx import cut, gradients, records, state
from accelx.engines import placed

torch.set_num_threads(1)


def median(fn, rounds):
    """Median microseconds of a call."""
    times = []
    for _ in range(rounds):
        start = perf_counter()
        fn()
        times.append(perf_counter() - start)
    return statistics.median(times) * 1e6


def in_turn(fns, rounds):
    """Median microseconds of each function, called one after the other."""
    times = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            start = perf_counter()
            fn()
            times[name].append(perf_counter() - start)
    return {name: statistics.median(own) * 1e6 for name, own in times.items()}


def whole_steps(batch):
    """One step by hand and one by accelx, on the same batch, without a loader."""
    model = work.net()
    optim = work.optimizer(model)
    tx = ax.shard_model(ax.Env())
    now = ax.init(tx, work.net, work.optimizer)
    step = ax.step(tx, work.loss)

    def by_hand():
        x, y = batch
        nn.functional.cross_entropy(model(x), y).backward()
        optim.step()
        optim.zero_grad()

    def ours():
        nonlocal now
        now, _ = step(now, batch)

    return {"by hand": by_hand, "accelx": ours}


def pieces(batch):
    """What accelx does in a step that a loop by hand does not."""
    tx = ax.shard_model(ax.Env())
    now = ax.init(tx, work.net, work.optimizer)
    value = torch.ones((), requires_grad=True) * 2

    def spent():
        state.spend(state.stepped(now, made=True), "a benchmark")

    return {
        "find the batch's rows": lambda: cut.rows_in((batch,), 1),
        "check for earlier gradients": lambda: [
            p for _, p in now.trained if p.grad is not None
        ],
        "check what the loss returned": lambda: gradients.read(value),
        "detach the loss": value.detach,
        "the report (Out)": lambda: records.made_in(
            records.Out(value, 32), {"grads": 0.0}
        ),
        "the next State, spending the last": spent,
        "look up engine and Env": lambda: (
            placed.engine_of(now),
            gradients.env_of(now),
            placed.engine_of(now),
        ),
        "read the clock": lambda: (perf_counter(), perf_counter(), perf_counter()),
    }


def zero_grad():
    """What `optimizer.zero_grad()` takes when there is nothing to do."""
    return work.optimizer(work.net()).zero_grad


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000)
    rounds = parser.parse_args().rounds
    batch = [torch.randn(32, 64), torch.randint(10, (32,))]
    steps = in_turn(whole_steps(batch), rounds)
    clock = median(lambda: None, rounds)
    costs = {name: median(fn, rounds) - clock for name, fn in pieces(batch).items()}
    more, saved = steps["accelx"] - steps["by hand"], median(zero_grad(), rounds)
    told = sum(costs.values())
    lines = [
        "### Where the microseconds of a step go",
        "",
        f"One rank, no loader, {rounds} steps in turn, medians: by hand "
        f"{steps['by hand']:.0f} us, accelx {steps['accelx']:.0f} us.",
        "",
        "| accelx also does | us |",
        "|---|---|",
        *(f"| {name} | {cost:.1f} |" for name, cost in costs.items()),
        f"| the rest: calls, and colder caches | {more - told + saved:.1f} |",
        f"| drops gradients itself, not by `zero_grad()` | -{saved:.1f} |",
        f"| **more than by hand** | **{more:.1f}** |",
    ]
    compare.DOCS.mkdir(parents=True, exist_ok=True)
    (compare.DOCS / "overhead.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
