"""Kills at random instants of a run that saves each step: what is lost by them.

    python benchmarks/crash.py [--kills 200] [--seed 0]

So many on one rank and on two, half of them with saves that are waited for, half with
saves beside the training. After each, the newest checkpoint must be the last that was
reported, or a later one, without a fault in any byte, and a run that goes on from it
must end with the weights of one that was not killed. Ends with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # what is killed is of the tests
from tests import crashing


def killed(folder: Path, world: int, wait: bool, kills: int, seed: int) -> int:
    """Kill so many runs; how many of them lost something."""
    weights = crashing.whole_run(world)
    seconds = crashing.duration(str(folder / "timed"), world, wait)
    counts: Counter[str] = Counter()
    began = time.perf_counter()
    for number, crash in enumerate(crashing.crashes(seed, kills, world, wait)):
        left = crashing.crashed(folder / str(number), crash, seconds)
        said = crashing.faults(left, crash, weights)
        counts["lost"] += bool(said)
        counts["cut"] += left.cut > 0
        counts["none"] += left.step == 0
        counts["alone"] += None in crash.ends
        for text in said:
            print(f"  {crash}: {text}", flush=True)
    print(
        f"{world} ranks, wait={wait}: {kills} kills, {counts['cut']} within a save, "
        f"{counts['none']} before the first, {counts['alone']} of one rank alone, "
        f"{counts['lost']} lost something; {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return counts["lost"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # as the laws' tests do
    lost = 0
    for world in (1, 2):
        for wait in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                lost += killed(place, world, wait, args.kills // 2, args.seed + wait)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
