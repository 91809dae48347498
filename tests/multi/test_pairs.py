"""Ways to divide a run, two and more at a time: the run of one process, or an error.

docs/parallel.md has the table of every pair; tests/unit/test_pairs_page.py holds it to
what is tried here.
"""

import re
import tempfile
from functools import cache

import pytest
import torch
import torch._dynamo  # optimizers import it when first made: here, not in each rank
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor.parallel
from torch import nn
from torch.nn import functional as F

import accelx as ax
from accelx import testing
from accelx.engines.options import KINDS
from accelx.engines.packed import Form, pack, unpack
from accelx.env_part import rows_env
from tests.laws import training as t
from tests.parallel_page import Pair, refusals

pytestmark = [
    pytest.mark.multi,
    t.quiet_views,
    pytest.mark.filterwarnings("ignore:While redistributing:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of:UserWarning"),
]
WIDTH, HEADS, TOKENS, LENGTH, COUNT = 8, 4, 12, 12, 4
ROWS = (6, 1, 4)
PACKED = "layers.0.mlp.0"  # frozen, and packed, where a case has quantize
DECAY = 0.6


class Attention(nn.Module):
    """Counts the heads that are here."""

    def __init__(self):
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = (
            f(x).view(*x.shape[:-1], -1, WIDTH // HEADS).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """One expert a row."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(COUNT, WIDTH, WIDTH) / 2)

    def forward(self, tokens, index, weights):
        each = torch.einsum("tw,tkwv->tkv", tokens, self.weight[index])
        return (torch.tanh(each) * weights[..., None]).sum(1)


class Mixture(nn.Module):
    """A router, and the experts that it chooses two of."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, COUNT), Experts()

    def forward(self, x):
        flat = x.flatten(0, -2)
        weights, index = self.router(flat).softmax(-1).topk(2)
        return self.experts(flat, index, weights).view_as(x)


class Block(nn.Module):
    """Attention, and an MLP or a mixture."""

    def __init__(self, mixed):
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        up, down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.mlp = Mixture() if mixed else nn.Sequential(up, nn.GELU(), down)

    def forward(self, x):
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class Net(nn.Module):
    """A head that is the table, over the first and the last stage."""

    def __init__(self, mixed=False):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList([Block(mixed), Block(mixed)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, places):
        x = self.embed(tokens) + self.places(places)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def made(mixed=False, packed=False, dtype=torch.float64):
    """A function that makes the same model each time."""

    def make():
        torch.manual_seed(3)
        model = Net(mixed).to(dtype)
        if packed:
            model.get_submodule(PACKED).weight.requires_grad_(False)
        return model

    return make


def rounded():
    """The model with the floats that its packed weight stands for."""
    model = made(packed=True)()
    weight = model.get_submodule(PACKED).weight
    form = Form("int8", weight.shape[1], weight.dtype)
    weight.data.copy_(unpack(pack(weight, "int8"), form))
    return model


def batches(dtype=torch.float64):
    """(tokens, labels, places, weights): rows of one length, tokens that count."""
    draw, found = torch.Generator().manual_seed(2), []
    for n in ROWS:
        tokens = torch.randint(TOKENS, (n, LENGTH + 1), generator=draw)
        weights = (torch.rand(n, LENGTH, generator=draw) < 0.6).to(dtype)
        weights[:, 0] = 1
        places = torch.arange(LENGTH).expand(n, -1).contiguous()
        labels = tokens[:, 1:].contiguous()
        found.append((tokens[:, :-1].contiguous(), labels, places, weights))
    return found


def loss(model, batch):
    """A mean over tokens."""
    tokens, labels, places, weights = batch
    each = F.cross_entropy(model(tokens, places).mT, labels, reduction="none")
    return ax.Mean((each * weights).sum(), weights.sum())


def uneven(model, batch):
    """What must not pass: the mean of each part's own mean."""
    value = loss(model, batch)
    return value.total / value.weight


PLAN = {
    "layers.*.attention.[qkv]": "column",
    "layers.*.attention.o": "row",
    "layers.*.mlp.0": "column",
    "layers.*.mlp.2": "row",
    "embed": "embedding",
    "head": "column_gather",
}


def sgd(model):
    """One step is linear in the gradient."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)


def outer(params):
    """Goes where the ranks went."""
    return torch.optim.SGD(params, 1.0)


PASSES = {  # name: the pass of a chain, on an Env
    "shard_tensors": lambda env: ax.shard_tensors(env, PLAN),
    "shard_sequence": lambda env: ax.shard_sequence(env),
    "shard_stages": lambda env: ax.shard_stages(env, "layers.1", 2),
    "shard_experts": lambda env: ax.shard_experts(env, "layers.*.mlp.experts"),
    "with_local_sgd": lambda env: ax.with_local_sgd(env, 1),
    "with_diloco": lambda env: ax.with_diloco(env, 1, outer),
    "with_ema": lambda env: ax.with_ema(DECAY),
    "remat": lambda env: ax.remat("layers.*"),
    "compile": lambda env: ax.compile("layers.*", backend="eager"),
    "quantize": lambda env: ax.quantize("int8", PACKED),
    "accumulate": lambda env: ax.accumulate(2),
}
APART = {"with_local_sgd", "with_diloco"}
ALL = ("with_ema", "remat", "accumulate", "save_state")
TENSOR, EXPERT = ("shard_tensors", *ALL), ("shard_experts", *ALL)
STAGE, SEQUENCE = ("shard_stages", *ALL), ("shard_sequence", *ALL)
CASES = {  # ranks: [(axes, kind, *names)]
    2: [
        ("tensor=2", "ddp", *TENSOR, "compile"),
        ("sequence=2", "ddp", *SEQUENCE, "quantize"),
        ("stage=2", "ddp", *STAGE, "compile"),
        ("expert=2", "ddp", *EXPERT, "compile"),
        ("data=2", "ddp", *ALL, "compile", "quantize"),
        ("data=2", "fsdp2", *ALL, "compile", "quantize"),
        ("replicate=1,shard=2", "hsdp", *ALL, "compile", "quantize"),
        ("data=2", "deepspeed", *ALL, "compile"),
        ("data=2", "ddp", "with_local_sgd", *ALL, "compile", "quantize"),
        ("data=2", "ddp", "with_diloco", *ALL, "compile", "quantize"),
    ],
    4: [
        ("stage=2,tensor=2", "ddp", *STAGE, "shard_tensors", "compile"),
        ("replicate=1,shard=2,tensor=2", "hsdp", *TENSOR),
        ("replicate=1,shard=2,stage=2", "hsdp", *STAGE),
        ("sequence=2,tensor=2", "fsdp2", *SEQUENCE, "shard_tensors"),
        ("sequence=2,expert=2", "ddp", *SEQUENCE, "shard_experts"),
        ("sequence=2,expert=2", "fsdp2", *SEQUENCE, "shard_experts"),
    ],
}


def label(case):
    return "-".join(case)


@cache
def judge(mixed, packed, apart):
    """The run of one process by hand."""
    make = rounded if packed else made(mixed)
    if apart:
        return t.by_hand(make, loss, sgd, batches(), limit=1e9)
    return t.by_hand(make, loss, t.grouped, batches())


def before(case):
    """The judge of a case, and whether its ranks train apart."""
    packed = "quantize" in case
    return judge("shard_experts" in case, packed, bool(APART & {*case})), packed


def average(trace):
    """The average of with_ema, in closed form."""
    found = trace[0].weights
    for step in trace[1:]:
        found = {n: DECAY * w + (1 - DECAY) * step.weights[n] for n, w in found.items()}
    return found


def held(model):
    """What this rank's model has of each weight that is trained, in full."""
    named = model.named_parameters()
    return {n: t.whole(p).clone() for n, p in named if p.requires_grad}


def off(weights, wanted):
    assert weights
    return max((w - wanted[n]).abs().max().item() for n, w in weights.items())


def gaps(env, case, folder, loss=loss):
    """How far each number of a case lies from the judge's."""
    axes, kind, *names = case
    env, (wanted, packed) = ax.connect(env, axes=axes), before(case)
    apart = bool(APART & {*names})
    rest = () if apart else (ax.clip(t.LIMIT),)
    tx = ax.chain(
        *(PASSES[n](env) for n in names if n != "save_state"),
        ax.shard_model(env, kind),
        *(*rest, ax.with_schedule(t.curve)),
    )
    model = made("shard_experts" in case, packed)
    state = ax.init(tx, model, sgd if apart else t.grouped)
    step, found = ax.step(tx, loss), {"loss": 0.0, "norm": 0.0, "weights": 0.0}
    for batch, want in zip(batches(), wanted, strict=True):
        state, out = step(state, t.part(rows_env(env), batch))
        assert out.stepped, out.skipped
        more = {"loss": abs(float(out.loss) - want.loss)}
        if not apart:
            more["norm"] = abs(float(out.norm) - want.norm)
        if kind != "deepspeed":
            more["weights"] = off(held(state.model), want.weights)
        found |= {n: max(found[n], gap) for n, gap in more.items()}
    if "with_ema" in names:
        with ax.averaged(state) as averaged:
            found["average"] = off(held(averaged), average(wanted))
    if "save_state" in names:
        ax.save_state(env, folder)(state)
        ax.barrier(env)
        back = made("shard_experts" in case, packed)()
        one = ax.chain(
            ax.quantize("int8", PACKED) if packed else ax.identity,
            ax.load_state(ax.Env(), folder, only="model.**"),
        )
        loaded = ax.init(one, back, None)
        found["saved"] = off(held(loaded.model), wanted[-1].weights)
    return found
