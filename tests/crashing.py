"""Runs that are killed at any instant, and what must be true of what they leave."""

import os
import random
import signal
import time
from pathlib import Path

import attrs
import pytest
import torch

import accelx as ax
from accelx import testing
from accelx.saves.commit import found, open_manifest
from accelx.saves.verify import problems
from accelx.testing import RankError
from tests import saving

STEPS = 4
KEEP = 3
KINDS = {1: "ddp", 2: "fsdp2"}
APART = 0.2  # steps between the ends of ranks that are killed together, at most


@attrs.frozen
class Crash:
    """One run and how it ends."""

    world: int
    wait: bool  # whether saves are waited for
    ends: tuple[float | None, ...]  # of each rank, in steps; None lets it live


@attrs.frozen
class Left:
    """What a killed run left, and what became of it."""

    reported: int  # the last step that it knew to be over
    step: int  # of the newest checkpoint, 0 for none
    cut: int  # folders without a sound commit: a save or a removal was cut off
    problems: tuple[str, ...]  # of all that are committed
    kept: int  # how many those are
    weights: dict  # at the end of a run that went on from there


def train(env, url, wait, after=lambda state: None):
    """A run that goes on from what is there: its state after STEPS steps in all."""
    save = ax.save_state(env, url, every=1, keep=KEEP, wait=wait)
    resume = ax.load_state(env, url, missing="fresh")
    tx = saving.chain(env, KINDS[env.world], save, resume)
    state = ax.init(tx, saving.made(), saving.grouped)
    step = ax.step(tx, saving.masked)
    after(state)
    for batch in ax.feed(tx, saving.loader(), start=state, stop=STEPS):
        state, _ = step(state, batch)
        after(state)
    state.slots["save_state"].background.join()
    return state


def doom(delay):
    """Let `kill -9` come for this process after `delay` seconds."""
    me = os.pidfd_open(os.getpid())  # no number that another process could get
    if os.fork() == 0:
        time.sleep(delay)
        signal.pidfd_send_signal(me, signal.SIGKILL)
        os._exit(0)
    os.close(me)


def die(env, url, crash, seconds, log):
    """Train until the kill comes; each step that is over is noted.

    A step takes `seconds`, or what the one before took: other programs come and go.
    """
    end, began = crash.ends[env.rank], time.perf_counter()

    def after(state):
        nonlocal seconds, began
        now = time.perf_counter()
        seconds, began = now - began if state.step else seconds, now
        if env.main:
            os.write(log, b"%d\n" % state.step)
        if end is not None and state.step == int(end):
            doom((end - state.step) * seconds)

    train(env, url, crash.wait, after)
    time.sleep(60)  # the kill is late


def killed(folder: Path, crash: Crash, seconds: float) -> tuple[str, int]:
    """Kill a run: where it saved, and the last step that it knew to be over."""
    folder.mkdir(parents=True)
    url = str(folder / "run")
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    with pytest.raises(RankError, match="SIGKILL"):
        testing.run(crash.world)(die)(url, crash, seconds, log)
    os.close(log)
    return url, int((folder / "log").read_text().split()[-1])


def crashed(folder: Path, crash: Crash, seconds: float) -> Left:
    """Kill a run, look at what it left, and go on from there."""
    url, reported = killed(folder, crash, seconds)
    return look(url, reported, lambda: resumed([url], crash.world, crash.wait)[0])


def resumed(urls, world, wait):
    """The weights of runs that go on, one after the other in the same ranks."""

    def rank(env):
        return [saving.weights(train(env, url, wait)) for url in urls]

    return testing.run(world)(rank)()[0]


def look(url, reported, resume) -> Left:
    """What lies under `url`, before a run goes on from there."""
    newest, every = ax.latest(url), found(url)
    whole = [one for one in every if one.commit is not None]
    faults = [text for one in whole for text in problems(*open_manifest(one))]
    return Left(
        reported,
        0 if newest is None else newest.step,
        len(every) - len(whole),
        tuple(faults),
        len(whole),
        resume(),
    )


def whole_run(world):
    """The weights of a run that nobody disturbs and nothing saves."""

    def rank(env):
        tx = saving.chain(env, KINDS[world])
        return saving.weights(saving.train(tx, STEPS)[0])

    return testing.run(world)(rank)()[0]


def duration(folder, world, wait):
    """Seconds that a step takes in a run that nobody disturbs, with its save."""

    def rank(env):
        began = []
        train(env, folder, wait, lambda state: began.append(time.perf_counter()))
        return (time.perf_counter() - began[0]) / STEPS

    return max(testing.run(world)(rank)())


def crashes(seed, count, world, wait):
    """So many ends, spread over a run.

    Ranks end together, up to APART, as those of a job do; each ninth time one of two is
    killed alone, and the others find out.
    """
    draw = random.Random(seed)
    for number in range(count):
        end = draw.uniform(0, STEPS - APART)
        ends = [end + draw.uniform(0, APART) for _ in range(world)]
        if world > 1 and number % 9 == 8:
            ends[draw.randrange(world)] = None
        yield Crash(world, wait, tuple(ends))


def faults(left: Left, crash: Crash, weights) -> list[str]:
    """What of the promises was broken; empty for none."""
    said = list(left.problems)
    known = left.reported if crash.wait else left.reported - 1  # one is under way
    if left.step < known:
        said.append(f"step {known} was reported saved, and {left.step} is the newest")
    if left.kept > KEEP + 1:
        said.append(f"{left.kept} checkpoints are kept of {KEEP}, and the newest")
    if weights.keys() != left.weights.keys():
        said.append("the run that went on has other weights")
    said += [
        f"{name} is another than in a run that was not killed"
        for name, tensor in weights.items()
        if not torch.equal(tensor, left.weights.get(name, torch.empty(0)))
    ]
    return said
