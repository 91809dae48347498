"""How much memory a save and a load take beside the state itself.

    python benchmarks/save_memory.py [--mib 840]

The kernel's high-water mark of the process, set back before each way, less what the
process held then. Local disk and an S3 server (moto) in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import compare
import save_s3
import torch
from save import locals_of, made, tensors

import accelx as ax
from accelx.storage_s3 import MEMORY
from accelx.testing import run

torch.set_num_threads(1)


def held(which):
    """MiB of this process: VmRSS now, or VmHWM since it was set back."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{which}:\s+(\d+) kB", text)[1]) / 1024


def beside(do):
    """MiB that `do` takes at most beyond what was held before it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    do()
    return held("VmHWM") - before


def measured(env, mib, folder):
    """way -> MiB."""
    state = made(env, mib)
    own = locals_of(tensors(state))
    box = {"state": state}
    largest = max(t.numel() * t.element_size() for t in own.values()) / 2**20

    def save(url):
        return lambda: ax.save_state(env, url)(box["state"])

    def load(url):
        def do():
            box["state"] = ax.load_state(env, url)(box["state"])

        return do

    small = made(env, 30)  # clients, pools and modules are there from here on
    for url in (f"{folder}/small", "s3://bucket/small"):
        ax.load_state(env, ax.save_state(env, url)(small))(ax.fork(small))
    found = {
        "the state": mib,
        "its largest slice": largest,
        "one upload part x uploads at once": MEMORY / 2**20,
    }
    for name, url in (("disk", f"{folder}/ax"), ("S3", "s3://bucket/ax")):
        found[f"save to {name}"] = beside(save(url))
        found[f"load from {name}"] = beside(load(url))
    found["torch.save"] = beside(lambda: torch.save(own, f"{folder}/pt"))
    found["torch.load"] = beside(lambda: torch.load(f"{folder}/pt", weights_only=True))
    return found


def main():
    """Measure, and write the figures and their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=840)
    args = parser.parse_args()
    server = subprocess.Popen(
        [sys.executable, "-c", save_s3.SERVE], stdout=subprocess.PIPE, text=True
    )
    try:
        save_s3.meet_server(server)
        with tempfile.TemporaryDirectory(dir=".") as folder:
            where = os.path.realpath(folder)
            found = run(1, timeout=3000)(measured)(args.mib, where)[0]
    finally:
        server.kill()
    title = f"Memory beside a state of {args.mib} MiB"
    lines = [f"### {title}", "", f"{date.today()}, one rank, one run.", ""]
    lines += ["| | MiB |", "|---|---|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in found.items()]
    compare.DOCS.mkdir(parents=True, exist_ok=True)
    (compare.DOCS / "save_memory.md").write_text("\n".join(lines) + "\n")
    record = {"title": title, "when": str(date.today()), "rows": found}
    text = json.dumps(record, indent=1) + "\n"
    (compare.HERE / "results" / "save_memory.json").write_text(text)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
