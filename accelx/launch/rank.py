"""What a freshly forked process does to become a rank and run the user's program."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Callable
from types import CodeType

import attrs

from accelx.launch import call, environ, target
from accelx.launch.failure import Failure, dumps, raised, remember
from accelx.launch.place import Place, rank_variables
from accelx.launch.plan import Plan
from accelx.launch.tether import die_with, die_with_pipe
from accelx.launch.watch import let_signals


@attrs.frozen
class Birth:
    """What a rank gets from the launcher beside the plan."""

    place: Place
    parent: int  # process id of the launcher
    report: int  # file descriptor: one line of JSON, if the rank fails
    stack: int  # file descriptor: where a fault was, or the program is
    output: tuple[int, int] | None  # file descriptors for stdout and stderr
    tether: (
        int | None
    )  # file descriptor that ends with the launcher; None: the kernel acts


def be(plan: Plan, birth: Birth, code: CodeType | None) -> int:
    """Become the rank of `birth`, run the program, and return the exit code."""
    _write_stacks(birth.stack)  # before the first SIGQUIT can come
    let_signals()
    os.setsid()  # a Ctrl-C at the terminal reaches the launcher alone
    if birth.tether is None:
        die_with(birth.parent, signal.SIGKILL)
    else:
        die_with_pipe(birth.tether)
    _connect_output(birth)
    environ.write(rank_variables(plan, birth.place))
    if plan.shares:
        os.sched_setaffinity(0, plan.shares[birth.place.local_rank])
    _reseed()
    gc.enable()
    if plan.asked.kind == "call":
        return _told(birth, lambda: call.run(plan.asked.target, birth.place.rank))
    return _told(birth, lambda: target.run(plan.asked, code))


def _told(birth: Birth, program: Callable[[], None]) -> int:
    own = os.getpid()
    try:
        program()
    except SystemExit as error:
        if error.code is None or error.code == 0:
            return 0
        return _report(birth, raised(birth.place.rank, error), own)
    except BaseException as error:
        remember(error)
        return _report(birth, raised(birth.place.rank, error), own)
    return 0


def _report(birth: Birth, failure: Failure, own: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if os.getpid() == own:  # not a process that the program forked off by itself
        data = dumps(failure)
        while data:
            data = data[os.write(birth.report, data) :]
    return failure.code


def _connect_output(birth: Birth) -> None:
    if birth.place.local_rank:  # one rank at most can read the terminal
        nowhere = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nowhere, 0)
        os.close(nowhere)
    for source, number in zip(birth.output or (), (1, 2), strict=False):
        os.dup2(source, number)
        os.close(source)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # whole lines, also under PYTHONUNBUFFERED
            reconfigure(line_buffering=True, write_through=False)


def _write_stacks(file: int) -> None:
    """Have a fault write where the program was, and SIGQUIT where it is."""
    faulthandler.register(signal.SIGQUIT, file, all_threads=True)
    if not faulthandler.is_enabled():
        faulthandler.enable(file, all_threads=False)


def _reseed() -> None:
    """Separate processes start numpy's global generator from entropy; so do forks here.

    Python's `random` does it by itself, and torch starts every process from one seed.
    """
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
