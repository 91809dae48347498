"""Gradient accumulation on two ddp ranks: one microbatch of four, all told.

    python -m accelx.spawn -n 2 benchmarks/accumulate.py [--rounds 41]

By hand (no_sync), accelerate, Fabric and accelx cut the same 128 rows a rank into four
microbatches and update once: MLP 64-64-10, cross entropy, SGD with momentum.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import compare
import torch
import torch.distributed as dist
from torch import nn

import accelx as ax
from accelx.rows import mark

torch.set_num_threads(1)
N, STEPS = 4, 16  # microbatches, and steps of one round


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def batch(env: ax.Env) -> list[torch.Tensor]:
    """This rank's rows, as the loader of a pipeline would mark them."""
    generator = torch.Generator().manual_seed(env.rank)
    x = torch.randn(32 * N, 64, generator=generator)
    y = torch.randint(10, (32 * N,), generator=generator)
    return mark([x, y], 32 * N, 32 * N * env.world)


def by_hand(env: ax.Env):
    model = nn.parallel.DistributedDataParallel(net(), gradient_as_bucket_view=True)
    optim = optimizer(model)
    x, y = batch(env)

    def run():
        for _ in range(STEPS):
            for i, (a, b) in enumerate(zip(x.chunk(N), y.chunk(N), strict=True)):
                with nullcontext() if i == N - 1 else model.no_sync():
                    loss = nn.functional.cross_entropy(model(a), b) / N
                    loss.backward()
            optim.step()
            optim.zero_grad()

    return run


def accelerate(env: ax.Env):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=N)
    model = net()
    model, optim = accelerator.prepare(model, optimizer(model))
    x, y = batch(env)

    def run():
        for _ in range(STEPS):
            for a, b in zip(x.chunk(N), y.chunk(N), strict=True):
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(a), b)
                    accelerator.backward(loss)
                    optim.step()
                    optim.zero_grad()

    return run


def fabric(env: ax.Env):
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import TorchElasticEnvironment
    from lightning_fabric.strategies import DDPStrategy

    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment())
    fabric = Fabric(accelerator="cpu", devices=env.world, strategy=strategy)
    fabric.launch()
    model = net()
    model, optim = fabric.setup(model, optimizer(model))
    x, y = batch(env)

    def run():
        for _ in range(STEPS):
            for i, (a, b) in enumerate(zip(x.chunk(N), y.chunk(N), strict=True)):
                with fabric.no_backward_sync(model, enabled=i < N - 1):
                    loss = nn.functional.cross_entropy(model(a), b) / N
                    fabric.backward(loss)
            optim.step()
            optim.zero_grad()

    return run


def loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def accelx(env: ax.Env):
    tx = ax.chain(ax.shard_model(env), ax.accumulate(N))
    state = ax.init(tx, net, optimizer)
    step = ax.step(tx, loss)
    rows = batch(env)

    def run():
        nonlocal state
        for _ in range(STEPS):
            state, _ = step(state, rows)

    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    rounds = parser.parse_args().rounds
    env = ax.connect(device="cpu")
    variants = {
        "by hand, no_sync": by_hand(env),
        "accelerate 1.15.0": accelerate(env),
        "fabric 2.6.6": fabric(env),
        "accelx accumulate(4)": accelx(env),
    }
    times = compare.interleaved(variants, rounds, meet=dist.barrier)
    if env.main:
        compare.write(
            "accumulate",
            "A microbatch of four, two ddp ranks",
            {"accelx accumulate(4)": "at most 1.03"},
            compare.ratios(times),
            unit="us a microbatch",
            per=1e6 / STEPS / N,
            rounds=rounds,
        )
