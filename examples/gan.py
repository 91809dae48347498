"""Two networks, two states: a GAN that learns eight points on a circle.

    python -m accelx.spawn -n 2 examples/gan.py    any number of ranks
    python examples/gan.py                         one process, the same numbers
    python examples/gan.py 200                     fewer steps than 2000

Each is frozen while the other learns, and nobody conducts.
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax

BATCH, NOISE = 96, 4

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
env = ax.connect()
ax.seed(env, 0)
# Two networks that chase each other magnify rounding: double precision keeps it small.
torch.set_default_dtype(torch.float64)

angles = torch.arange(8) * math.tau / 8
points = torch.stack([angles.cos(), angles.sin()], dim=1)
data = points.repeat(1000, 1) + 0.05 * torch.randn(8000, 2)
# Real points and made ones must be as many on each rank: no short last batch.
loader = DataLoader(TensorDataset(data), BATCH, shuffle=True, drop_last=True)


def network(inputs, outputs):
    return nn.Sequential(
        nn.Linear(inputs, 64),
        nn.LeakyReLU(0.2),
        nn.Linear(64, 64),
        nn.LeakyReLU(0.2),
        nn.Linear(64, outputs),
    )


def judged(critic, real, fake):
    """The critic's loss: real points are 1, made ones 0."""
    yes, no = critic(real), critic(fake)
    return F.softplus(-yes).mean() + F.softplus(no).mean()


def fooled(maker, noise, critic):
    """The maker's loss: the critic takes what it makes for real."""
    return F.softplus(-critic(maker(noise))).mean()


tx = ax.chain(ax.shard_loader(env, seed=0), ax.shard_model(env))
free = ax.shard_model(env)  # the maker's rows come from no loader
make = {"lr": 1e-3, "betas": (0.5, 0.9)}
maker = ax.init(free, lambda: network(NOISE, 2), lambda m: Adam(m.parameters(), **make))
critic = ax.init(tx, lambda: network(2, 1), lambda m: Adam(m.parameters(), **make))
maker_step, critic_step = ax.step(free, fooled), ax.step(tx, judged)

dice = torch.Generator().manual_seed(0)  # the same on all ranks: each takes its rows


def noise(rows):
    return ax.split(env, torch.randn(rows, NOISE, generator=dice))


for (real,) in ax.feed(tx, loader, stop=steps):
    with ax.evaluating(maker) as frozen_maker:
        fake = frozen_maker(noise(BATCH))
    critic, judging = critic_step(critic, real, fake)
    with ax.frozen(critic) as frozen_critic:
        maker, fooling = maker_step(maker, noise(BATCH), frozen_critic)

with ax.evaluating(maker) as model:
    made = ax.gather(env, model(noise(960)))
nearest = torch.cdist(made, points).min(dim=1)
found = len(nearest.indices[nearest.values < 0.3].unique())
if env.main:
    print(f"critic's loss {judging.loss:.4f}, maker's loss {fooling.loss:.4f}")
    print(f"found {found} of 8 points, mean distance {nearest.values.mean():.4f}")
