"""What it costs two ranks to write down what they do, and to compare it.

    python -m accelx.spawn -n 2 benchmarks/lockstep.py [--rounds 41]

The same step (MLP 64-64-10 over ddp, 32 rows a rank) and the same reduce of a number,
with ranks in lockstep and without, in turn. Then one operation written into the ring.
"""

from __future__ import annotations

import argparse
import statistics
from time import perf_counter

import compare
import torch
import torch.distributed as dist
from torch import nn

import accelx as ax
from accelx.comm_ring import ring
from accelx.comm_wire import Spec

torch.set_num_threads(1)
STEPS, WRITES = 16, 100  # of one round
TREE = {"": Spec(torch.float32, (32, 64), True)}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def stepping(env: ax.Env):
    tx = ax.chain(ax.shard_model(env))
    state = ax.init(tx, net, optimizer)
    step = ax.step(tx, loss)
    batch = [torch.randn(32, 64), torch.randint(10, (32,))]

    def run():
        nonlocal state
        for _ in range(STEPS):
            state, _ = step(state, batch)

    return run


def reducing(env: ax.Env):
    def run():
        for _ in range(STEPS):
            ax.reduce(env, 1.0)

    return run


def both(env: ax.Env, run):
    """`run` as it is, and with ranks in lockstep."""
    ax.with_lockstep()(env)
    check = ring().check

    def compared(on):
        def turned():
            ring().check = check if on else None
            run()

        return turned

    return {"accelx": compared(False), "accelx with_lockstep": compared(True)}


def told(name: str, title: str, run, env: ax.Env, rounds: int) -> None:
    times = compare.interleaved(both(env, run), rounds, meet=dist.barrier)
    if env.main:
        found, each = compare.ratios(times), {"unit": "us", "per": 1e6 / STEPS}
        compare.write(name, title, {}, found, rounds=rounds, **each)


def writing(env: ax.Env, what) -> float:
    """Median microseconds of one operation in the ring, begun and ended."""
    found = []
    for _ in range(2001):
        start = perf_counter()
        for _ in range(WRITES):
            pass
        middle = perf_counter()
        for _ in range(WRITES):
            with ring().begin(env, "reduce", what):
                pass
        found.append((perf_counter() - middle) - (middle - start))
    return statistics.median(found) / WRITES * 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    rounds = parser.parse_args().rounds
    env = ax.connect(device="cpu")
    told("lockstep_step", "A small step on two ddp ranks", stepping(env), env, rounds)
    told(
        "lockstep_reduce", "A reduce of a number, two ranks", reducing(env), env, rounds
    )
    ring().check = None
    dist.barrier()
    if env.main:  # alone: the other is asleep in the barrier
        for said, what in (("a name", None), ("a step", 12), ("a tree", TREE)):
            print(
                f"one operation in the ring, with {said}: {writing(env, what):.2f} us"
            )
    dist.barrier()
