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

from accelx._torch import store_errors
from accelx._torch_elastic import State, agent, errors
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
ENDED = "another node has ended the job"
UNUSED = {"code": 0, "words": "the job has ended without a use for this node"}


class Leave(BaseException):
    """The launcher was told to end."""


class Hands:
    """What torch leaves to whoever has the processes: here, to the launcher."""

    def __init__(self, wire: Wire, meeting: Meeting) -> None:
        self._wire, self._meeting = wire, meeting
        self._runs = self._done = self.failed = False

    def start(self, group: Any, left: int) -> None:
        """Have the launcher fork the ranks of this node."""
        told, interface = self._meeting.told, self._meeting.interface
        places = [
            Place(
                *(w.global_rank, w.world_size, w.local_rank, told.port, told.host),
                node=group.group_rank,
                nodes=group.group_world_size,
                attempt=told.attempt,
                interface=interface,
            )
            for w in group.workers
        ]
        self._runs, self._done, self.failed = True, False, False
        say(self._wire, do="start", places=list(map(attrs.asdict, places)), left=left)

    def stop(self) -> None:
        """Have the launcher end them, and wait until it has."""
        if self._runs:
            say(self._wire, do="stop")
            said = hear(self._wire, None)
            self._runs = False
            if said and said["leave"]:
                raise Leave

    def state(self, group: Any) -> State:
        """How they are, and whether all nodes of the attempt are still there."""
        said = hear(self._wire)
        if said is not None:
            return self._ended(group, said)
        if self._done and self._all_done(group):
            return "SUCCEEDED"
        found = self._meeting.look()
        if found == "closed":
            raise errors()[0]
        return "AGAIN" if found == "lost" else "HEALTHY"

    def _ended(self, group: Any, said: dict[str, Any]) -> State:
        self._runs = False
        if said["leave"]:
            raise Leave
        if said["code"] == 0:
            self._done = True
            self._all_done(group, 1)
            return "HEALTHY"
        if said["code"] == SAVED:  # another node was told to leave; no one has failed
            return "AGAIN"
        self.failed = True
        if said["failure"] is not None:
            self._meeting.blame(said["failure"])
        return "FAILED"

    def _all_done(self, group: Any, more: int = 0) -> bool:
        """Whether the ranks of every node have ended well, `more` of them just now.

        torch would wait for the rest up to a limit, and not see that they start again.
        """
        return group.store.add("done", more) >= group.group_world_size


def be(plan: Plan, wire: Wire, parent: int, tether: int | None) -> int:
    """Become the agent of launcher `parent`. The last line of `wire` says how it went.

    Effects: the rendezvous' sockets, and torch's variables of this process.
    """
    os.setsid()  # a Ctrl-C at the terminal reaches the launcher alone
    if tether is None:
        die_with(parent, signal.SIGKILL)
    else:
        die_with_pipe(tether)
    environ.write(agent_variables())
    _redirect(plan)
    signal.signal(signal.SIGTERM, _leave)
    try:
        let_signals()
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
    _, late, lost = errors()
    hands = Hands(wire, meeting)
    runs = agent(
        *(hands, meeting),
        name=plan.asked.target,
        num_ranks=plan.num_ranks,
        restarts=plan.elastic.restarts,
    )
    try:
        return _run(runs, hands, meeting)
    except SpawnError as error:
        return {"code": 2, "words": str(error)}
    except late:
        fewest, seconds = plan.elastic.fewest, plan.elastic.join_timeout
        wanted = f"{fewest} node{'s are' if fewest > 1 else ' is'} wanted"
        words = f"{wanted}, and fewer came to {where} within {seconds:g} s; start them"
        return {"code": LATE, "words": f"{words}, or write a larger --join-timeout"}
    except (lost, *store_errors()):
        return {"code": 1, "words": gone}


def _run(runs: Any, hands: Hands, meeting: Meeting) -> dict[str, Any]:
    try:
        result = runs.run()
    except Leave:
        meeting.leave()
        raise
    except SpawnError:
        meeting.goodbye()
        raise
    except errors()[0]:
        if meeting.ended_well():  # it came as the others were leaving
            meeting.goodbye()
            return UNUSED
        said = {"code": 1, "words": ENDED, "cause": meeting.cause()}
        meeting.goodbye()
        return said
    if result is None:  # more nodes came than the job takes
        meeting.goodbye()
        return UNUSED
    if not hands.failed:
        meeting.say_well()
    meeting.shutdown()
    cause = meeting.cause() if hands.failed else None
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
