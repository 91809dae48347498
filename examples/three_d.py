"""Data, stages and layers divided at once: three dimensions of ranks, one program.

    python examples/three_d.py
    python -m accelx.spawn -n 4 examples/three_d.py --stage 2 --tensor 2
    python -m accelx.spawn -n 8 examples/three_d.py --stage 2 --tensor 2 --kind fsdp2

Each prints the same numbers. docs/megatron.md has the options of Megatron-LM beside it.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax

TOKENS, WIDTH, HEADS, DEPTH, LENGTH = 64, 32, 4, 4, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def attention(self, x):
        size = WIDTH // HEADS  # of a head; -1 counts those that are on this rank
        q, k, v = (
            part(x).view(*x.shape[:-1], -1, size).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) / 10)
        self.layers = nn.ModuleList([Block() for _ in range(DEPTH)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embed.weight  # on the first and on the last stage
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self, tokens):
        x = self.embed(tokens) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


PLAN = {
    "layers.*.[qkv]": "column",
    "layers.*.o": "row",
    "layers.*.up": "column",
    "layers.*.down": "row",
    "embed": "embedding",
    "head": "loss",  # logits stay cut; cross_entropy takes them so
}


def made():
    torch.manual_seed(0)
    return GPT()


def loss(model, batch):
    (tokens,) = batch
    each = F.cross_entropy(
        model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return ax.Mean(each.sum(), each.numel())


def train(env, kind="ddp", steps=8):
    """The loss and the norm of each step."""
    draw = torch.Generator().manual_seed(0)
    data = torch.randint(TOKENS, (64, LENGTH), generator=draw)
    tx = ax.chain(
        ax.shard_loader(env, seed=0),
        ax.shard_model(env, kind),
        ax.shard_stages(env, "balanced", n=4),
        ax.shard_tensors(env, PLAN),
        ax.clip(1.0),
    )
    state = ax.init(tx, made, lambda m: torch.optim.AdamW(m.parameters(), 3e-3))
    step, trace = ax.step(tx, loss), []
    loader = DataLoader(TensorDataset(data), batch_size=16, shuffle=True)
    for batch in ax.feed(tx, loader, stop=steps):
        state, out = step(state, batch)
        trace.append((float(out.loss), float(out.norm)))
    return trace


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--kind", default="ddp", choices=("ddp", "fsdp2"))
    given = parser.parse_args()
    env = ax.connect(axes=f"data=-1,stage={given.stage},tensor={given.tensor}")
    for i, (value, norm) in enumerate(train(env, given.kind)):
        if env.main:
            print(f"step {i}: loss {value:.4f}, norm {norm:.4f}")


if __name__ == "__main__":
    main()
