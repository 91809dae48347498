"""Adapters over frozen weights that bitsandbytes packed, against a plain loop."""

from functools import cache

import pytest
import torch
from torch import nn

import accelx as ax
from accelx import testing
from tests.laws import training as t

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.multi
WIDTH, NEAR = 64, 2e-6
CASES = [("nf4", "ddp"), ("nf4", "fsdp2"), ("int8", "ddp")]


class Adapted(nn.Module):
    """A layer that bitsandbytes packs, with low-rank adapters."""

    def __init__(self, kind):
        super().__init__()
        self.base = {
            "nf4": lambda: bnb.nn.Linear4bit(
                WIDTH, WIDTH, quant_type="nf4", compute_dtype=torch.float32
            ),
            "int8": lambda: bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False),
            "none": lambda: nn.Linear(WIDTH, WIDTH),
        }[kind]()
        self.base.requires_grad_(False)
        self.down = nn.Linear(WIDTH, 4, bias=False)
        self.up = nn.Linear(4, WIDTH, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def made(kind):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(Adapted(kind), nn.ReLU(), Adapted(kind))
        return model.to("cpu")  # it packs where a weight is moved

    return make


def optim(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)


def loss(model, batch):
    return model(batch[0]).square().mean()


@cache
def judge(kind):
    """Losses of a plain loop on one process."""
    data = torch.randn(4, 8, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    data = [(batch[:, 0],) for batch in data]
    return data, [s.loss for s in t.by_hand(made(kind), loss, optim, data, t.LIMIT)]


def losses(env, kind, place):
    """The same, on ranks and in microbatches."""
    tx = t.pipeline(env, "plain", ax.shard_model(env, place), ax.accumulate(2))
    return [s.loss for s in t.train(tx, env, made(kind), loss, optim, judge(kind)[0])]


def rank(env):
    with pytest.raises(ax.PlacementError, match=r"Int8Params.*0\.base\.weight.*ddp"):
        losses(env, "int8", "fsdp2")
    return [losses(env, *case) for case in CASES]


def test_what_bitsandbytes_packed_is_trained_over_as_by_hand():
    """Copies and slices; other weights, or none packed, give other losses."""
    unpacked = torch.tensor(judge("none")[1])
    wanted = [torch.tensor(judge(kind)[1]) for kind, _ in CASES]
    for found in testing.run(2)(rank)():
        for want, got in zip(wanted, found, strict=True):
            assert (torch.tensor(got) - want).abs().max() < NEAR
            assert (torch.tensor(got) - unpacked).abs().max() > 10 * NEAR
