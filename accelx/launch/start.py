"""In which order a run is planned, torch imported, the ranks forked and watched."""

from __future__ import annotations

import argparse
import gc
import os
import socket
import sys
import time
import traceback
from importlib import import_module
from types import CodeType

from accelx.errors import SpawnError
from accelx.launch import call, config, environ, kernel, machine, target
from accelx.launch.attempts import attend
from accelx.launch.conclude import conclude
from accelx.launch.ending import Ending
from accelx.launch.fork import fork
from accelx.launch.output import open_logs
from accelx.launch.place import alone
from accelx.launch.plan import Asked, Plan, asked_for, resolve, table
from accelx.launch.rank import be
from accelx.launch.running import End, Run
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
    limit = _limit(plan)
    logs = open_logs(plan, () if plan.elastic else range(plan.num_ranks))
    environ.write(plan.exports)  # torch reads some of them once, when imported
    _import_torch()
    tether = os.pipe() if plan.system.tether == "pipe" else None
    hold_signals()
    if plan.elastic is not None:
        return attend(plan, code, tether, limit)
    door = socket.create_server(("127.0.0.1", 0), backlog=1024)
    run = Run(plan, [], [], tether, kernel.oom_kills(), limit)
    places = alone(plan, door.getsockname()[1])
    for place, log in zip(places, logs, strict=True):
        born = fork(run, place, log, [door])
        if born is not None:
            return be(plan, born, code)
    return conclude(plan, _serve(run, door))


def _limit(plan: Plan) -> float | None:
    return None if plan.timeout is None else time.monotonic() + plan.timeout


def _import_torch() -> None:
    """Once, for all ranks. The collector would look at what is never freed: 0.1 s."""
    gc.disable()
    import_module("torch.distributed")
    gc.freeze()  # a collection in a rank does not touch, and so copy, these objects


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
