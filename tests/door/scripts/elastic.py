"""A training that saves each step: `elastic.py FOLDER STEPS [WORD]`.

Files of FOLDER tell how far it is; a file gate-K holds all ranks after step K, one
gate-K-of-N where there are N. WORD is `preempt`, or fail-R-K for an error of rank R in
step K of the first attempt.
"""

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax

folder, stop, word = Path(sys.argv[1]), int(sys.argv[2]), "".join(sys.argv[3:])
env = ax.connect()
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
(folder / f"pid-{env.rank}").write_text(str(os.getpid()))
places = (env.rank, env.world, env.node, env.nodes, env.launcher, env.rendezvous)
(folder / f"env-{env.rank}").write_text(repr(places))
draw = torch.Generator().manual_seed(1)
data = TensorDataset(torch.randn(40, 3, generator=draw))
loader = DataLoader(data, batch_size=7, shuffle=True)


def net():
    """The same weights on every rank and in every attempt."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def loss(model, batch):
    """How far the sum of three numbers is missed."""
    return ((model(batch[0]) - batch[0].sum(1, keepdim=True)) ** 2).mean()


tx = ax.chain(
    ax.shard_loader(env, seed=0),
    ax.shard_model(env, "ddp"),
    ax.load_state(env, str(folder / "run"), missing="fresh"),
    ax.save_state(env, str(folder / "run"), every=1, keep=2),
    ax.on_preempt(env, str(folder / "run")) if word == "preempt" else ax.identity,
)
state = ax.init(tx, net, lambda m: torch.optim.Adam(m.parameters(), 0.01))
step = ax.step(tx, loss)
for batch in ax.feed(tx, loader, start=state, stop=stop):
    state, out = step(state, batch)
    if word == f"fail-{env.rank}-{state.step}" and not attempt:
        raise ValueError("enough of this")
    if env.main:
        (folder / f"step-{state.step}-of-{env.world}").touch()
    gates = [f"gate-{state.step}", f"gate-{state.step}-of-{env.world}"]
    while any((folder / gate).exists() for gate in gates):
        time.sleep(0.02)
if env.main:
    torch.save(state.model.state_dict(), folder / "weights.pt")
