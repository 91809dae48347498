"""A training step by each engine, against the same calls by hand, on CPU ranks.

    pip install -e ".[bench,deepspeed]"
    python benchmarks/engines.py [--rounds 15] [--only fsdp2 ...] [--ranks 2 4]

Four blocks (LayerNorm, width to four times width, back), mean square, AdamW. By hand,
peers where they can do it, and accelx take turns in one launch; their losses after the
first round must agree. accelerate 1.15.0 has FSDP2 on a GPU only, and here is told that
there is one; Fabric 2.6.6 refuses its FSDP and DeepSpeed without a GPU, so its strategy
for models of the user's own making stands for it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import date

import compare
import engines_by_hand as hand
import numpy as np
import torch
import torch.distributed as dist
from engines_by_hand import Block, Work

import accelx as ax
from accelx import testing
from accelx.rows import mark

WORKS = {"small": Work(64, 32, 8), "large": Work(256, 256, 2)}
OFTEN = 4  # times as many rounds of small work, whose times scatter
TITLE = "A step by each engine, against the same calls by hand"
LIMIT = 1e-4  # by which losses may part, relative


def chain(env: ax.Env, case: str) -> ax.Transform:
    if case.startswith("zero"):
        return ax.chain(ax.shard_model(env, "deepspeed", stage=int(case[-1])))
    if case == "tensor":
        plan = {"*.up": "column", "*.down": "row"}
        return ax.chain(ax.shard_model(env), ax.shard_tensors(env, plan))
    if case == "pipeline":
        size = 4 // env.world
        split = [str(i) for i in range(size, 4, size)]
        cut = ax.shard_stages(env, split, n=hand.MICROBATCHES)
        return ax.chain(cut, ax.shard_model(env))
    return ax.chain(ax.shard_model(env, case, blocks=Block))


def loss(model, batch):
    x, y = batch
    return hand.mean_square(model(x), y)


def accelx(env: ax.Env, case: str, work: Work) -> hand.Run:
    tx = chain(env, case)
    state = ax.init(tx, hand.net(work), hand.optimizer)
    step = ax.step(tx, loss)
    alike = case in ("tensor", "pipeline")  # all ranks have the same rows
    x, y = hand.batch(work, 0, 1) if alike else hand.ours(work)
    rows = mark([x, y], len(x), work.rows * env.world)

    def run() -> torch.Tensor:
        nonlocal state
        for _ in range(work.steps):
            state, out = step(state, rows)
        return out.loss

    return run


PEERS = {
    "fsdp2": {
        "accelerate": hand.accelerate_fsdp2,
        "fabric": hand.fabric(hand.fabric_fsdp2, 0),
    },
    "hsdp": {},
    "tensor": {"fabric": hand.fabric(hand.fabric_tensor, 1, hand.by_kind)},
    "pipeline": {"told": hand.pipeline_told},
    "zero2": {"accelerate": hand.accelerate_zero(2)},
    "zero3": {"accelerate": hand.accelerate_zero(3)},
}
BY_HAND = {
    "fsdp2": hand.fsdp2,
    "hsdp": hand.hsdp,
    "tensor": hand.tensor,
    "pipeline": hand.pipeline,
    "zero2": hand.zero(2),
    "zero3": hand.zero(3),
}
AXES = {"hsdp": "replicate=2,shard=2", "tensor": "tensor=-1", "pipeline": "stage=-1"}
RANKS = {"hsdp": (4,)}  # of the others 2 and 4


def told(env: ax.Env) -> None:
    """What a launcher tells ranks, for those that ask the environment."""
    os.environ |= {
        "RANK": str(env.rank),
        "WORLD_SIZE": str(env.world),
        "LOCAL_RANK": str(env.rank),
        "LOCAL_WORLD_SIZE": str(env.world),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none",
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_CPU": "true",
    }


def agreed(value: torch.Tensor | None) -> float:
    """The mean of a loss over the ranks that have one."""
    known = value is not None
    pair = torch.tensor([float(value) if known else 0.0, float(known)])
    dist.all_reduce(pair)
    return float(pair[0] / pair[1])


def measured(env: ax.Env, case: str, work: Work, rounds: int):
    """Seconds of each variant on this rank. Raises where they compute other losses."""
    torch.set_num_threads(1)
    told(env)
    ours = accelx(env, case, work)  # first: DeepSpeed then has its group
    runs = {"by hand": BY_HAND[case](work)}
    runs |= {name: make(work) for name, make in PEERS[case].items()}
    runs["accelx"] = ours
    losses = {name: agreed(run()) for name, run in runs.items()}
    first = losses["by hand"]
    if any(abs(one - first) > LIMIT * first for one in losses.values()):
        raise ValueError(f"{case} wants the same loss of each, got {losses}")
    return compare.interleaved(runs, rounds, dist.barrier, clocks), losses


def clocks() -> np.ndarray:
    """Seconds that went by, and those of a CPU that this process used, `(2,)`."""
    return np.array([time.perf_counter(), compare.cpu()])


def figures(case: str, n: int, rounds: int) -> list[dict]:
    """A row for each amount of work."""
    found = []
    for size, work in WORKS.items():
        load, often = os.getloadavg()[0], rounds * (OFTEN if size == "small" else 1)
        launch = testing.run(n, timeout=1800, axes=AXES.get(case))
        times, losses = launch(measured)(case, work, often)[0]
        row = {"case": case, "ranks": n, "work": size, "load": load}
        row |= {"rounds": often, "steps": work.steps, "loss": losses["by hand"]}
        for i, clock in enumerate(("times", "cpu")):
            one = {name: [float(t[i]) for t in each] for name, each in times.items()}
            row[clock] = compare.ratios(one)
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


NAMES = ("accelx", "accelerate", "fabric", "told")


def shown(row: dict, name: str) -> str:
    """A cell: the ratio of times with quartiles, then that of CPU time."""
    if name not in row["times"]:
        return ""
    told = []
    for clock in ("times", "cpu"):
        one = row[clock][name]
        told.append(f"{one['ratio']:.3f} ({one['low']:.3f} to {one['high']:.3f})")
    return "; CPU ".join(told)


def each_ms(row: dict, clock: str) -> float:
    """Milliseconds of one step by hand."""
    return row[clock]["by hand"]["seconds"] / row["steps"] * 1e3


def write(rows: list[dict]) -> None:
    head = f"{date.today()}, {platform.machine()}, Python {platform.python_version()}"
    sizes = (f"{k}: width {w.width}, {w.rows} rows a rank" for k, w in WORKS.items())
    lines = [
        f"### {TITLE}",
        "",
        f"{head}; time over that by hand, median over interleaved rounds with "
        "quartiles, and CPU time of rank 0 over that by hand. Goal: at most 1.03. "
        f"Four blocks, {'; '.join(sizes)}. Load is that of the machine, of two cores, "
        "before the launch. accelerate leaves FSDP2 out on CPU ranks in silence, so "
        "it was told that it has a GPU's; Fabric's is its strategy for models that the "
        "user's function cuts. Where a cell is empty the peer has nothing like it, or "
        "refuses it on CPU ranks. A pipeline by hand has its loss on the last rank "
        "alone; all told, it is sent to the others, as accelx does. That a stage has "
        "failed, or a weight no gradient, neither of both tells.",
        "",
        "| engine | ranks | work | by hand, ms a step (CPU) | accelx "
        "| accelerate 1.15.0 | Fabric 2.6.6 | by hand, all told | rounds | load |",
        f"|{'---|' * 10}",
    ]
    for row in rows:
        told = " | ".join(shown(row, name) for name in NAMES)
        lines.append(
            f"| {row['case']} | {row['ranks']} | {row['work']} "
            f"| {each_ms(row, 'times'):.1f} ({each_ms(row, 'cpu'):.1f}) | {told} "
            f"| {row['rounds']} | {row['load']:.1f} |"
        )
    text = "\n".join(lines)
    (compare.DOCS / "engines.md").write_text(f"{text}\n\n![{TITLE}](engines.png)\n")
    plot(rows)
    print(text)


def plot(rows: list[dict]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panes = plt.subplots(1, 2, sharey=True, figsize=(9, 0.3 * len(rows) + 1.4))
    places = range(len(rows))
    clocks = {"times": "elapsed time", "cpu": "CPU time of rank 0"}
    for pane, (clock, title) in zip(panes, clocks.items(), strict=True):
        for name, shape in zip(NAMES, "osx+", strict=True):
            known = [
                (i, r[clock][name]) for i, r in enumerate(rows) if name in r[clock]
            ]
            middle = [one["ratio"] for _, one in known]
            spread = [
                [max(0.0, one["ratio"] - one["low"]) for _, one in known],
                [max(0.0, one["high"] - one["ratio"]) for _, one in known],
            ]
            at = [i for i, _ in known]
            pane.errorbar(middle, at, xerr=spread, fmt=shape, capsize=2, label=name)
        pane.axvline(1.0, color="black", linewidth=0.8)
        pane.set_xlim(0.5, 2.0)
        pane.set_xlabel(f"{title} over that by hand")
    names = [f"{r['case']}, {r['ranks']} ranks, {r['work']}" for r in rows]
    panes[0].set_yticks(places, names, fontsize=8)
    panes[0].invert_yaxis()
    panes[1].legend(fontsize=8)
    figure.suptitle(TITLE, fontsize=10)
    figure.tight_layout()
    figure.savefig(compare.DOCS / "engines.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=list(BY_HAND), choices=BY_HAND)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    chosen = parser.parse_args()
    path = compare.HERE / "results" / "engines.json"
    known = json.loads(path.read_text()) if path.exists() else []
    order = list(BY_HAND)
    wanted = [(case, n) for case in chosen.only for n in chosen.ranks]
    for case, n in wanted if chosen.rounds else ():  # 0: write down what is known
        if n not in RANKS.get(case, (2, 4)):
            continue
        new = figures(case, n, chosen.rounds)
        known = [r for r in known if (r["case"], r["ranks"]) != (case, n)] + new
        known.sort(key=lambda r: (order.index(r["case"]), r["ranks"]))
        path.write_text(json.dumps(known, indent=1) + "\n")
    write(known)
