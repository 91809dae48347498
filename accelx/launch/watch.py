"""When ranks are told to end, when they are killed, and what the exit code is."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import sys
import time
from collections.abc import Generator

import attrs

from accelx.launch.failure import Failure, died, first, loads, told
from accelx.launch.output import Stream, finish, pump, write_log
from accelx.launch.plan import Plan

SETTLE = 2.0  # seconds that the others have to end by themselves after a failure
REPEAT = 1.0  # a signal that comes again within this many seconds is the same one
STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
PASSED_ON = {signal.SIGUSR1, signal.SIGUSR2}  # the rank decides what they mean
WATCHED = STOPPING | PASSED_ON | {signal.SIGCHLD}


@attrs.define(eq=False)
class Rank:
    """A process that was started, and what is known of it."""

    number: int
    pid: int
    report: int  # file descriptor to read
    stack: int | None
    heard: bytes = b""
    code: int | None = None  # None while it runs
    failure: Failure | None = None
    stopped: bool = False  # the launcher told it to end


@attrs.define(eq=False)
class Run:
    """The whole run as it stands."""

    plan: Plan
    ranks: list[Rank]
    streams: list[Stream]
    asked: signal.Signals | None = None  # the user's wish to stop
    asked_at: float = 0.0
    stage: str = "running"  # settling, ending, killing
    deadline: float | None = None
    stopped_at: float = float("inf")  # what fails later fails because it was stopped
    unkind: list[int] = attrs.field(factory=list)  # ranks that had to be killed

    @property
    def alive(self) -> list[Rank]:
        """The ranks that have not ended."""
        return [rank for rank in self.ranks if rank.code is None]


@attrs.frozen
class End:
    """How the run ended."""

    code: int
    failure: Failure | None = None
    text: str = ""  # what the screen shows last


def watch(run: Run) -> End:
    """Wait for every rank. Forwards signals once, stops all when one fails."""
    with _signals() as wakeup, selectors.DefaultSelector() as selector:
        selector.register(wakeup, selectors.EVENT_READ, None)
        for item in (*run.ranks, *run.streams):
            source = item.report if isinstance(item, Rank) else item.source
            os.set_blocking(source, False)
            selector.register(source, selectors.EVENT_READ, item)
        while run.alive:
            wait = None if run.deadline is None else run.deadline - time.monotonic()
            for key, _ in selector.select(wait):
                _heard(run, key, selector)
            _reap(run)
            _advance(run)
        for stream in run.streams:
            finish(stream)
    return _end(run)


def hold_signals() -> None:
    """Keep signals waiting, so that none comes between a fork and `watch`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)


def let_signals() -> None:
    """Take what has waited, and from now on what comes."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)


@contextlib.contextmanager
def _signals() -> Generator[int]:
    """A file descriptor that gives the number of each signal as a byte."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in WATCHED:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup keeps its meaning
            signal.signal(number, lambda *_: None)
    let_signals()
    try:
        yield read
    finally:
        signal.set_wakeup_fd(-1)
        os.close(read)
        os.close(write)


def _heard(
    run: Run, key: selectors.SelectorKey, selector: selectors.BaseSelector
) -> None:
    if key.data is None:
        for number in os.read(key.fd, 512):
            _signalled(run, signal.Signals(number))
    elif isinstance(key.data, Rank):
        if not _listen(key.data):
            selector.unregister(key.fd)
    elif not pump(key.data):
        selector.unregister(key.fd)


def _signalled(run: Run, number: signal.Signals) -> None:
    if number in PASSED_ON:
        _send(run.alive, number)
    elif number not in STOPPING:
        return  # SIGCHLD: each round looks for who has ended
    elif run.asked is None and run.stage in ("running", "settling"):
        run.asked, run.asked_at = number, time.monotonic()
        run.stage, run.deadline = "ending", run.asked_at + run.plan.grace
        _announce(run, number)
        _stop(run, number)
    elif time.monotonic() - run.asked_at > REPEAT:
        run.deadline = 0.0  # asked twice: now


def _listen(rank: Rank) -> bool:
    """Take what the rank has reported; False when nothing more can come."""
    try:
        data = os.read(rank.report, 1 << 16)
    except BlockingIOError:
        return True
    rank.heard += data
    if rank.failure is None and b"\n" in rank.heard:
        rank.failure = loads(rank.heard.partition(b"\n")[0])
    return data != b""


