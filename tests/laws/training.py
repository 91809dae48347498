"""A tiny model, ragged data, and two ways to train it: by hand with torch, and accelx.

The first way is the judge of the second: one process, whole batches, no accelx at all.
"""

from __future__ import annotations

import math
import pkgutil
from importlib import import_module

import attrs
import pytest
import torch
import torch._dynamo  # optimizers import it when first made
import torch.distributed.fsdp  # ranks are forked: once here, not once in each
from torch import nn
from torch.nn import functional as F

import accelx as ax
from accelx import engines, saves
from accelx.rows import mark

# accelx imports files when they are asked for: once here, not in each rank, as above
for _name in ax.__all__:
    getattr(ax, _name)
for _package in (engines, saves):
    for _file in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        import_module(_file.name)

# torch says it of any model that ends in a Linear over three dimensions
quiet_views = pytest.mark.filterwarnings(
    "ignore:FSDP2-wrapped module .* returned a view:UserWarning"
)
WIDTH, TOKENS, LENGTH = 6, 11, 4
ROWS = (5, 1, 7)  # of each step's batch: fewer than ranks, too
LIMIT, RATE = 0.9, 1e-2


class Block(nn.Module):
    """A residual block with a buffer, whose two weights may be one."""

    def __init__(self, tied: bool):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.outer = nn.Linear(WIDTH, WIDTH)
        if tied:
            self.outer.weight = self.inner.weight
        self.register_buffer("share", torch.full((1,), 0.7))
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, WIDTH), False)

    def forward(self, x):
        inside = torch.tanh(self.inner(self.norm(x) + self.shift))
        return x + self.share * self.outer(inside)


class Net(nn.Module):
    """Tied to the root, across blocks and inside one; frozen weights and buffers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(
            [Block(False), Block(False), Block(True), Block(False)]
        )
        self.layers[1].inner.weight = self.layers[0].inner.weight
        self.head = nn.Linear(WIDTH, TOKENS)
        self.head.weight = self.embed.weight
        for p in self.layers[3].norm.parameters():
            p.requires_grad_(False)
        self.layers[1].outer.weight.requires_grad_(False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def made(dtype=torch.float64, seed=1):
    """A function that makes the same model each time it is called."""

    def make():
        torch.manual_seed(seed)
        return Net().to(dtype)

    return make


def batches(rows=ROWS, dtype=torch.float64):
    """Whole batches (tokens, mask) with ragged masks: rows and halves of nothing."""
    draw = torch.Generator().manual_seed(5)
    result = []
    for k, n in enumerate(rows):
        tokens = torch.randint(TOKENS, (n, LENGTH), generator=draw)
        mask = (torch.rand(n, LENGTH, generator=draw) < 0.4).to(dtype)
        if n > 2:
            half = slice(0, n // 2) if k % 2 else slice(n - n // 2, n)
            mask[half] = 0  # ranks and microbatches without a token
        mask[n // 2 if k % 2 else 0, 1] = 1
        result.append((tokens, mask))
    return result


def each(model, tokens):
    """The loss of each token, (rows, LENGTH)."""
    logits = model(tokens)
    wanted = tokens.roll(-1, dims=1)
    return F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")


def bare(model, batch):
    """A mean over rows."""
    return each(model, batch[0]).mean()


def masked(model, batch):
    """A mean over tokens, as numerator and denominator."""
    return ax.Mean((each(model, batch[0]) * batch[1]).sum(), batch[1].sum())


def mean_of_means(model, batch):
    """What must not be written: each part's own mean over its tokens."""
    return (each(model, batch[0]) * batch[1]).sum() / batch[1].sum().clamp(min=1)


def curve(step):
    """A learning rate's factor."""
    return 1 / (1 + step / 3)


def grouped(model):
    """AdamW with two groups of its own weight decay."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    bias = [p for n, p in named if n.endswith("bias")]
    rest = [p for n, p in named if not n.endswith("bias")]
    groups = [{"params": bias, "weight_decay": 0.0}, {"params": rest, "lr": RATE / 2}]
    return torch.optim.AdamW(groups, lr=RATE, weight_decay=0.1)


def pair(model):
    """Two optimizers of different kinds over one model."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        torch.optim.AdamW([p for n, p in named if "layers" in n], lr=RATE),
        torch.optim.SGD([p for n, p in named if "layers" not in n], 0.1, momentum=0.9),
    ]


