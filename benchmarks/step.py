"""A training step of a tiny MLP, loader included, on one rank: what the library costs.

    python benchmarks/step.py [--rounds 41]

By hand, accelerate, Fabric and accelx do the same work: batches of 32 rows of 64
numbers from a shuffled DataLoader, an MLP 64-64-10, cross entropy, SGD with momentum.
"""

from __future__ import annotations

import argparse
import os
from itertools import chain, islice, repeat

os.environ["OMP_NUM_THREADS"] = "1"
import compare
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax

torch.set_num_threads(1)
STEPS = 16  # of one round
DATA = TensorDataset(torch.randn(2048, 64), torch.randint(10, (2048,)))


def loader() -> DataLoader:
    return DataLoader(DATA, batch_size=32, shuffle=True)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def endless(batches):
    """Batches of one epoch after the other."""
    return chain.from_iterable(repeat(batches))


def by_hand():
    model = net()
    optim = optimizer(model)
    batches = endless(loader())

    def run():
        for x, y in islice(batches, STEPS):
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optim.step()
            optim.zero_grad()

    return run


def accelerate():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = net()
    model, optim, data = accelerator.prepare(model, optimizer(model), loader())
    batches = endless(data)

    def run():
        for x, y in islice(batches, STEPS):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optim.step()
            optim.zero_grad()

    return run


def fabric():
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model = net()
    model, optim = fabric.setup(model, optimizer(model))
    batches = endless(fabric.setup_dataloaders(loader()))

    def run():
        for x, y in islice(batches, STEPS):
            loss = nn.functional.cross_entropy(model(x), y)
            fabric.backward(loss)
            optim.step()
            optim.zero_grad()

    return run


def loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def accelx(own_loader: bool):
    env = ax.connect(device="cpu")
    tx = ax.chain(ax.shard_loader(env), ax.shard_model(env))
    state = ax.init(tx, net, optimizer)
    step = ax.step(tx, loss)
    batches = ax.feed(tx, loader(), stop=10**9) if own_loader else endless(loader())

    def run():
        nonlocal state
        for batch in islice(batches, STEPS):
            state, _ = step(state, batch)

    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    rounds = parser.parse_args().rounds
    variants = {
        "by hand": by_hand(),
        "accelerate 1.15.0": accelerate(),
        "fabric 2.6.6": fabric(),
        "accelx step, torch's loader": accelx(own_loader=False),
        "accelx step and loader": accelx(own_loader=True),
    }
    found = compare.ratios(compare.interleaved(variants, rounds))
    goals = {
        "accelx step, torch's loader": "at most 1.06",
        "accelx step and loader": "below 1.00",
    }
    compare.write(
        "step",
        "A step of a tiny MLP, loader included, one rank",
        goals,
        found,
        unit="us a step",
        per=1e6 / STEPS,
        rounds=rounds,
    )
