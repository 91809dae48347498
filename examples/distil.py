"""A small student learns from a large, frozen teacher what digits look like.

    python -m accelx.spawn -n 2 examples/distil.py    any number of ranks
    python examples/distil.py                         one process, the same numbers

The teacher learns from labels first; then the student sees the teacher alone.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax

HEAT = 3.0  # softens what the teacher says: Hinton, Vinyals, Dean 2015, section 2

env = ax.connect()
ax.seed(env, 0)

x, y = load_digits(return_X_y=True)
order = torch.randperm(len(x))
x, y = torch.tensor(x)[order].float() / 16, torch.tensor(y)[order]
loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=50, shuffle=True)
exam = DataLoader(TensorDataset(x[1400:], y[1400:]), batch_size=128)


def network(width):
    return nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 10))


def taught(model, batch):
    """The teacher learns from labels."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def imitated(model, batch, teacher):
    """The student learns from the teacher, and sees no label."""
    images, _ = batch
    with torch.no_grad():
        target = (teacher(images) / HEAT).softmax(1)
    return F.cross_entropy(model(images) / HEAT, target)


def accuracy(model, batch):
    images, labels = batch
    return (model(images).argmax(1) == labels).float().mean()


def optim(model):
    return AdamW(model.parameters(), 3e-3)


tx = ax.chain(ax.shard_loader(env, seed=0), ax.shard_model(env))


def score(state):
    """The share of held-out digits named rightly, over all ranks."""
    right = [ax.measure(tx, accuracy)(state, batch) for batch in ax.feed(tx, exam)]
    return float(ax.reduce(env, sum(right, start=ax.Mean(0.0, 0))).value)


teacher = ax.init(tx, lambda: network(256), optim)
learn = ax.step(tx, taught)
for batch in ax.feed(tx, loader, stop=140):
    teacher, _ = learn(teacher, batch)

student = ax.init(tx, lambda: network(16), optim)
imitate = ax.step(tx, imitated)
with ax.frozen(teacher) as frozen_teacher:
    for batch in ax.feed(tx, loader, stop=280):
        student, out = imitate(student, batch, frozen_teacher)

scores = score(teacher), score(student)
if env.main:
    print(f"last loss of the student {out.loss:.5f}")
    print("accuracy: teacher {:.4f}, student {:.4f}".format(*scores))
