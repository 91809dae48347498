"""Train a small GPT on the sources of Python's own standard library, a byte a token.

    python -m accelx.spawn -n 2 examples/gpt.py        any number of ranks
    python examples/gpt.py                             one process, the same numbers
    python -m accelx.spawn -n 2 examples/gpt.py --kind fsdp2 --accumulate 4
    python examples/gpt.py --save runs/gpt/saved       goes on where it was stopped

About a minute and a half on two CPU cores. Writes the loss curve to
runs/gpt/loss.png.
"""

import argparse
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import accelx as ax

# --------------------------------------------------------------------------- the model

VOCAB, CONTEXT, WIDTH, HEADS, LAYERS = 256, 128, 128, 4, 4


def turn(x):
    """Rotate pairs of features by angles that grow along the text: where they are."""
    length, size = x.shape[-2:]
    pace = 1000 ** -torch.linspace(0, 1, size // 2, device=x.device)
    angle = torch.arange(length, device=x.device)[:, None] * pace
    a, b = x.chunk(2, dim=-1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """Attention, then a two-layer network, each added to what came in."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attend(self, x):
        rows, length, _ = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        return self.mix(y.transpose(1, 2).reshape(rows, length, WIDTH))


class GPT(nn.Module):
    """(rows, length) bytes -> (rows, length, 256) logits of the byte after each."""

    def __init__(self):
        super().__init__()
        self.bytes = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens):
        x = self.bytes(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def loss(model, tokens):
    """The mean over the bytes of each row, in nats; all rows are equally long."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


# --------------------------------------------------------------------------- the data


class Windows(Dataset):
    """Windows of CONTEXT + 1 bytes, one every `stride` bytes."""

    def __init__(self, text, stride):
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.stride = stride

    def __len__(self):
        return (len(self.text) - CONTEXT - 1) // self.stride + 1

    def __getitem__(self, i):
        return self.text[i * self.stride :][: CONTEXT + 1].long()


def sources():
    """All modules of the standard library's top folder; every 20th file is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    held_out = files[10::20]
    train = [file for file in files if file not in held_out]
    return [b"".join(file.read_bytes() for file in part) for part in (train, held_out)]


# ----------------------------------------------------------------------- what comes out


def write(model, prompt, length, device):
    """`prompt` and `length` bytes more. Every rank takes part: it may hold a slice."""
    dice = torch.Generator().manual_seed(0)
    text = torch.tensor([list(prompt)], device=device)
    for _ in range(length):
        logits = model(text[:, -CONTEXT:])[0, -1].float().cpu()
        choice = torch.multinomial((logits / 0.7).softmax(0), 1, generator=dice)
        text = torch.cat([text, choice.to(device)[None]], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


def draw(train, held_out, path):
    """The loss curve as a PNG; `train` and `held_out` are lists of (step, loss)."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(*zip(*train, strict=True), lw=0.8, alpha=0.7, label="training batches")
    axes.plot(*zip(*held_out, strict=True), "o-", ms=4, label="held-out files")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="examples/gpt.py")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


# --------------------------------------------------------------------------- the run

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--kind", default="ddp", help="ddp or fsdp2 (default: ddp)")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--batch", type=int, default=16, help="windows a step, all ranks'")
parser.add_argument("--accumulate", type=int, default=1, help="microbatches a step")
parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16")
parser.add_argument("--every", type=int, default=50, help="steps between validations")
parser.add_argument("--sample", type=int, default=300, help="bytes to write at the end")
parser.add_argument("--out", type=Path, default=Path("runs/gpt"))
parser.add_argument("--save", help="folder or URL to save to and to go on from")
parser.add_argument("--until", type=int, help="step to leave at, to go on later")


def with_curves(state, tx):
    """A slot of our own: training and held-out losses, saved with the rest."""
    return ax.with_slot(state, "curves", ([], []))


def note(state, out):
    """Write the loss down before the state is saved."""
    state.slots["curves"][0].append((state.position, float(out.loss)))
    return state, out


def resumable(env, url, every):
    """Go on from what is under `url`, save there, also when a signal says to leave."""
    if url is None:
        return ax.identity
    return ax.chain(
        ax.load_state(env, url, missing="fresh"),
        ax.save_state(env, url, every, keep=2, wait=False),
        ax.on_preempt(env, url),
    )


def main():
    args = parser.parse_args()
    env = ax.connect()
    ax.seed(env, 0)
    train, held_out = sources()
    loader = DataLoader(Windows(train, CONTEXT), args.batch, shuffle=True)
    exam = DataLoader(Windows(held_out, 1024), 64)

    tx = ax.chain(
        ax.shard_loader(env, seed=0),
        ax.with_precision(args.precision),
        ax.shard_model(env, args.kind, blocks="layers.*"),
        ax.accumulate(args.accumulate),
        ax.clip(1.0),
        ax.with_schedule(ax.warmup_cosine(args.steps // 15, args.steps, floor=0.05)),
        ax.transform("curves", start=with_curves, after=note),
        resumable(env, args.save, args.every),
    )
    state = ax.init(tx, GPT, lambda m: AdamW(m.parameters(), 3e-3, (0.9, 0.95), 1e-6))
    step, judge = ax.step(tx, loss), ax.measure(tx, loss)

    def validate(state):
        means = [judge(state, batch) for batch in ax.feed(tx, exam)]
        return float(ax.reduce(env, sum(means, start=ax.Mean(0.0, 0))).value)

    curve, checks = state.slots["curves"]
    if env.main:
        size = sum(p.numel() for p in state.model.parameters())
        print(f"{size:,} weights, {len(train):,} bytes of Python, {env.world} ranks")
        if state.position:
            print(f"going on at step {state.position}")
    if not checks or checks[-1][0] != state.position:
        checks.append((state.position, validate(state)))
    first, seconds, stop = state.position, 0.0, args.until or args.steps
    bar = tqdm(
        total=args.steps,
        initial=first,
        disable=not env.main,
        unit="step",
        mininterval=1,
    )
    for batch in ax.feed(tx, loader, start=state, stop=stop):
        began = time.perf_counter()
        state, out = step(state, batch)
        seconds += time.perf_counter() - began
        if state.position % args.every == 0 or state.position == args.steps:
            checks.append((state.position, validate(state)))
        bar.update()
        speed = (state.position - first) * args.batch * CONTEXT / seconds
        bar.set_postfix_str(
            f"loss {out.loss:.3f}, held out {checks[-1][1]:.3f}, {speed:,.0f} bytes/s",
            refresh=False,
        )
    bar.close()
    if stop < args.steps:
        if args.save and state.step % args.every:
            ax.save_state(env, args.save)(state)
        if env.main:
            print(f"left at step {state.position} of {args.steps}; run it again")
        return

    with ax.evaluating(state) as model:
        text = write(model, b"    def ", args.sample, env.device)
    if env.main:
        args.out.mkdir(parents=True, exist_ok=True)
        draw(curve, checks, args.out / "loss.png")
        print(f"\nThe model writes:\n\n{text}\n")
        print(f"last training loss  {curve[-1][1]:.4f} nats per byte")
        print(f"held-out loss       {checks[-1][1]:.4f} nats per byte")
        print(f"loss curve          {args.out / 'loss.png'}")


if __name__ == "__main__":
    main()
