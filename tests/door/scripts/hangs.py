"""Ranks of which one does something else: python hangs.py HOW."""

import sys
import time
from pathlib import Path

import torch
from torch import nn

import accelx as ax

how = sys.argv[1]
env = ax.connect(device="cpu")


def say(word):
    """One line, in one piece."""
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def read():
    """Code of the program's own, until it is let go."""
    print("reading", flush=True)  # says
    while not Path(sys.argv[0]).with_name(f"{how}-on").exists():
        time.sleep(0.05)  # reads


def loss(model, batch):
    """A mean."""
    return model(batch).mean()


ax.reduce(env, 1)  # all do
if how == "step":
    tx = ax.chain(ax.shard_model(env))
    state = ax.init(tx, nn.Linear(2, 1), lambda m: torch.optim.SGD(m.parameters(), 0.1))
    step = ax.step(tx, loss)
    for i in range(3):
        if (env.rank, i) != (1, 1):
            state, _ = step(state, torch.ones(1, 2))  # steps
    say("out")
elif env.rank == 1:
    read()
ax.barrier(env)  # meets
