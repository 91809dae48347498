"""Why a rank ended badly, which of several failures came first, and how to say it."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Literal

import attrs

# What torch's own errors say when another rank went away; read from torch 2.13.
FOLLOWS = re.compile(
    "closed by peer|reset by peer|Broken pipe|connectFullMesh failed|Socket Timeout"
    "|failed to recv|remote process exited|Connection refused|Application timeout"
)
DISTRIBUTED = {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}
SIGNALS: dict[int, str] = {
    signal.SIGKILL: "out of memory, or kill -9",
    signal.SIGSEGV: "a fault in native code",
    signal.SIGABRT: "native code gave up, such as a failed assertion or a watchdog",
    signal.SIGBUS: "often a full /dev/shm: give the container a larger --shm-size",
    signal.SIGILL: "native code built for another CPU",
    signal.SIGTERM: "something else asked this rank to stop",
}
READINGS = {75: " (told to leave, and saved: run it again to go on)"}
LAUNCH = str(Path(__file__).parent)


@attrs.frozen
class Failure:
    """One rank's end, other than exit code 0."""

    rank: int
    time: float  # seconds of the monotonic clock, the same for all processes
    kind: Literal["exception", "exit", "signal", "interrupt"]
    summary: str  # one line
    code: int  # exit code
    text: str = ""  # traceback
    follows: bool = False  # looks like the echo of another rank's end


def raised(rank: int, error: BaseException) -> Failure:
    """The failure of a rank whose program raised `error`."""
    now = time.monotonic()
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        said = error.code if isinstance(error.code, int) else repr(str(error.code))
        summary = f"sys.exit({said}){READINGS.get(code, '')}"
        return Failure(rank, now, "exit", summary, code & 0xFF)
    name, text = type(error).__name__, _traceback(error)
    summary = " ".join(f"{name}: {error}".split())[:300].removesuffix(": ")
    if isinstance(error, KeyboardInterrupt):
        code = 128 + signal.SIGINT
        return Failure(rank, now, "interrupt", summary, code, text)
    return Failure(rank, now, "exception", summary, 1, text, _follows(error))


def died(rank: int, status: int, stack: str) -> Failure | None:
    """The failure of a rank that left without a word; None for exit code 0."""
    now, code, stack = time.monotonic(), status, _program_part(stack)
    if code == 0:
        return None
    if code > 0:
        summary = f"os._exit({code}), or native code's exit, without a traceback"
        return Failure(rank, now, "exit", summary, code, stack)
    named = -code in set(signal.Signals)  # real-time signals have numbers only
    name = signal.Signals(-code).name if named else f"signal {-code}"
    reading = f" ({SIGNALS[-code]})" if -code in SIGNALS else ""
    return Failure(rank, now, "signal", f"killed by {name}{reading}", 128 - code, stack)


def first(failures: Iterable[Failure]) -> Failure:
    """The root cause: the earliest that is not the echo of another."""
    return min(failures, key=lambda failure: (failure.follows, failure.time))


def told(failure: Failure, host: str, others: int) -> str:
    """What the screen shows last: the rank, its traceback, what became of the rest."""
    lines = [f"rank {failure.rank} on {host} failed: {failure.summary}"]
    if failure.text:
        lines.append(failure.text.rstrip())
    if others:
        lines.append(f"{others} rank{'s' * (others > 1)} stopped because of it")
    return "\n".join(lines)


def dumps(failure: Failure) -> bytes:
    """One line of JSON."""
    return json.dumps(attrs.asdict(failure)).encode() + b"\n"


def loads(line: bytes) -> Failure:
    """The failure that `dumps` wrote."""
    return Failure(**json.loads(line))


def _follows(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    torch_made = bool(names & DISTRIBUTED) or type(error) is RuntimeError
    return torch_made and FOLLOWS.search(str(error)) is not None


def _traceback(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and _ours(trace):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace)).rstrip()


def _program_part(stack: str) -> str:
    """What faulthandler wrote, less the launcher's frames below the program's."""
    own = (
        LAUNCH,
        "<frozen runpy>",
        "<frozen importlib",
        "accelx/spawn.py",
        "Extension ",
    )
    return "\n".join(
        line for line in stack.splitlines() if not any(word in line for word in own)
    ).rstrip()


def _ours(trace: TracebackType) -> bool:
    file = trace.tb_frame.f_code.co_filename
    return file.startswith((LAUNCH, "<frozen runpy>", "<frozen importlib"))


def remember(error: BaseException) -> None:
    """Leave the error where Python leaves an uncaught one, for the exit handlers."""
    if sys.version_info >= (3, 12):
        sys.last_exc = error
    sys.last_type, sys.last_value = type(error), error
    sys.last_traceback = error.__traceback__
