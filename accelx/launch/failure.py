"""Why a rank ended badly, and which of several failures came first."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal

import attrs

from accelx.launch.where import innermost, of_stack

# What torch's own errors say when another rank went away; read from torch 2.13.
FOLLOWS = re.compile(
    "closed by peer|reset by peer|Broken pipe|connectFullMesh failed|Socket Timeout"
    "|failed to recv|remote process exited|Connection refused|Application timeout"
    "|caused by a remote worker|Socket unexpectedly closed"
)
DISTRIBUTED = {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}
LATE = 124  # exit code of a run that passed its time limit, as of timeout(1)
LAUNCH = str(Path(__file__).parent)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@attrs.frozen
class Failure:
    """One rank's end, other than exit code 0."""

    rank: int
    time: float  # seconds of the monotonic clock, the same for all processes
    kind: Literal["exception", "exit", "signal", "interrupt", "timeout"]
    summary: str  # one line: what happened
    code: int  # exit code
    text: str = ""  # traceback
    follows: bool = False  # looks like the echo of another rank's end
    error: str = ""  # type of the exception
    message: str = ""  # its text
    line: str = ""  # file, line and function of the program
    signal: str = ""  # name of the signal that ended it
    at: str = attrs.field(factory=_now)  # date and time, UTC
    reading: str = ""  # what it means; this and the rest is from the launcher
    host: str = ""
    pid: int = 0
    peak: int = 0  # bytes of memory

    @property
    def headline(self) -> str:
        """What happened and what it means, in one line."""
        return self.summary + f" ({self.reading})" * bool(self.reading)


def raised(rank: int, error: BaseException) -> Failure:
    """The failure of a rank whose program raised `error`."""
    now, line = time.monotonic(), innermost(error.__traceback__)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        said = error.code if isinstance(error.code, int) else repr(str(error.code))
        made = Failure(rank, now, "exit", f"sys.exit({said})", code & 0xFF, line=line)
        return attrs.evolve(made, error="SystemExit", message=str(error.code))
    name, text = type(error).__name__, _traceback(error)
    summary = " ".join(f"{name}: {error}".split())[:300].removesuffix(":")
    interrupt = isinstance(error, KeyboardInterrupt)
    return Failure(
        rank,
        now,
        kind="interrupt" if interrupt else "exception",
        summary=summary,
        code=128 + signal.SIGINT if interrupt else 1,
        text=text,
        follows=_follows(error),
        error=name,
        message=str(error),
        line=line,
    )


def died(rank: int, status: int, stack: str) -> Failure | None:
    """The failure of a rank that left without a word; None for exit code 0."""
    now, stack = time.monotonic(), _program_part(stack)
    line = of_stack(stack)
    if status == 0:
        return None
    if status > 0:
        summary = f"os._exit({status}), or native code's exit, without an exception"
        return Failure(rank, now, "exit", summary, status, stack, line=line)
    named = -status in set(signal.Signals)  # real-time signals have numbers only
    name = signal.Signals(-status).name if named else f"signal {-status}"
    summary, code = f"killed by {name}", 128 - status
    return Failure(rank, now, "signal", summary, code, stack, line=line, signal=name)


def late(rank: int, seconds: float, stack: str) -> Failure:
    """The failure of a rank that has not ended in the time that the run may take."""
    now, stack = time.monotonic(), _program_part(stack)
    summary = f"did not finish within {seconds:g} s"
    return Failure(rank, now, "timeout", summary, LATE, stack, line=of_stack(stack))


def first(failures: Iterable[Failure]) -> Failure:
    """The root cause: the earliest that is not the echo of another."""
    return min(failures, key=lambda failure: (failure.follows, failure.time))


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
