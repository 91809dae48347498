"""How ranks start inside a test: forked from the test's own process, over gloo."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import os
import selectors
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import attrs

from accelx.env_axes import Axes
from accelx.errors import AccelxError
from accelx.records import Env

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SIZE = 8  # bytes that say how long a report is
GRACE = 2.0  # seconds that the other ranks get after the first failure


class RankError(AccelxError, RuntimeError):
    """A rank of `run` failed, or did not finish in time."""


@attrs.frozen
class _Report:
    """What one rank sends back through its pipe."""

    ok: bool
    value: Any  # the result; of a failed rank, its traceback as text
    time: float  # time.monotonic() at the end, comparable between processes


@attrs.define
class _Rank:
    """A forked rank, while the caller waits for it."""

    rank: int
    pid: int
    pipe: int
    stack: Path  # where a fault in native code writes the Python lines that led there
    sent: bytearray = attrs.field(factory=bytearray)
    status: int = 0  # as waitpid tells it


def run(
    n: int, *, timeout: float = 60.0, axes: Axes | None = None
) -> Callable[[Callable[..., Any]], Callable[..., list[Any]]]:
    """Run a function on `n` forked ranks: `run(2)(fn)(*args)` is every rank's result.

    `fn(env, *args)` gets a connected CPU Env over gloo; `axes` as in `connect`. Ranks
    are forked, so `fn` may be a closure, and have one CPU thread each. Results come
    back by pickle, in rank order. `run(1)` forks too. Raises RankError in the caller
    with the traceback of the first rank that failed, or after `timeout` seconds with
    the ranks that had not finished; all of them are gone then.
    """
    if n < 1:
        raise ValueError(f"run wants at least 1 rank, got {n}; write run(1) or more")

    def launch(fn: Callable[..., Any]) -> Callable[..., list[Any]]:
        def call(*args: Any) -> list[Any]:
            with tempfile.TemporaryDirectory(prefix="accelx-run-") as folder:
                place = Path(folder)
                ranks = [_fork(r, n, place, axes, timeout, fn, args) for r in range(n)]
                return _results(ranks, _collect(ranks, timeout), timeout)

        return call

    return launch


def _fork(
    rank: int,
    world: int,
    folder: Path,
    axes: Axes | None,
    timeout: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> _Rank:
    sys.stdout.flush()  # or the child would print the caller's buffer again
    sys.stderr.flush()
    read, write = os.pipe()
    stack = folder / f"rank-{rank}.stack"
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _die_with(parent)
        faulthandler.enable(stack.open("w"))  # which keeps the file open
        url = f"file://{folder}/store"
        env = Env(rank, world, rank, world, launcher="testing", rendezvous=url)
        _child(env, axes, timeout, fn, args, write)
    os.close(write)
    return _Rank(rank, pid, read, stack)


def _die_with(parent: int) -> None:
    """Let the kernel kill this rank when the process that forked it goes away."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it went before the call above
            os._exit(1)


def _child(
    env: Env,
    axes: Axes | None,
    timeout: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    pipe: int,
) -> NoReturn:
    code = 1
    try:
        report = _attempt(env, axes, timeout, fn, args)
        sys.stdout.flush()  # before the report, after which this rank may be killed
        sys.stderr.flush()
        with os.fdopen(pipe, "wb") as out:
            out.write(len(report).to_bytes(SIZE, "little") + report)
        code = 0
    finally:
        os._exit(code)  # the caller's exit handlers are not this rank's to run


def _attempt(
    env: Env,
    axes: Axes | None,
    timeout: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> bytes:
    import torch

    from accelx.env import close, connect

    try:
        torch.set_num_threads(1)
        env = connect(env, axes=axes, device="cpu", timeout=timeout)
        value = fn(env, *args)
        _join_threads()
        report = _dumped(_Report(ok=True, value=value, time=time.monotonic()))
        close(env)
        return report
    except BaseException:  # the process that waits raises it
        text = traceback.format_exc()
        return _dumped(_Report(ok=False, value=text, time=time.monotonic()))


def _join_threads() -> None:
    """Wait for what runs beside, such as a save, as a process does when it ends."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()


def _collect(ranks: list[_Rank], timeout: float) -> dict[int, _Report | None]:
    """Every report that came in time, by rank; None where a rank died without one."""
    reports: dict[int, _Report | None] = {}
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as waiting:
        for rank in ranks:
            waiting.register(rank.pipe, selectors.EVENT_READ, rank)
        try:
            while waiting.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in waiting.select(left):
                    rank = key.data
                    if not _read(rank):
                        continue
                    waiting.unregister(key.fd)
                    reports[rank.rank] = done = _report(rank)
                    if done is None or not done.ok:
                        deadline = min(deadline, time.monotonic() + GRACE)
        finally:
            _reap(ranks)
    return reports


def _read(rank: _Rank) -> bool:
    """Take what has come; whether the report is whole, or never will be.

    The end of the pipe is not waited for: a rank's own children may hold it open.
    """
    part = os.read(rank.pipe, 1 << 20)
    rank.sent += part
    return not part or len(rank.sent) - SIZE >= _size(rank) >= 0


def _size(rank: _Rank) -> int:
    head = rank.sent[:SIZE]
    return int.from_bytes(head, "little") if len(head) == SIZE else -1


def _report(rank: _Rank) -> _Report | None:
    body = memoryview(rank.sent)[SIZE:]
    if len(body) != _size(rank):
        return None
    import torch

    return torch.load(io.BytesIO(body), weights_only=False)  # from our own fork


def _dumped(report: _Report) -> bytes:
    """By torch's pickle: plain pickle cannot read a float8 tensor back (torch 2.13)."""
    import torch

    out = io.BytesIO()
    torch.save(report, out)
    return out.getvalue()


def _reap(ranks: list[_Rank]) -> None:
    """Kill the ranks that are still there, and take every exit status."""
    for rank in ranks:
        os.close(rank.pipe)
        with contextlib.suppress(
            ChildProcessError
        ):  # a handler of the caller was faster
            pid, rank.status = os.waitpid(rank.pid, os.WNOHANG)
            if pid == 0:
                os.kill(rank.pid, signal.SIGKILL)
                _, rank.status = os.waitpid(rank.pid, 0)  # its own if it was leaving


def _results(
    ranks: list[_Rank], reports: dict[int, _Report | None], timeout: float
) -> list[Any]:
    failed = {r: report for r, report in reports.items() if report and not report.ok}
    first = min(failed, key=lambda r: failed[r].time, default=-1)
    told = (
        f"rank {first} of {len(ranks)} failed:\n{failed[first].value}" if failed else ""
    )
    died = [rank for rank in ranks if reports.get(rank.rank, rank) is None]
    if died:  # the cause: what the others raise is that it is gone
        raise RankError("\n".join(filter(None, [*map(_ending, died), told])))
    if failed:
        raise RankError(told)
    hung = [rank.rank for rank in ranks if rank.rank not in reports]
    if hung:
        raise RankError(
            f"ranks {hung} of {len(ranks)} had not finished after {timeout:g} s; "
            "look for a collective that not every rank reaches, or raise `timeout`"
        )
    return [report.value for _, report in sorted(reports.items()) if report]


def _ending(rank: _Rank) -> str:
    code = os.waitstatus_to_exitcode(rank.status)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else ""
    how = f"rank {rank.rank} {how or f'exited with code {code}'}"
    stack = rank.stack.read_text() if rank.stack.exists() else ""
    return f"{how}:\n{stack}" if stack else f"{how}, without a traceback"
