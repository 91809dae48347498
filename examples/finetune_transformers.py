"""A model of `transformers`, as it is, on lines of Python that differ in length.

    python -m accelx.spawn -n 2 examples/finetune_transformers.py --kind fsdp2
    python examples/finetune_transformers.py    one process, the same numbers

Each line has its own number of bytes, so each rank has its own number of tokens in a
batch. The loss is a `Mean`: the sum over all of them, divided once by their number.
The weights start at random, so that nothing has to be downloaded; for a model of yours
write `LlamaForCausalLM.from_pretrained(...)`, and its tokenizer in `padded`.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import accelx as ax

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--kind", default="ddp", help="ddp or fsdp2 (default: ddp)")
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--accumulate", type=int, default=2, help="microbatches a step")

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    tie_word_embeddings=True,
)


def lines():
    """The lines of the modules named here, without blank ones."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / name for name in ("argparse.py", "statistics.py", "textwrap.py")]
    found = b"\n".join(file.read_bytes() for file in files).split(b"\n")
    return [line + b"\n" for line in found if line.strip()]


def padded(batch):
    """Lines as (rows, longest) bytes, with a mask of those that are real."""
    rows = [torch.tensor(list(line[:96])) for line in batch]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "input_ids": tokens,
        "attention_mask": (torch.arange(tokens.size(1)) < lengths[:, None]).long(),
    }


def loss(model, batch):
    """The mean over real tokens, as their sum and number."""
    logits = model(**batch).logits[:, :-1]
    target, real = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
    each = F.cross_entropy(logits.mT.float(), target, reduction="none")
    return ax.Mean((each * real).sum(), real.sum())


def main():
    args = parser.parse_args()
    env = ax.connect()
    ax.seed(env, 0)
    text = lines()
    held_out = text[::10]
    train = [line for i, line in enumerate(text) if i % 10]
    loader = DataLoader(train, batch_size=40, shuffle=True, collate_fn=padded)
    exam = DataLoader(held_out, batch_size=64, collate_fn=padded)

    tx = ax.chain(
        ax.shard_loader(env, seed=0),
        ax.shard_model(env, args.kind, blocks="model.layers.*"),
        ax.accumulate(args.accumulate),
        ax.clip(1.0),
        ax.with_schedule(ax.warmup_cosine(args.steps // 15, args.steps)),
    )
    state = ax.init(
        tx,
        lambda: LlamaForCausalLM(CONFIG),
        lambda model: AdamW(model.parameters(), 3e-3, eps=1e-6),
    )
    step, judge = ax.step(tx, loss), ax.measure(tx, loss)
    for batch in ax.feed(tx, loader, stop=args.steps):
        state, out = step(state, batch)
        if env.main and state.step % 50 == 0:
            print(f"step {state.step}: loss {out.loss:.3f} over {out.weight:g} tokens")

    means = [judge(state, batch) for batch in ax.feed(tx, exam)]
    mean = ax.reduce(env, sum(means, start=ax.Mean(0.0, 0)))
    if env.main:
        print(f"held-out loss {mean.value:.4f} over {mean.weight:g} tokens")


if __name__ == "__main__":
    main()
