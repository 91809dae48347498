"""A step of a small transformer on the CPU: bf16 by oneDNN against fp32.

    python benchmarks/cpu.py [--rounds 21]

Four layers of width 256 over 8 rows of 128 tokens, AdamW, one process, with one thread
and with two. What bf16 gains depends on the processor: `lscpu` names avx512_bf16 or
amx_bf16 where it has products in bf16; without them it is slower than fp32.
"""

from __future__ import annotations

import argparse

import compare
import torch
from torch import nn

import accelx as ax

WIDTH, TOKENS, ROWS, WORDS = 256, 128, 8, 1024
TEXT = torch.randint(WORDS, (ROWS, TOKENS))


class Net(nn.Module):
    """A causal transformer in plain torch."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WORDS)
        mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens):
        x = self.layers(self.embed(tokens), self.mask, is_causal=True)
        return self.head(x)


def loss(model, tokens):
    logits = model(tokens)[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits.float(), tokens[:, 1:].flatten())


def stepping(precision: str, threads: int):
    """A function that makes one step on that many threads."""
    tx = ax.chain(ax.with_precision(precision), ax.clip(1.0))
    state = ax.init(tx, Net, lambda m: torch.optim.AdamW(m.parameters(), 1e-4))
    step = ax.step(tx, loss)

    def run():
        nonlocal state
        torch.set_num_threads(threads)
        state, _ = step(state, TEXT)

    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    cases = [(p, n) for n in (1, 2) for p in ("fp32", "bf16")]
    variants = {
        f"accelx {p}, {n} thread{'s' * (n > 1)}": stepping(p, n) for p, n in cases
    }
    compare.write(
        "cpu",
        "A step of a small transformer on the CPU",
        {},
        compare.ratios(compare.interleaved(variants, rounds)),
        unit="ms a step",
        per=1e3,
        rounds=rounds,
    )
