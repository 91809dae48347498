"""Whether starting, meeting, ending and starting again ever goes wrong.

`python benchmarks/soak_launch.py` takes about an hour on two cores: 500 starts of two
ranks, 8 jobs of two ranks at once 20 times, and 100 kills (-9) of a random rank at a
random time, with restarts, on one node and on two. `--count 0.02` does a fiftieth of
each, `--only kills` one of the three. Exit code 1 if a start failed or said anything, a
disturbed job ended with other weights than a quiet one, or a process outlived its job.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "tests/door/scripts/elastic.py"
MEET = ROOT / "tests/door/scripts/meet.py"
STEPS = 150  # of a job that is disturbed; each saves
LIMIT = 600  # seconds that anything may take


def command(*words):
    """The launcher's command line."""
    return [sys.executable, "-m", "accelx.spawn", *map(str, words)]


def environment():
    """This one, and accelx importable."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def launch(*words):
    """Start, wait, and what there is to complain of; empty if all is well."""
    done = subprocess.run(
        command(*words),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    return "" if (done.returncode, done.stderr) == (0, "") else done.stderr or "code"


def children(pid):
    """The processes that `pid` has started, and theirs."""
    found = {pid}
    pairs = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            text = path.read_text()
            pairs.append(
                (int(text.split()[0]), int(text.rpartition(")")[2].split()[1]))
            )
    for _ in pairs:
        found |= {child for child, parent in pairs if parent in found}
    return found - {pid}


def starts(count, at_once=1):
    """So many starts of two ranks; how many went wrong, and seconds each."""
    begun = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        said = list(pool.map(lambda _: launch("-n", 2, MEET), range(count)))
    for text in filter(None, said):
        sys.stderr.write(f"{text}\n")
    return sum(map(bool, said)), (time.monotonic() - begun) / count


def free_port():
    """A port that was free just now."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        return door.getsockname()[1]


def disturbed(folder, draw, nodes, kills):
    """One job whose ranks are killed until it has ended: kills, and what went wrong."""
    words = ["-n", 2 // nodes, "--restarts", 10_000]
    if nodes > 1:
        words += ["--nodes", nodes, "--rendezvous", f"127.0.0.1:{free_port()}"]
    with (folder / "said").open("w") as said:
        train, quiet = command(*words, TRAIN, folder, STEPS), {"stderr": said}
        jobs = [
            subprocess.Popen(train, env=environment(), **quiet) for _ in range(nodes)
        ]
    done, seen, limit = 0, set(), time.monotonic() + LIMIT
    while any(job.poll() is None for job in jobs):
        if time.monotonic() > limit:
            for job in jobs:
                job.kill()
            return done, "it did not end"
        time.sleep(draw.uniform(0.05, 3))
        ours = set().union(*(children(job.pid) for job in jobs))
        seen |= ours
        if done < kills:
            done += kill(folder, draw, ours)
    codes = [job.wait() for job in jobs]
    left = [pid for pid in seen if Path(f"/proc/{pid}").exists()]
    return done, f"codes {codes}, left {left}" if any(codes) or left else ""


def kill(folder, draw, ours):
    """Kill a random rank, if one runs that has written its number."""
    paths = sorted(folder.glob("pid-*"))
    pid = int((draw.choice(paths).read_text() if paths else "") or 0)
    if pid not in ours:
        return 0
    os.kill(pid, signal.SIGKILL)
    return 1


def soak_kills(count, draw):
    """Jobs until so many ranks were killed; kills, jobs and those that went wrong."""
    kills = jobs = wrong = 0
    with tempfile.TemporaryDirectory() as name:
        quiet = Path(name, "quiet")
        quiet.mkdir()
        assert not launch("-n", 2, TRAIN, quiet, STEPS)
        wanted = torch.load(quiet / "weights.pt")
        while kills < count:
            folder = Path(name, str(jobs))
            folder.mkdir()
            nodes = 1 + jobs % 2
            done, said = disturbed(folder, draw, nodes, min(10, count - kills))
            if not said:
                made = torch.load(folder / "weights.pt")
                equal = all(torch.equal(made[k], wanted[k]) for k in wanted)
                said = "" if equal else "other weights"
            sys.stderr.write((folder / "said").read_text() if said else "")
            kills, jobs, wrong = kills + done, jobs + 1, wrong + bool(said)
            print(
                f"job {jobs}: {nodes} node(s), {done} kills; {said or 'as quiet'}",
                flush=True,
            )
    return kills, jobs, wrong


def main():
    """All three, and one line each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=float, default=1.0, help="how much of it")
    parser.add_argument(
        "--seed", type=int, default=0, help="of ranks and times of kills"
    )
    parts = ("starts", "at-once", "kills")
    parser.add_argument("--only", choices=parts, help="one of the three")
    given = parser.parse_args()
    one, many, kills = (max(1, round(n * given.count)) for n in (500, 20, 100))
    bad = 0
    if given.only in (None, "starts"):
        failed, each = starts(one)
        print(f"{one} starts of 2 ranks: {failed} went wrong; {each:.2f} s each")
        bad += failed
    if given.only in (None, "at-once"):
        failed, each = starts(8 * many, at_once=8)
        print(f"{8 * many} starts, 8 at once: {failed} went wrong; {each:.2f} s each")
        bad += failed
    if given.only in (None, "kills"):
        done, jobs, failed = soak_kills(kills, random.Random(given.seed))
        print(f"{done} kills in {jobs} jobs of 2 ranks: {failed} jobs went wrong")
        bad += failed
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
