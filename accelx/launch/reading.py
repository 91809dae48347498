"""What the end of a rank means, in one line; pure."""

from __future__ import annotations

import re
import signal

import attrs

from accelx.launch.failure import Failure
from accelx.launch.kernel import gib

LESS = "give it more memory, or cut the batch with accumulate(n)"
# torch says so in the error or in the one that is its cause; or it has not seen how.
KILLED = re.compile(r"DataLoader worker .*killed by signal: Killed", re.DOTALL)
GONE = re.compile(r"DataLoader worker .*exited unexpectedly", re.DOTALL)
SIGNALS: dict[int, str] = {
    signal.SIGSEGV: "a fault in native code",
    signal.SIGABRT: "native code gave up, such as a failed assertion or a watchdog",
    signal.SIGBUS: "often a full /dev/shm: give the container a larger --shm-size",
    signal.SIGILL: "native code built for another CPU",
    signal.SIGTERM: "something else asked this rank to stop",
}
CODES = {75: "told to leave, and saved: run it again to go on"}
ERRORS = (
    (
        re.compile("^MemoryError|can't allocate memory"),
        f"no more memory was given, here or by ulimit -v; {LESS}",
    ),
    (
        re.compile("CUDA out of memory"),
        'the GPU is full; accumulate(n) and shard_model(env, "fsdp2") need less',
    ),
)


@attrs.frozen
class Seen:
    """What the launcher knows of a rank that has ended."""

    host: str
    pid: int
    peak: int  # bytes of memory at most, the processes that it waited for included
    oom: bool | None  # whether the kernel ended a process meanwhile; None: unknown


def read(failure: Failure, seen: Seen) -> Failure:
    """The failure with what the launcher has seen, and what it means."""
    failure = attrs.evolve(failure, host=seen.host, pid=seen.pid, peak=seen.peak)
    if failure.signal == "SIGKILL":
        return _killed(failure, seen)
    return attrs.evolve(failure, reading=_reading(failure, seen))


def wants_count(failure: Failure) -> bool:
    """Whether it matters if the kernel has ended a process for want of memory."""
    return failure.signal == "SIGKILL" or _loader(failure)


def _killed(failure: Failure, seen: Seen) -> Failure:
    peak = f"peak {gib(seen.peak)}"
    if seen.oom:
        summary = f"killed by the kernel: out of memory; {peak}"
        return attrs.evolve(failure, summary=summary, reading=LESS)
    reading = f"out of memory, or kill -9; {peak}"
    if seen.oom is False:
        reading = f"kill -9: the kernel ended nothing for want of memory; {peak}"
    return attrs.evolve(failure, reading=reading)


def _reading(failure: Failure, seen: Seen) -> str:
    if failure.kind == "signal":
        return SIGNALS.get(failure.code - 128, "")
    if failure.kind == "exit":
        return CODES.get(failure.code, "")
    if _loader(failure):
        how = "is gone: out of memory, kill -9, or a fault of its own"
        how = (
            "was killed: out of memory, or kill -9" if _killed_worker(failure) else how
        )
        how = "was killed by the kernel: out of memory" if seen.oom else how
        return f"a loader's worker {how}; fewer workers need less"
    found = (text for pattern, text in ERRORS if pattern.search(failure.summary))
    return next(found, "")


def _loader(failure: Failure) -> bool:
    return _killed_worker(failure) or GONE.search(failure.text) is not None


def _killed_worker(failure: Failure) -> bool:
    return KILLED.search(failure.text) is not None
