"""A rank of 1,024 that train a model of 70 B parameters: what it holds and sends.

No rank is started and no number computed: shapes go through the real placing, forward
and backward pass. Writes docs/benchmarks/plan.md.
"""

import os
import platform
import time
from pathlib import Path

import torch
import transformers
from torch.nn import functional

import accelx as ax
from accelx.simulate import simulate
from accelx.testing import run

MICRO = 8  # microbatches of a row, where there are stages
STAGES = "data=16,stage=8,tensor=8"
LAYOUTS = {
    "fsdp2 x stage x tensor, first": ("fsdp2", STAGES),
    "fsdp2 x stage x tensor, last": ("fsdp2", STAGES),
    "hsdp x tensor, no remat": ("hsdp", "replicate=4,shard=32,tensor=8"),
    "hsdp x tensor": ("hsdp", "replicate=4,shard=32,tensor=8"),
    "fsdp2 x tensor": ("fsdp2", "shard=128,tensor=8"),
    "fsdp2": ("fsdp2", "shard=1024"),
}
CONFIG = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TOKENS = 4096


def loss(model, tokens):
    """The mean over tokens."""
    logits = model(input_ids=tokens).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def planned(name: str):
    """The plan of one layout, and the seconds that it took."""

    kind, axes = LAYOUTS[name]

    def chained(env):
        place = ax.shard_model(env, kind, blocks="model.layers.*")
        cut = [ax.shard_tensors(env)] if "tensor" in axes else []
        cut += [ax.shard_stages(env, "balanced", MICRO)] if "stage" in axes else []
        again = [] if "no remat" in name else [ax.remat("model.layers.*")]
        return ax.chain(place, *cut, *again)

    rows = MICRO if "stage" in axes else 1
    config = transformers.LlamaConfig(**CONFIG, use_cache="stage" not in axes)
    tokens = torch.zeros(rows, TOKENS, dtype=torch.int64)
    began = time.process_time()
    plan = simulate(
        chained,
        lambda: transformers.LlamaForCausalLM(config),
        lambda model: torch.optim.AdamW(model.parameters(), 1e-4),
        loss,
        tokens,
        world=1024,
        axes=axes,
        rank=1023 if "last" in name else 0,
    )
    return plan, time.process_time() - began


def table(plans) -> list[str]:
    """A row for each layout, in GiB."""
    sent = sorted({kind for plan, _ in plans.values() for kind in plan.sent})
    held = ["weights", "gradients", "optimizer", "activations", "received", "total"]
    columns = ["layout", *held, *(f"{kind}, sent" for kind in sent), "s"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, (plan, seconds) in plans.items():
        row = [getattr(plan, kind) / 2**30 for kind in held]
        row += [plan.sent.get(kind, 0) / 2**30 for kind in sent]
        numbers = " | ".join(f"{x:.2f}" for x in row)
        lines.append(f"| {name} ({LAYOUTS[name][1]}) | {numbers} | {seconds:.1f} |")
    return lines


def main() -> None:
    """Plan each layout in a process of its own, and write the page."""
    plans = {}
    for name in LAYOUTS:
        plans[name] = run(1, timeout=300)(lambda env, on=name: planned(on))()[0]
    lines = [
        "# A simulated rank of 1,024, Llama of 70 B parameters",
        "",
        f"float32, AdamW, one row of {TOKENS} tokens a rank, {MICRO} of them in stages",
        "(1f1b, one by one), blocks computed again in the backward pass (remat). GiB",
        "that rank 0 holds, or the last where it says so, and that it sends a step. "
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}; s: seconds of one core that the plan took.",
        "",
        *table(plans),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    (Path(__file__).parents[1] / "docs/benchmarks/plan.md").write_text(text)


if __name__ == "__main__":
    main()
