"""Ranks that Ray starts: actors that connect, train, and agree with one process.

    pip install ray
    python examples/ray_train.py            two ranks on this machine
    python examples/ray_train.py 4          four

On a cluster of Ray write `ray.init("auto")`, and give each actor its GPU:
`Worker.options(num_gpus=1)`. Ray then shows each actor its own device alone, so connect
with `local_rank=0`, as here.
"""

import socket
import sys

import ray
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax

STEPS = 20


def data():
    """512 rows: 16 numbers, and which of 4 linear functions is largest."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(512, 16, generator=draw)
    return TensorDataset(x, (x @ torch.randn(16, 4, generator=draw)).argmax(1))


def loss(model, batch):
    """The mean over rows, in nats."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def train(env):
    """The losses of STEPS steps, on whatever ranks `env` has."""
    ax.seed(env, 0)
    tx = ax.chain(ax.shard_loader(env, seed=0), ax.shard_model(env), ax.clip(1.0))
    state = ax.init(
        tx,
        lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)),
        lambda model: AdamW(model.parameters(), 1e-2),
    )
    step, losses = ax.step(tx, loss), []
    loader = DataLoader(data(), batch_size=50, shuffle=True)
    for batch in ax.feed(tx, loader, stop=STEPS):
        state, out = step(state, batch)
        losses.append(float(out.loss))
    return losses


@ray.remote
class Worker:
    """One rank: an actor, which Ray keeps in a process of its own."""

    def meet(self):
        """An address of this process's machine that is free."""
        host = ray.util.get_node_ip_address()
        with socket.create_server((host, 0)) as free:
            return f"tcp://{host}:{free.getsockname()[1]}"

    def train(self, rank, world, where):
        """Join the others, and train with them."""
        place = ax.Env(rank, world, 0, 1, rank, world, rendezvous=where)
        env = ax.connect(place)
        losses = train(env)
        ax.close(env)
        return losses


def main(ranks):
    """Train by Ray, then alone, and compare."""
    ray.init(include_dashboard=False, num_cpus=ranks)
    workers = [Worker.remote() for _ in range(ranks)]
    where = ray.get(workers[0].meet.remote())
    runs = [w.train.remote(rank, ranks, where) for rank, w in enumerate(workers)]
    together = ray.get(runs)
    ray.shutdown()
    alone = train(ax.connect())
    gap = max(abs(a - b) for one in together for a, b in zip(one, alone, strict=True))
    print(f"{ranks} actors: last loss {together[0][-1]:.6f}, alone {alone[-1]:.6f}")
    print(f"largest difference over {STEPS} steps and all ranks: {gap:.7f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
