"""Ranks forked by a test bring back results, failures and hangs."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from accelx.comm import sum_scalars
from accelx.testing import RankError, run

pytestmark = pytest.mark.multi


def test_results_come_back_in_rank_order():
    """A closure runs on each rank with its Env, and ranks really meet."""
    ten = 10

    def fn(env, more):
        total = torch.tensor([env.rank + 1.0])
        sum_scalars(env, total)
        return env.rank, env.world, env.device, env.backend, total.item(), ten + more

    assert run(3)(fn)(5) == [(r, 3, "cpu", "gloo", 6.0, 15) for r in range(3)]
    assert run(1)(lambda env: (env.rank, env.world, env.backend))() == [(0, 1, None)]


def test_one_rank_is_a_process_of_its_own():
    """What a rank does to its process stays there."""
    caller = os.getpid()
    [(pid, threads)] = run(1)(lambda env: (os.getpid(), torch.get_num_threads()))()
    assert pid != caller == os.getpid()
    assert threads == 1


def test_results_larger_than_a_pipe_come_back_whole():
    """Eight ranks' megabytes do not wait for one another."""
    parts = run(3)(lambda env: torch.full((1 << 19,), float(env.rank)))()
    assert [part.sum().item() for part in parts] == [r * 2.0**19 for r in range(3)]


def test_axes_lay_the_ranks_out():
    """The axes given are those of the Env."""
    [env, *_] = run(4, axes="replicate=2,shard=-1")(lambda env: env)()
    assert [(a.name, a.size) for a in env.axes] == [("replicate", 2), ("shard", 2)]


def test_the_first_failure_is_the_one_told():
    """Ranks that wait for a failed one are not what is reported."""

    def fn(env):
        if env.rank == 1:
            raise KeyError("the cause")
        sum_scalars(env, torch.ones(1))

    with pytest.raises(RankError, match=r"rank 1 of 3 failed:[\s\S]*the cause"):
        run(3)(fn)()


def test_a_rank_that_dies_is_named_with_how():
    """A killed rank leaves no traceback, and is the cause all the same."""

    def fn(env):
        if env.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        sum_scalars(env, torch.ones(1))

    with pytest.raises(RankError, match="rank 1 was killed by SIGKILL"):
        run(2)(fn)()
    with pytest.raises(RankError, match="rank 0 exited with code 7"):
        run(1)(lambda env: os._exit(7))()


def test_a_fault_in_native_code_shows_the_lines_that_led_there():
    """What faulthandler writes comes back with the rank, as a traceback does."""

    def fn(env):
        return ctypes.string_at(0) if env.rank == 1 else None

    with pytest.raises(RankError, match=r"1 was killed by SIGSEGV:\nFatal") as told:
        run(2)(fn)()
    assert re.search(r'test_testing\.py", line \d+ in fn\n', str(told.value))


def test_a_hang_ends_at_the_timeout_with_the_ranks_named():
    """The ranks that finished are not among those named, and none is left behind."""

    def fn(env):
        return time.sleep(100) if env.rank == 1 else os.getpid()

    before = children()
    for limit in (2, 8, 32):
        with pytest.raises(RankError, match="had not finished") as told:
            run(2, timeout=limit)(fn)()
        assert children() == before
        if "[0" not in str(told.value):  # a busy machine lets neither finish at first
            break
    assert f"ranks [1] of 2 had not finished after {limit} s" in str(told.value)


def children():
    """The processes that this one has started, such as trackers of earlier tests."""
    folder = Path(f"/proc/{os.getpid()}/task")
    every = [task / "children" for task in folder.iterdir()]
    return {pid for path in every for pid in path.read_text().split()}


def test_exits_and_results_without_pickle_are_failures():
    """`sys.exit` and an unpicklable result come back as tracebacks."""
    with pytest.raises(RankError, match="SystemExit: 3"):
        run(1)(lambda env: sys.exit(3))()
    with pytest.raises(RankError, match="pickle"):
        run(1)(lambda env: lambda: 1)()


def test_a_child_of_a_rank_does_not_hold_the_result_back():
    """A grandchild that outlives its rank holds the pipe, and nobody waits for it."""

    def fn(env):
        child = os.fork()
        if child == 0:
            time.sleep(100)
            os._exit(0)
        return child

    [child] = run(1, timeout=60)(fn)()  # a RankError if the pipe's end were waited for
    os.kill(child, signal.SIGKILL)


def test_no_ranks_are_refused():
    """The message says the least that makes sense."""
    with pytest.raises(ValueError, match="at least 1 rank, got 0"):
        run(0)