def _reap(run: Run) -> None:
    for rank in run.alive:
        left = os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if left is None:
            continue
        while rank.failure is None and b"\n" not in rank.heard and _more(rank):
            pass
        if left.si_code != os.CLD_EXITED or left.si_status or rank.stopped:
            # Before its number is given free: whom it started must not outlive it.
            _send_group(rank, signal.SIGKILL)
        _, status = os.waitpid(rank.pid, 0)
        _ended(run, rank, os.waitstatus_to_exitcode(status))


def _more(rank: Rank) -> bool:
    before = len(rank.heard)
    return _listen(rank) and len(rank.heard) > before


def _ended(run: Run, rank: Rank, status: int) -> None:
    silent = died(rank.number, status, _stack(rank))
    by_request = rank.stopped and silent is not None and silent.kind == "signal"
    rank.code = silent.code if silent else 0
    if rank.failure is None and not by_request:
        rank.failure = silent
    stream = next((s for s in run.streams if s.rank == rank.number), None)
    if stream is not None and rank.failure is not None:
        words = rank.failure.text or rank.failure.summary
        write_log(stream, f"{words}\n".encode())
    if rank.failure is not None and run.asked is not None and not _grave(rank.failure):
        rank.failure = None  # ended as it was asked to


def _grave(failure: Failure) -> bool:
    """Whether it is a failure even after the ranks were asked to end."""
    return failure.kind in ("exception", "signal") and not failure.follows


def _stack(rank: Rank) -> str:
    if rank.stack is None:
        return ""
    with os.fdopen(os.dup(rank.stack), "rb") as file:
        file.seek(0)
        return file.read().decode(errors="replace").rstrip()


def _advance(run: Run) -> None:
    now = time.monotonic()
    if run.stage == "running" and any(rank.failure for rank in run.ranks):
        run.stage, run.deadline = "settling", now + SETTLE
    if run.deadline is None or now < run.deadline:
        return
    if run.stage == "settling":
        run.stage, run.deadline = "ending", now + run.plan.grace
        _stop(run, signal.SIGTERM)
    else:
        run.stage, run.deadline = "killing", None
        run.unkind = [rank.number for rank in run.alive]
        for rank in run.alive:
            rank.stopped = True
            _send_group(rank, signal.SIGKILL)


def _stop(run: Run, number: signal.Signals) -> None:
    run.stopped_at = time.monotonic()
    for rank in run.alive:
        rank.stopped = True
    _send(run.alive, number)


def _send(ranks: list[Rank], number: signal.Signals) -> None:
    for rank in ranks:  # not reaped yet, so the number is still theirs
        os.kill(rank.pid, number)


def _send_group(rank: Rank, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.pid, number)


def _end(run: Run) -> End:
    failures = [rank.failure for rank in run.ranks if rank.failure is not None]
    notes = [f"{_names(run.unkind)} did not end in time and had to be killed"]
    notes *= bool(run.unkind)
    if failures:
        before = [failure for failure in failures if failure.time <= run.stopped_at]
        root = first(before or failures)
        others = sum(bool(r.code) for r in run.ranks if r.number != root.rank)
        text = told(root, run.plan.host, others)
        notes += _early(run, root)
        return End(root.code, root, "\n".join([text, *notes]))
    codes = [rank.code for rank in run.ranks if rank.code]
    if run.asked is None or not codes:
        return End(0, None, "\n".join(notes))
    own = [code for code in codes if code < 128]  # a rank's own choice, by sys.exit
    return End(own[0] if own else 128 + run.asked, None, "\n".join(notes))


def _early(run: Run, root: Failure) -> list[str]:
    done = [rank.number for rank in run.ranks if rank.code == 0]
    if not root.follows or not done:
        return []
    return [f"{_names(done)} had ended before, with exit code 0"]


def _names(numbers: list[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _announce(run: Run, number: signal.Signals) -> None:
    if run.plan.asked.kind == "call":
        return  # the program that called knows
    again = "; Ctrl-C again kills them now" * (number == signal.SIGINT)
    wait = f"waiting up to {run.plan.grace:g} s for the ranks"
    sys.stderr.write(f"accelx.spawn: {number.name}: {wait}{again}\n")
    sys.stderr.flush()
