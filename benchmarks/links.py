"""Ranks that train apart, against ddp, over links of several speeds.

    python benchmarks/links.py [--rounds 15] [--ranks 2] [--mbit 10 100 1000 0]

Half of the ranks in each of two network namespaces, which a pair of virtual devices
joins; `tc` holds both ends to so many Mbit/s (0: as fast as it goes). Wants root, and
ip and tc of iproute2. Namespaces and ranks are gone afterwards, also after a failure.
Four blocks (LayerNorm, 128 to 512 and back: 2.0 MiB of weights), 512 rows a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from datetime import date

import compare
import torch
import torch.distributed as dist
from engines_by_hand import Work, loop, mean_square, net, optimizer, ours

import accelx as ax
from accelx.rows import mark

EVERY = 8  # updates between two means
WORK = Work(128, 512, EVERY)
DEVICE, ADDRESS = "wire0", "10.77.0."
FIRST = "ddp by hand"


def shell(*words: str) -> None:
    subprocess.run(words, check=True)


@contextmanager
def sides(mbit: int) -> Generator[list[str]]:
    """Two namespaces with a link of `mbit` Mbit/s between them; 0: no limit."""
    names = [f"accelx-links-{os.getpid()}-{i}" for i in range(2)]
    with ExitStack() as stack:
        for name in names:
            shell("ip", "netns", "add", name)
            stack.callback(shell, "ip", "netns", "del", name)
        here, there = (("name", DEVICE, "netns", name) for name in names)
        shell("ip", "link", "add", *here, "type", "veth", "peer", *there)
        for i, name in enumerate(names):
            inside = ("ip", "-n", name)
            shell(*inside, "addr", "add", f"{ADDRESS}{i + 1}/24", "dev", DEVICE)
            shell(*inside, "link", "set", "lo", "up")
            shell(*inside, "link", "set", DEVICE, "up")
            if mbit:
                held_to(name, mbit)
        yield names


def held_to(name: str, mbit: int) -> None:
    """Let a token bucket of 10 ms, or of a large packet, send what leaves."""
    burst = max(64_000, mbit * 1_000_000 // 8 // 100)
    bucket = ("tbf", "rate", f"{mbit}mbit", "burst", str(burst), "limit", "8mb")
    shell("tc", "-n", name, "qdisc", "add", "dev", DEVICE, "root", *bucket)


def launch(mbit: int, ranks: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, by rank 0."""
    with sides(mbit) as names, ExitStack() as stack:
        started, each = [], ranks // 2
        for rank in range(ranks):
            told = {
                "RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_RANK": rank % each,
                "LOCAL_WORLD_SIZE": each,
                "GROUP_RANK": rank // each,
                "GROUP_WORLD_SIZE": 2,
                "MASTER_ADDR": f"{ADDRESS}1",
                "MASTER_PORT": 29500,
                "GLOO_SOCKET_IFNAME": DEVICE,
                "OMP_NUM_THREADS": 1,
            }
            side = names[rank // each]
            words = ("ip", "netns", "exec", side, sys.executable, __file__)
            one = subprocess.Popen(
                [*words, "--rank", "--rounds", str(rounds)],
                env=os.environ | {k: str(v) for k, v in told.items()},
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
            )
            started.append(one)
            stack.callback(one.wait)
            stack.callback(one.kill)
        said, _ = started[0].communicate()
        if any(one.wait() for one in started):
            raise RuntimeError(f"ranks wanted to end well at {mbit} Mbit/s; see above")
    return json.loads(said.splitlines()[-1])


def loss(model, batch):
    x, y = batch
    return mean_square(model(x), y)


def accelx(env: ax.Env, *more: ax.Transform) -> Callable[[], None]:
    tx = ax.chain(ax.shard_model(env), *more)
    state = ax.init(tx, net(WORK), optimizer)
    step = ax.step(tx, loss)
    rows = mark(ours(WORK), WORK.rows, WORK.rows * env.world)

    def run() -> None:
        nonlocal state
        for _ in range(WORK.steps):
            state, _ = step(state, rows)

    return run


def averaged() -> Callable[[], None]:
    """Local SGD by what torch has for it."""
    from torch.distributed.algorithms.model_averaging.averagers import (
        PeriodicModelAverager,
    )

    model = net(WORK)
    optim = optimizer(model)
    averager = PeriodicModelAverager(period=EVERY)
    x, y = ours(WORK)

    def run() -> None:
        for _ in range(WORK.steps):
            mean_square(model(x), y).backward()
            optim.step()
            averager.average_parameters(model.parameters())
            optim.zero_grad()

    return run


def outer(weights):
    return torch.optim.SGD(weights, 0.7, momentum=0.9, nesterov=True)


def work(rounds: int) -> None:
    """What each rank does."""
    torch.set_num_threads(1)
    env = ax.connect(device="cpu")
    ddp = torch.nn.parallel.DistributedDataParallel(net(WORK))
    runs = {
        FIRST: loop(WORK, ddp, optimizer(ddp), ours(WORK)),
        "accelx ddp": accelx(env),
        f"PeriodicModelAverager({EVERY})": averaged(),
        f"accelx with_local_sgd({EVERY})": accelx(env, ax.with_local_sgd(env, EVERY)),
        f"accelx with_diloco({EVERY})": accelx(env, ax.with_diloco(env, EVERY, outer)),
    }
    times = compare.interleaved(runs, rounds, meet=dist.barrier)
    if env.main:
        print(json.dumps(times), flush=True)
    ax.close(env)


def speed(mbit: int) -> str:
    return f"{mbit:,} Mbit/s" if mbit else "no limit"


def write(rows: list[dict]) -> None:
    names = list(rows[0]["times"])
    lines = [
        "### A step over slow links: ddp, local SGD, DiLoCo",
        "",
        f"{date.today()}, {platform.machine()}, Python {platform.python_version()}; "
        "milliseconds a step (median over interleaved rounds), and the ratio to ddp by "
        "hand with quartiles. Ranks stand in two network namespaces, whose link `tc` "
        "slows down. Load is that of the machine before the launch.",
        "",
        f"| link | ranks | {' | '.join(names)} | rounds | load |",
        f"|{'---|' * (len(names) + 4)}",
    ]
    for row in rows:
        told = " | ".join(
            f"{one['seconds'] / EVERY * 1e3:.0f}; {one['ratio']:.3f} "
            f"({one['low']:.3f} to {one['high']:.3f})"
            for one in row["times"].values()
        )
        lines.append(
            f"| {speed(row['mbit'])} | {row['ranks']} | {told} | {row['rounds']} "
            f"| {row['load']:.1f} |"
        )
    text = "\n".join(lines)
    title = "A step over slow links"
    (compare.DOCS / "links.md").write_text(f"{text}\n\n![{title}](links.png)\n")
    plot(title, rows)
    print(text)


def plot(title: str, rows: list[dict]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    every = sorted({row["ranks"] for row in rows})
    figure, panes = plt.subplots(
        1, len(every), figsize=(5.5 * len(every), 4), sharey=True, squeeze=False
    )
    for pane, ranks in zip(panes[0], every, strict=True):
        some = [row for row in rows if row["ranks"] == ranks]
        for name in some[0]["times"]:
            each = [row["times"][name]["seconds"] / EVERY * 1e3 for row in some]
            line = "o-" if name.startswith("accelx") else "x--"
            pane.plot(range(len(some)), each, line, label=name)
        pane.set_xticks(range(len(some)), [speed(row["mbit"]) for row in some])
        pane.set_yscale("log")
        pane.set_title(f"{title}, {ranks} ranks", fontsize=10)
    panes[0][0].set_ylabel("ms a step")
    panes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(compare.DOCS / "links.png", dpi=120)
    plt.close(figure)


def main(rounds: int, ranks: list[int], speeds: list[int]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and clean up
    path = compare.HERE / "results" / "links.json"
    known = json.loads(path.read_text()) if path.exists() else []
    for n in ranks:
        for mbit in speeds:
            load = os.getloadavg()[0]
            times = launch(mbit, n, rounds)
            row = {"mbit": mbit, "ranks": n, "rounds": rounds, "load": load}
            row["times"] = compare.ratios(times)
            print(json.dumps(row), flush=True)
            known = [r for r in known if (r["mbit"], r["ranks"]) != (mbit, n)] + [row]
            known.sort(key=lambda r: (r["ranks"], r["mbit"] or 1 << 30))
            path.write_text(json.dumps(known, indent=1) + "\n")
    write(known)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2])
    parser.add_argument("--mbit", nargs="+", type=int, default=[10, 100, 1000, 0])
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.rank:
        work(chosen.rounds)
    else:
        main(chosen.rounds, chosen.ranks, chosen.mbit)
