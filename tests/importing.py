"""The tiny run whose checkpoints other tools wrote, and how torch alone goes on."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

GOLDEN = Path(__file__).parent / "golden"
SAVED = 3  # updates made before the checkpoints under GOLDEN were written


class Tiny(nn.Module):
    """Two of its three weights are one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.inner(self.embed(tokens))))


def make():
    """The model, the same each time."""
    torch.manual_seed(1)
    return Tiny()


def grouped(model):
    """AdamW whose groups are in another order than the model's weights."""
    named = list(model.named_parameters())
    bias = [p for n, p in named if n.endswith("bias")]
    rest = [p for n, p in named if not n.endswith("bias")]
    groups = [{"params": bias, "weight_decay": 0.0}, {"params": rest}]
    return torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1)


def single(model):
    """AdamW of one group."""
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def momentum(model):
    """SGD, which does not count its updates."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def halving(optimizer):
    """The learning rate's schedule."""
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


def batch(k):
    """The tokens of step k, (6, 3)."""
    draw = torch.Generator().manual_seed(100 + k)
    return torch.randint(5, (6, 3), generator=draw)


def loss(model, tokens):
    """A mean over rows."""
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())


def by_hand(model, optimizer, scheduler=None, start=0, stop=SAVED + 4):
    """The judge: torch alone, from step `start`; each loss."""
    losses = []
    for k in range(start, stop):
        value = loss(model, batch(k))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(value.item())
    return losses
