"""In which order a run is planned, torch imported, the ranks forked and watched."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from types import CodeType
from typing import BinaryIO, NoReturn

from accelx.errors import SpawnError
from accelx.launch import call, config, environ, kernel, machine, target
from accelx.launch.ending import Ending
from accelx.launch.failure import dumps
from accelx.launch.output import Stream, open_logs, prefix_of, wanted
from accelx.launch.plan import Asked, Plan, asked_for, resolve, table
from accelx.launch.rank import Birth, be
from accelx.launch.running import End, Rank, Run
from accelx.launch.told import report
from accelx.launch.watch import hold_signals, watch

USAGE = 2  # exit code of a command line that cannot be followed, as argparse's


def start(given: argparse.Namespace) -> int:
    """Start and watch the ranks. Returns the exit code, in the launcher and in each."""
    ending = Ending()
    asked = asked_for(given)
    try:
        code = _run(asked)
    except SpawnError as error:
        return _refused(asked, error)
    if "torch" in sys.modules:
        ending.code = code
    return code


def _run(asked: Asked) -> int:
    plan = _planned(asked)
    if asked.show:
        print(table(plan))
        return 0
    try:
        code = target.compiled(asked)
    except SyntaxError as error:
        sys.stderr.write("".join(traceback.format_exception_only(error)))
        return 1
    return _launch(plan, code)


def _planned(asked: Asked) -> Plan:
    if asked.kind == "call":
        call.enter(asked.target)
    else:
        target.check(asked)
    variables = environ.read()
    file = None if asked.kind == "call" else config.read(asked.config)
    plan = resolve(asked, variables, machine.look(variables), file)
    target.set_path(asked)
    if asked.kind == "call":
        call.planned(asked.target, plan.num_ranks)
    return plan


def _refused(asked: Asked, error: SpawnError) -> int:
    if asked.kind == "call":
        call.refused(asked.target, str(error))
    else:
        sys.stderr.write(f"accelx.spawn: {error}\n")
    return USAGE


def _launch(plan: Plan, code: CodeType | None) -> int:
    logs, limit = open_logs(plan), _limit(plan)
    environ.write(plan.exports)  # torch reads some of them once, when imported
    _import_torch()
    door = socket.create_server(("127.0.0.1", 0), backlog=1024)
    tether = os.pipe() if plan.system.tether == "pipe" else None
    run = Run(plan, [], [], tether, kernel.oom_kills(), limit)
    hold_signals()
    for number, log in enumerate(logs):
        born = _fork(run, number, door, log)
        if born is not None:
            return be(plan, born, code)
    return _conclude(plan, _serve(run, door))


def _limit(plan: Plan) -> float | None:
    return None if plan.timeout is None else time.monotonic() + plan.timeout


def _import_torch() -> None:
    """Once, for all ranks. The collector would look at what is never freed: 0.1 s."""
    gc.disable()
    import_module("torch.distributed")
    gc.freeze()  # a collection in a rank does not touch, and so copy, these objects


def _fork(
    run: Run, number: int, door: socket.socket, log: BinaryIO | None
) -> Birth | None:
    """Start one rank: its Birth in the new process, None in the launcher."""
    parent, stack = os.getpid(), _anonymous_file(run.plan)
    report, reports = os.pipe()
    output = (os.pipe(), os.pipe()) if wanted(run.plan) else None
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        pid = os.fork()
    except OSError as error:
        _give_up(run, number, error)
    if pid:
        run.ranks.append(Rank(number, pid, report, stack))
        os.close(reports)
        if output is not None:
            _take(run, number, output, log)
        return None
    ends = None if output is None else (output[0][1], output[1][1])
    for read, _ in output or ():
        os.close(read)
    os.close(report)
    port = door.getsockname()[1]
    door.close()
    return Birth(number, port, parent, reports, stack, ends, _let_go(run))


def _let_go(run: Run) -> int | None:
    """In a rank: close what is the launcher's. Its end of the tether stays open."""
    for item in run.ranks:
        os.close(item.report)
    for item in run.streams:
        os.close(item.source)
    if run.tether is None:
        return None
    read, write = run.tether
    os.close(write)
    return read


def _take(
    run: Run,
    number: int,
    output: tuple[tuple[int, int], tuple[int, int]],
    log: BinaryIO | None,
) -> None:
    for screen, (read, write) in enumerate(output, 1):
        os.close(write)
        run.streams.append(
            Stream(number, read, screen, prefix_of(run.plan, number), log)
        )


def _give_up(run: Run, number: int, error: OSError) -> NoReturn:
    for rank in run.ranks:
        os.kill(rank.pid, signal.SIGKILL)
        os.waitpid(rank.pid, 0)
    raise SpawnError(
        f"{run.plan.num_ranks} processes are wanted, the system stopped at {number} "
        f"({error.strerror}); write a smaller -n, or raise ulimit -u"
    ) from error


def _serve(run: Run, door: socket.socket) -> End:
    """Be the store that the ranks meet in, on a port that only this machine sees.

    It has threads, so it starts after the last fork. Until then its callers wait in the
    queue of the socket.
    """
    from torch.distributed import TCPStore

    host, port = door.getsockname()
    store = TCPStore(
        *(host, port, run.plan.num_ranks),
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=door.detach(),
        use_libuv=run.plan.system.libuv,
    )
    end = watch(run)
    del store
    return end


def _conclude(plan: Plan, end: End) -> int:
    if plan.asked.kind == "call":
        if end.failure is not None:
            (Path(plan.asked.target) / "failure.json").write_bytes(dumps(end.failure))
        return end.code
    text = end.text
    if end.failure is not None and plan.log_dir is not None:
        path = Path(plan.log_dir) / "failure.json"
        try:
            path.write_text(report(end.failure))
        except OSError as error:  # a full disk may be what the run failed of
            text = f"accelx.spawn: no {path}: {error.strerror}\n{text}"
    if text:
        sys.stdout.flush()
        sys.stderr.write(f"{text}\n")
    return end.code


def _anonymous_file(plan: Plan) -> int:
    """A file without a name, for a rank's stacks."""
    if plan.system.stacks == "memory":
        return os.memfd_create("stack")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
