"""Two passes of your own: noise on the gradients, and a memory of their norms.

    python -m accelx.spawn -n 2 examples/custom_pass.py    any number of ranks
    python examples/custom_pass.py                         one process, the same numbers

A pass is a function of the state and the report, and takes part in everything.
"""

import attrs
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax

env = ax.connect()
ax.seed(env, 0)


def add_noise(state, out):
    """Gaussian noise that fades, on whole gradients: Neelakantan et al. 2015.

    Drawn from the step alone, so that each rank draws the same.
    """
    dice = torch.Generator().manual_seed(state.step)
    scale = (0.001 / (1 + state.step) ** 0.55) ** 0.5
    for p in state.model.parameters():
        p.grad += scale * torch.randn(p.shape, generator=dice).to(p.device)
    return state, out


def open_memory(state, tx):
    """A pass remembers in a slot of its own name."""
    return attrs.evolve(state, slots={**state.slots, "norms": 0.0})


def remember(state, out):
    """A running mean of the norm that `clip` measured."""
    mean = 0.9 * state.slots["norms"] + 0.1 * float(out.norm)
    return attrs.evolve(state, slots={**state.slots, "norms": mean}), out


clip_first = ax.Rules(after=("clip",), why="clip is what measures the norm")
noise = ax.transform("noise", before=add_noise)
norms = ax.transform("norms", start=open_memory, after=remember, rules=clip_first)

tx = ax.chain(
    ax.shard_loader(env, seed=0), ax.shard_model(env), noise, ax.clip(1.0), norms
)
if env.main:
    print(ax.explain(tx))
    try:
        ax.chain(norms, ax.clip(1.0))
    except ax.OrderError as error:
        print(f"\nThe other way round is refused:\n{error}\n")


def loss(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


x, y = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(x).float() / 16, torch.tensor(y))
loader = DataLoader(digits, batch_size=50, shuffle=True)

state = ax.init(tx, lambda: nn.Linear(64, 10), lambda m: SGD(m.parameters(), 0.5))
step = ax.step(tx, loss)
for batch in ax.feed(tx, loader, stop=100):
    state, out = step(state, batch)

if env.main:
    print(f"loss {out.loss:.5f}, mean norm of the gradients {state.slots['norms']:.5f}")
