"""How one rank is forked off the launcher, and which ends of which pipes each keeps."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable
from typing import NoReturn

from accelx.errors import SpawnError
from accelx.launch.output import Log, Stream, prefix_of, wanted
from accelx.launch.place import Place
from accelx.launch.plan import Plan
from accelx.launch.rank import Birth
from accelx.launch.running import Rank, Run


def fork(
    run: Run, place: Place, log: Log, doors: Iterable[socket.socket]
) -> Birth | None:
    """Start one rank: its Birth in the new process, None in the launcher.

    `doors` are the launcher's sockets, which the rank closes.
    """
    parent, stack = os.getpid(), _anonymous_file(run.plan)
    report, reports = os.pipe()
    output = (os.pipe(), os.pipe()) if wanted(run.plan) else None
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        pid = os.fork()
    except OSError as error:
        _give_up(run, place.local_rank, error)
    if pid:
        run.ranks.append(Rank(place.rank, pid, report, stack))
        os.close(reports)
        if output is not None:
            _take(run, place, output, log)
        return None
    ends = None if output is None else (output[0][1], output[1][1])
    for read, _ in output or ():
        os.close(read)
    os.close(report)
    for door in doors:
        door.close()
    return Birth(place, parent, reports, stack, ends, _let_go(run))


def close(run: Run) -> None:
    """Close what the launcher has kept of ranks that have ended."""
    for rank in run.ranks:
        os.close(rank.report)
        os.close(rank.stack)
    logs = {id(stream.log): stream.log for stream in run.streams if stream.log}
    for log in logs.values():
        with contextlib.suppress(OSError):  # a full disk has ended it before
            log.close()


def keep_read(tether: tuple[int, int] | None) -> int | None:
    """In a child: the end of the tether that it keeps; the other is the launcher's."""
    if tether is None:
        return None
    read, write = tether
    os.close(write)
    return read


def _let_go(run: Run) -> int | None:
    for item in run.ranks:
        os.close(item.report)
    for item in run.streams:
        os.close(item.source)
    return keep_read(run.tether)


def _take(
    run: Run,
    place: Place,
    output: tuple[tuple[int, int], tuple[int, int]],
    log: Log,
) -> None:
    prefix = prefix_of(run.plan, place.rank, place.world)
    for screen, (read, write) in enumerate(output, 1):
        os.close(write)
        run.streams.append(Stream(place.rank, read, screen, prefix, log))


def _give_up(run: Run, number: int, error: OSError) -> NoReturn:
    for rank in run.ranks:
        os.kill(rank.pid, signal.SIGKILL)
        os.waitpid(rank.pid, 0)
    raise SpawnError(
        f"{run.plan.num_ranks} processes are wanted, the system stopped at {number} "
        f"({error.strerror}); write a smaller -n, or raise ulimit -u"
    ) from error


def _anonymous_file(plan: Plan) -> int:
    """A file without a name, for a rank's stacks."""
    if plan.system.stacks == "memory":
        return os.memfd_create("stack")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
