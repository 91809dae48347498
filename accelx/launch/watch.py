"""When ranks are told to end, when they are killed, and what the exit code is."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import sys
import time
from collections.abc import Generator
from pathlib import Path

from accelx.comm_hang import forget
from accelx.launch import hang, kernel
from accelx.launch.failure import Failure, died, late, loads
from accelx.launch.output import finish, pump, write_log
from accelx.launch.reading import Seen, read, wants_count
from accelx.launch.running import End, Rank, Run
from accelx.launch.verdict import verdict
from accelx.launch.wire import Wire, hear

SETTLE = 2.0  # seconds that the others have to end by themselves after a failure
REPEAT = 1.0  # a signal that comes again within this many seconds is the same one
STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
PASSED_ON = {signal.SIGUSR1, signal.SIGUSR2}  # the rank decides what they mean
WATCHED = STOPPING | PASSED_ON | {signal.SIGCHLD, signal.SIGQUIT}


def watch(run: Run) -> End:
    """Wait for every rank. Forwards signals once, stops all when one fails."""
    with signals() as wakeup, selectors.DefaultSelector() as selector:
        selector.register(wakeup, selectors.EVENT_READ, None)
        for item in (*run.ranks, *run.streams):
            source = item.report if isinstance(item, Rank) else item.source
            os.set_blocking(source, False)
            selector.register(source, selectors.EVENT_READ, item)
        if run.agent is not None:
            selector.register(run.agent.end, selectors.EVENT_READ, run.agent)
            _recalled(run, run.agent, selector)  # its word may have been read before
        while run.alive:
            for key, _ in selector.select(_wait(run)):
                _heard(run, key, selector)
            _reap(run)
            _advance(run)
        for stream in run.streams:
            finish(stream)
    end = verdict(run)
    if end.code == 0 and run.plan.log_dir is not None:
        for rank in run.ranks:
            forget(Path(run.plan.log_dir), range(rank.number, rank.number + 1))
    return end


def hold_signals() -> None:
    """Keep signals waiting, so that none comes between a fork and `watch`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)


def let_signals() -> None:
    """Take what has waited, and from now on what comes."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)


@contextlib.contextmanager
def signals() -> Generator[int]:
    """A file descriptor that gives the number of each signal as a byte.

    Afterwards signals are held again, and mean what they meant before.
    """
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    before = {number: signal.getsignal(number) for number in WATCHED}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup keeps its meaning
            signal.signal(number, lambda *_: None)
    let_signals()
    try:
        yield read
    finally:
        hold_signals()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(read)
        os.close(write)


def _wait(run: Run) -> float | None:
    """Seconds until something is to be done; None where only ranks will tell."""
    limit = run.limit if run.stage == "running" else None
    times = [at for at in (run.deadline, limit, run.answer) if at is not None]
    return max(0.0, min(times) - time.monotonic()) if times else None


def _heard(
    run: Run, key: selectors.SelectorKey, selector: selectors.BaseSelector
) -> None:
    if key.data is None:
        for number in os.read(key.fd, 512):
            _signalled(run, signal.Signals(number))
    elif isinstance(key.data, Wire):
        _recalled(run, key.data, selector)
    elif isinstance(key.data, Rank):
        if not _listen(key.data):
            selector.unregister(key.fd)
    elif not pump(key.data):
        selector.unregister(key.fd)


def _signalled(run: Run, number: signal.Signals) -> None:
    if number in PASSED_ON:
        run.noticed = True
        _send(run.alive, number)
    elif number == signal.SIGQUIT and run.stage == "running":
        hang.ask(run)
    elif number not in STOPPING:
        return  # SIGCHLD: each round looks for who has ended
    elif run.asked is None and run.stage in ("running", "settling"):
        run.asked, run.asked_at = number, time.monotonic()
        run.stage, run.deadline = "ending", run.asked_at + run.plan.grace
        _stop(run, number)
        _announce(run, number)  # who reads it may count on the signal
    elif time.monotonic() - run.asked_at > REPEAT:
        run.deadline = 0.0  # asked twice: now


def _recalled(run: Run, agent: Wire, selector: selectors.BaseSelector) -> None:
    """The agent has the ranks end, to start them in other numbers; or it is gone."""
    try:
        if hear(agent) is None:
            return
    except EOFError:
        pass
    selector.unregister(agent.end)
    run.recalled = True
    if run.stage in ("running", "settling"):
        run.stage, run.deadline = "ending", time.monotonic() + run.plan.grace
        _stop(run, signal.SIGTERM)


def _listen(rank: Rank) -> bool:
    """Take what the rank has reported; False when nothing more can come."""
    try:
        data = os.read(rank.report, 1 << 16)
    except BlockingIOError:
        return True
    rank.heard += data
    judged = rank.code is not None or rank.failure is not None  # its word counts once
    if not judged and b"\n" in rank.heard:
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
    silent = died(rank.number, status, hang.stack_of(rank))
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


def _advance(run: Run) -> None:
    now = time.monotonic()
    if run.stage == "running" and any(rank.failure for rank in run.ranks):
        run.stage, run.deadline = "settling", now + SETTLE
    if run.stage == "running" and run.limit is not None and now >= run.limit:
        hang.ask(run)
        run.stage = "asking"
    if run.answer is not None and now >= run.answer and hang.answered(run):
        if run.stage == "asking":
            run.deadline = now
        else:
            hang.show(run)
    if run.deadline is None or now < run.deadline:
        return
    if run.stage == "asking":
        stacks = hang.answers(run)
        run.notes = hang.merged(run)
        for rank in run.alive:
            stack, limit = stacks[rank.number], run.plan.timeout or 0.0
            rank.failure = late(rank.number, limit, stack)
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
