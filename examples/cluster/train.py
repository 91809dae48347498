"""A run that a cluster may stop and start again: the program of the job files here.

    python examples/cluster/train.py --url runs/one --steps 20
    python -m accelx.spawn -n 2 examples/cluster/train.py --url runs/two --steps 20

Told to leave by SIGTERM or SIGUSR1, it saves and ends with exit code 75; started again
with the same --url, on any number of ranks, it goes on. It prints each step's loss:
the same, whatever happened in between.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax


def data():
    """1,024 rows: 16 numbers, and which of 4 linear functions is largest."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 16, generator=draw)
    return TensorDataset(x, (x @ torch.randn(16, 4, generator=draw)).argmax(1))


def loss(model, batch):
    """The mean over rows, in nats."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def main():
    """Train up to --steps from wherever --url stands."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--url", required=True, help="a folder that all hosts see, s3://"
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--kind", default="fsdp2", help="ddp, fsdp2 or hsdp")
    given = parser.parse_args()

    env = ax.connect()
    ax.seed(env, 0)
    tx = ax.chain(
        ax.shard_loader(env, seed=0),
        ax.shard_model(env, given.kind),
        ax.load_state(env, given.url, missing="fresh"),
        ax.save_state(env, given.url, every=100, keep=2, wait=False),
        ax.on_preempt(env, given.url),
    )
    state = ax.init(
        tx,
        lambda: nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4)),
        lambda model: AdamW(model.parameters(), 3e-3),
    )
    if env.main:
        print(
            f"from step {state.step}: {env.world} ranks by {env.launcher}", flush=True
        )
    step = ax.step(tx, loss)
    loader = DataLoader(data(), batch_size=64, shuffle=True)
    for batch in ax.feed(tx, loader, start=state, stop=given.steps):
        state, out = step(state, batch)
        if env.main:
            print(f"step {state.step}: {out.loss:.6f}", flush=True)


if __name__ == "__main__":
    main()
