"""torch's elastic agent, whose ranks the launcher forks and watches in its stead.

The agent is a process of its own: it has threads, and its launcher, which forks, must
have none. torch decides when ranks start, stop and start again, and with which numbers;
it says so to the launcher, and hears from it how they ended.
"""

from __future__ import annotations

import os
import signal
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import attrs
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)

from accelx._torch import store_errors
from accelx.errors import SpawnError
from accelx.launch import environ
from accelx.launch.elastic import agent_variables
from accelx.launch.failure import LATE
from accelx.launch.meeting import Meeting
from accelx.launch.place import Place
from accelx.launch.plan import Plan
from accelx.launch.tether import die_with, die_with_pipe
from accelx.launch.watch import let_signals
from accelx.launch.wire import Wire, hear, say

SAVED = 75  # exit code of ranks that were told to leave, and saved
POLL = 0.1  # seconds


class Leave(BaseException):
    """The launcher was told to end."""


class Agent(SimpleElasticAgent):
    """The four things that torch leaves to whoever has the processes."""

    def __init__(self, plan: Plan, wire: Wire, meeting: Meeting) -> None:
        restarts = 0 if plan.elastic is None else plan.elastic.restarts
        spec = WorkerSpec(
            role="accelx",
            local_world_size=plan.num_ranks,
            rdzv_handler=meeting,
            entrypoint=plan.asked.target,
            max_restarts=restarts,
            monitor_interval=POLL,
        )
        super().__init__(spec)
        self._wire, self._meeting, self._runs = wire, meeting, False
        self.failed = False

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        told, interface = self._meeting.told, self._meeting.interface
        places = [
            Place(
                *(w.global_rank, w.world_size, w.local_rank, told.port, told.host),
                node=worker_group.group_rank or 0,
                nodes=worker_group.group_world_size or 1,
                attempt=told.attempt,
                interface=interface,
            )
            for w in worker_group.workers
        ]
        self._runs, self.failed = True, False
        left = self._remaining_restarts
        say(self._wire, do="start", places=list(map(attrs.asdict, places)), left=left)
        return {place.local_rank: place.local_rank for place in places}

    def _stop_workers(self, worker_group: WorkerGroup, *_: Any, **__: Any) -> None:
        self._stop()

    def _shutdown(self, *_: Any, **__: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._runs:
            say(self._wire, do="stop")
            said = hear(self._wire, None)
            self._runs = False
            if said and said["leave"]:
                raise Leave

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        said = hear(self._wire)
        if said is None:
            found = self._meeting.look()
            if found == "closed":
                raise RendezvousClosedError()
            if found == "lost":
                self._again(worker_group)
            return RunResult(state=WorkerState.HEALTHY)
        self._runs = False
        if said["leave"]:
            raise Leave
        if said["code"] == 0:
            values = {worker.global_rank: None for worker in worker_group.workers}
            return RunResult(state=WorkerState.SUCCEEDED, return_values=values)
        if said["code"] == SAVED:  # another node was told to leave; no one has failed
            self._again(worker_group)
            return RunResult(state=WorkerState.HEALTHY)
        self.failed = True
        if said["failure"] is not None:
            self._meeting.blame(said["failure"])
        return RunResult(state=WorkerState.FAILED)

    def _again(self, worker_group: WorkerGroup) -> None:
        """Start again without counting it, as torch does when a node comes."""
        restart: Any = self._restart_workers  # its decorator hides the arguments
        restart(worker_group)


def be(plan: Plan, wire: Wire, parent: int, tether: int | None) -> int:
    """Become the agent of launcher `parent`. The last line of `wire` says how it went.

    Effects: the rendezvous' sockets, and torch's variables of this process.
    """
    signal.signal(signal.SIGTERM, _leave)
    let_signals()
    os.setsid()  # a Ctrl-C at the terminal reaches the launcher alone
    if tether is None:
        die_with(parent, signal.SIGKILL)
    else:
        die_with_pipe(tether)
    environ.write(agent_variables())
    _redirect(plan)
    try:
        said = _attend(plan, wire)
    except (Leave, EOFError):
        return 0
    except Exception as error:
        shown = "".join(traceback.format_exception(error))
        said = {"code": 1, "words": f"the agent failed\n{shown}".rstrip()}
    say(wire, do="end", **said)
    return 0


def _redirect(plan: Plan) -> None:
    """torch's own words go to a log, if there is one: the launcher has the screen."""
    target = os.open(os.devnull, os.O_WRONLY)
    if plan.log_dir is not None:
        path = Path(plan.log_dir, f"agent-{plan.host}.log")
        path.parent.mkdir(parents=True, exist_ok=True)
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number in (1, 2):
        os.dup2(target, number)
    os.close(target)


def _attend(plan: Plan, wire: Wire) -> dict[str, Any]:
    """Meet, have the ranks run, and meet again, until the job has ended."""
    if plan.elastic is None:  # the launcher asks only then
        raise AssertionError
    where = plan.elastic.rendezvous
    gone = f"the rendezvous at {where} is gone: the node that served it has ended"
    try:
        meeting = Meeting(plan.elastic, plan.system.libuv)
    except SpawnError as error:
        return {"code": 2, "words": str(error)}
    except store_errors() as error:
        return {"code": 1, "words": f"{where} does not answer as a rendezvous: {error}"}
    if meeting.opened:
        say(wire, do="note", words=_opened(plan.elastic.job_id, meeting.opened))
    agent = Agent(plan, wire, meeting)
    try:
        return _run(agent, meeting)
    except SpawnError as error:
        return {"code": 2, "words": str(error)}
    except RendezvousTimeoutError:
        fewest, seconds = plan.elastic.fewest, plan.elastic.join_timeout
        wanted = f"{fewest} node{'s are' if fewest > 1 else ' is'} wanted"
        words = f"{wanted}, and fewer came to {where} within {seconds:g} s; start them"
        return {"code": LATE, "words": f"{words}, or write a larger --join-timeout"}
    except (RendezvousConnectionError, *store_errors()):
        return {"code": 1, "words": gone}


def _run(agent: Agent, meeting: Meeting) -> dict[str, Any]:
    try:
        result = agent.run()
    except Leave:
        meeting.leave()
        raise
    except SpawnError:
        meeting.goodbye()
        raise
    except RendezvousClosedError:
        words = "another node has ended the job"
        said = {"code": 1, "words": words, "cause": meeting.cause()}
        meeting.goodbye()
        return said
    if result is None:  # more nodes came than the job takes
        return {"code": 0, "words": "the job has ended without a use for this node"}
    meeting.shutdown()
    cause = meeting.cause() if agent.failed else None
    meeting.goodbye()
    return {"code": None, "cause": cause}


def _opened(job: str, where: str) -> str:
    return (
        f"the nodes of {job!r} meet at {where}, and each attempt's ranks at a further "
        "port of one of them: open to the network, without a password, and code that "
        "is sent there is executed; for trusted networks only"
    )


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise Leave