@attrs.frozen
class Step:
    """What one step left: its loss, the norm before clipping, and every parameter."""

    loss: float
    norm: float
    weights: dict


def by_hand(make, loss, optim, data, limit=LIMIT, factor=curve):
    """The judge: a plain loop over whole batches with torch alone."""
    model = make()
    optimizers = optim(model)
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    rates = [[g["lr"] for g in o.param_groups] for o in optimizers]
    trace = []
    for k, batch in enumerate(data):
        for o, base in zip(optimizers, rates, strict=True):
            for group, rate in zip(o.param_groups, base, strict=True):
                group["lr"] = rate * factor(k)
            o.zero_grad()
        value = loss(model, batch)
        value = value.total / value.weight if isinstance(value, ax.Mean) else value
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        for o in optimizers:
            o.step()
        trace.append(Step(value.item(), norm.item(), weights(model)))
    return trace


def weights(model):
    """Copies of what this rank has of every parameter, under each of its names."""
    named = model.named_parameters(remove_duplicate=False)
    return {n: local(p).clone() for n, p in named}


def local(tensor):
    """This rank's slice of a sharded tensor; any other as it is."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor):
    """`tensor` in full, on any placement. A collective where it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def even(n, rank, world):
    """Rows of one rank, as alike as may be."""
    return n * rank // world, n * (rank + 1) // world


def lopsided(n, rank, world):
    """Rows of one rank, where the last has nearly all and others may have none."""
    return (min(rank, n), min(rank + 1, n) if rank < world - 1 else n)


def part(env, batch, split=even):
    """This rank's rows of a whole batch, marked; a placeholder where it has none."""
    total = len(batch[0])
    low, high = split(total, env.rank, env.world)
    rows = slice(low, high) if high > low else slice(0, 1)
    return mark([t[rows] for t in batch], high - low, total)


def train(tx, env, model, loss, optim, data, split=even):
    """The same run by a pipeline: `model` is a module or a function."""
    state = ax.init(tx, model, optim)
    step = ax.step(tx, loss)
    trace = []
    for batch in data:
        state, out = step(state, part(env, batch, split))
        assert out.stepped, out.skipped
        norm = float("nan") if out.norm is None else out.norm.item()
        trace.append(Step(float(out.loss), norm, weights(state.model)))
    return trace


def apart(judge, run, rank=0, world=1):
    """The largest difference from the judge: in losses, norms and weights, at any step.

    Of numbers beyond 1 it is a part of them: float32 holds 4 to 5e-7, no better.
    A run that holds slices of its weights, as `rank` of `world`, is held to slices.
    """
    assert len(judge) == len(run)
    gaps = [0.0]
    for wanted, got in zip(judge, run, strict=True):
        assert wanted.weights.keys() == got.weights.keys()
        for one, other in ((wanted.loss, got.loss), (wanted.norm, got.norm)):
            gaps.append(abs(one - other) / max(1.0, abs(one)))
        for name, ours in got.weights.items():
            theirs = wanted.weights[name]
            if ours.shape != theirs.shape:  # in slices along the first dimension
                theirs = (*theirs.chunk(world), *[theirs[:0]] * world)[rank]
            assert ours.shape == theirs.shape
            if ours.numel():
                gap = (ours - theirs).abs() / theirs.abs().clamp(min=1.0)
                gaps.append(gap.max().item())
    return float("inf") if any(map(math.isnan, gaps)) else max(gaps)


KINDS = ("plain", "ddp", "fsdp2")


def ranks(kind):
    """How many ranks a kind is tried on."""
    return 1 if kind == "plain" else 2


def placing(env, kind, **options):
    """The transform that places `Net` as `kind`."""
    if kind == "plain":
        return ax.identity
    return ax.shard_model(env, kind, blocks="layers.*", **options)


def pipeline(env, kind, *rest, **options):
    """A placed chain with clip and a schedule, as `by_hand` trains."""
    place = placing(env, kind, **options)
    return ax.chain(place, *rest, ax.clip(LIMIT), ax.with_schedule(curve))


def same(one, other):
    """Whether two sets of weights are equal to the bit."""
    assert one.keys() == other.keys()
    return all(torch.equal(one[n], other[n]) for n in one)
