"""When ranks are told to end, when they are killed, and what the exit code is."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import sys
import time
from collections.abc import Generator

from accelx.launch import kernel
from accelx.launch.failure import Failure, died, late, loads
from accelx.launch.output import finish, pump, write_log
from accelx.launch.reading import Seen, read, wants_count
from accelx.launch.running import End, Rank, Run
from accelx.launch.verdict import verdict

SETTLE = 2.0  # seconds that the others have to end by themselves after a failure
STACKS = 0.5  # seconds that late ranks have to write where they are
REPEAT = 1.0  # a signal that comes again within this many seconds is the same one
STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
PASSED_ON = {signal.SIGUSR1, signal.SIGUSR2}  # the rank decides what they mean
WATCHED = STOPPING | PASSED_ON | {signal.SIGCHLD}


def watch(run: Run) -> End:
    """Wait for every rank. Forwards signals once, stops all when one fails."""
    with _signals() as wakeup, selectors.DefaultSelector() as selector:
        selector.register(wakeup, selectors.EVENT_READ, None)
        for item in (*run.ranks, *run.streams):
            source = item.report if isinstance(item, Rank) else item.source
            os.set_blocking(source, False)
            selector.register(source, selectors.EVENT_READ, item)
        while run.alive:
            for key, _ in selector.select(_wait(run)):
                _heard(run, key, selector)
            _reap(run)
            _advance(run)
        for stream in run.streams:
            finish(stream)
    return verdict(run)


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


def _wait(run: Run) -> float | None:
    """Seconds until something is to be done; None where only ranks will tell."""
    limit = run.limit if run.stage == "running" else None
    times = [at for at in (run.deadline, limit) if at is not None]
    return max(0.0, min(times) - time.monotonic()) if times else None


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
        if run.plan.system.peeks:
            left = os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if left is None:
                continue
            # Before its number is given free: whom it started must not outlive it.
            _sweep(rank, left.si_code == os.CLD_EXITED and not left.si_status)
        pid, status, usage = os.wait4(rank.pid, os.WNOHANG)
        if not pid:
            continue
        if not run.plan.system.peeks:
            _sweep(rank, status == 0)
        peak = usage.ru_maxrss * run.plan.system.rss_unit
        _ended(run, rank, os.waitstatus_to_exitcode(status), peak)


def _sweep(rank: Rank, well: bool) -> None:
    """Hear what the rank has still said, and end what it started if it ended badly."""
    while rank.failure is None and b"\n" not in rank.heard and _more(rank):
        pass
    if not well or rank.stopped:
        _send_group(rank, signal.SIGKILL)


def _more(rank: Rank) -> bool:
    before = len(rank.heard)
    return _listen(rank) and len(rank.heard) > before


def _ended(run: Run, rank: Rank, status: int, peak: int) -> None:
    silent = died(rank.number, status, _stack(rank))
    by_request = rank.stopped and silent is not None and silent.kind == "signal"
    rank.code = silent.code if silent else 0
    if rank.failure is None and not by_request:
        rank.failure = silent
    if rank.failure is not None:
        seen = Seen(run.plan.host, rank.pid, peak, _oom(run, rank.failure))
        rank.failure = read(rank.failure, seen)
    stream = next((s for s in run.streams if s.rank == rank.number), None)
    if stream is not None and rank.failure is not None:
        words = rank.failure.text or rank.failure.headline
        write_log(stream, f"{words}\n".encode())
    if rank.failure is not None and run.asked is not None and not _grave(rank.failure):
        rank.failure = None  # ended as it was asked to


def _oom(run: Run, failure: Failure) -> bool | None:
    """Whether the kernel has ended a process for want of memory: each counts once."""
    if not wants_count(failure) or run.oom_kills is None:
        return None
    kills = kernel.oom_kills()
    if kills is None or kills <= run.oom_kills:
        return None if kills is None else False
    run.oom_kills += 1
    return True


def _grave(failure: Failure) -> bool:
    """Whether it is a failure even after the ranks were asked to end."""
    return failure.kind in ("exception", "signal") and not failure.follows


def _stack(rank: Rank) -> str:
    with os.fdopen(os.dup(rank.stack), "r+b") as file:  # the offset is the rank's too
        file.seek(0)
        text = file.read().decode(errors="replace").rstrip()
        file.seek(0)
        file.truncate()
        return text


def _advance(run: Run) -> None:
    now = time.monotonic()
    if run.stage == "running" and any(rank.failure for rank in run.ranks):
        run.stage, run.deadline = "settling", now + SETTLE
    if run.stage == "running" and run.limit is not None and now >= run.limit:
        run.stage, run.deadline = "asking", now + STACKS
        for rank in run.alive:
            _stack(rank)  # what it wrote before is not about now
        _send(run.alive, signal.SIGQUIT)
    if run.deadline is None or now < run.deadline:
        return
    if run.stage == "asking":
        for rank in run.alive:
            rank.failure = late(rank.number, run.plan.timeout or 0.0, _stack(rank))
    if run.stage in ("settling", "asking"):
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


def _announce(run: Run, number: signal.Signals) -> None:
    if run.plan.asked.kind == "call":
        return  # the program that called knows
    again = "; Ctrl-C again kills them now" * (number == signal.SIGINT)
    wait = f"waiting up to {run.plan.grace:g} s for the ranks"
    sys.stderr.write(f"accelx.spawn: {number.name}: {wait}{again}\n")
    sys.stderr.flush()
