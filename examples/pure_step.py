"""The smallest pipeline: a pure step on handwritten digits.

    python -m accelx.spawn -n 2 examples/pure_step.py    any number of ranks
    python examples/pure_step.py                         one process, the same numbers

The batch of 50 divides over no three ranks, and the last one of an epoch has 47 rows:
each row counts once all the same.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax

env = ax.connect()
ax.seed(env, 0)

images, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(images).float() / 16, torch.tensor(labels))
loader = DataLoader(digits, batch_size=50, shuffle=True)


def loss(model, batch):
    """A mean over rows."""
    x, y = batch
    return F.cross_entropy(model(x), y)


tx = ax.chain(ax.shard_loader(env, seed=0), ax.shard_model(env))
state = ax.init(
    tx,
    lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    lambda model: AdamW(model.parameters(), 3e-3),
)
step = ax.step(tx, loss)
for batch in ax.feed(tx, loader, stop=108):  # three epochs
    state, out = step(state, batch)

if env.main:
    print(f"loss of the last batch, {out.weight:g} rows: {out.loss:.6f}")
