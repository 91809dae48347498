"""Asking ranks where they stand, at a SIGQUIT or at the end of the time of a run."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from accelx.launch.running import Rank, Run
from accelx.launch.told import names
from accelx.launch.where import main_thread, of_stack

STACKS = 5.0  # seconds that ranks have to write where they are, at most
LOOK = 0.25  # seconds: what has not grown from one look to the next is whole


def ask(run: Run) -> None:
    """Have each rank write its stacks; `answers` reads them when `run.answer` is."""
    for rank in run.alive:
        stack_of(rank)  # what it wrote before is not about now
    for rank in run.alive:
        os.kill(rank.pid, signal.SIGQUIT)  # not reaped yet, so the number is its own
    now = time.monotonic()
    run.answer, run.patience, run.said = now + LOOK, now + STACKS, {}
    run.looked = time.time()


def answered(run: Run) -> bool:
    """Whether all have said where they are, or had the time; else one looks again."""
    now, before = time.monotonic(), run.said
    run.said = {rank.number: os.fstat(rank.stack).st_size for rank in run.alive}
    run.answer = now + LOOK
    return now >= run.patience or (run.said == before and all(before.values()))


def answers(run: Run) -> dict[int, str]:
    """The main thread's stack of each rank; those of all threads go beside the logs."""
    run.answer = None
    texts = {rank.number: stack_of(rank) for rank in run.alive}
    if run.plan.log_dir is not None:
        for number, text in texts.items():
            path = Path(run.plan.log_dir, f"rank-{number}.stack")
            path.write_text(text)
            os.utime(path, (run.looked, run.looked))  # what came later is not in it
    return {number: main_thread(text) for number, text in texts.items()}


def stack_of(rank: Rank) -> str:
    """What a rank has written of its stacks since this was asked last."""
    with os.fdopen(os.dup(rank.stack), "r+b") as file:  # the offset is the rank's too
        file.seek(0)
        text = file.read().decode(errors="replace").rstrip()
        file.seek(0)
        file.truncate()
        return text


def show(run: Run) -> None:
    """Say on the screen where the ranks stand; the run goes on."""
    stacks = answers(run)
    lines = merged(run) or [
        f"rank {number} is at {of_stack(stack) or 'an unknown line'}"
        for number, stack in stacks.items()
    ]
    done = [rank.number for rank in run.ranks if rank.code is not None]
    lines += [f"{names(done)} ended before"] if done else []
    sys.stderr.write("".join(f"accelx.spawn: {line}\n" for line in lines))
    sys.stderr.flush()


def merged(run: Run) -> list[str]:
    """What `accelx.doctor hang` says of the folder of logs, in a few lines."""
    if run.plan.log_dir is None:
        return []
    from accelx.comm_hang import read
    from accelx.doctors import hang

    left = read(Path(run.plan.log_dir))
    if not left:
        return []
    data = hang.merged(left)
    more = f"python -m accelx.doctor hang {run.plan.log_dir}"
    return [*filter(None, (data["verdict"], data["parted"])), f"more: {more}"]
