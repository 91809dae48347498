"""The launcher of a job that may start again: it forks, torch's agent decides."""

from __future__ import annotations

import os
import selectors
import signal
import sys
import time
from types import CodeType
from typing import Any

import attrs

from accelx.launch import kernel
from accelx.launch.conclude import conclude, leave
from accelx.launch.failure import LATE, Failure
from accelx.launch.fork import close, fork, keep_read
from accelx.launch.output import open_logs
from accelx.launch.place import Place
from accelx.launch.plan import Plan
from accelx.launch.rank import be
from accelx.launch.running import End, Run
from accelx.launch.told import told
from accelx.launch.watch import STOPPING, signals, watch
from accelx.launch.wire import Wire, hear, pair, say

PATIENCE = 2.0  # seconds that an agent has to leave, and again to end by SIGTERM
GONE = "the agent of this node has ended, and the ranks with it"
SAVED = 75  # exit code of ranks that were told to leave, and saved


@attrs.define(eq=False)
class Job:
    """What the launcher knows between attempts."""

    plan: Plan
    agent: int  # process id
    wire: Wire
    tether: tuple[int, int] | None
    limit: float | None  # when it has taken too long
    end: End | None = None  # of the last attempt
    over: bool = False


def attend(
    plan: Plan,
    code: CodeType | None,
    tether: tuple[int, int] | None,
    limit: float | None,
) -> int:
    """Start the agent, and ranks as often as it says. Returns the exit code, in each.

    Signals are held when it is called.
    """
    wire, its = pair()
    parent = os.getpid()
    agent = os.fork()  # before it or this process has any thread
    if agent == 0:
        from accelx.launch.agent import be as be_agent

        wire.end.close()
        return be_agent(plan, its, parent, keep_read(tether))
    its.end.close()
    job = Job(plan, agent, wire, tether, limit)
    while not job.over:
        order = _next(job)
        if order["do"] == "note":
            _say(order["words"])
        elif order["do"] == "start":
            born = _start(job, order)
            if born is not None:
                return be(plan, born, code)
        elif order["do"] == "end":
            _ended(job, order)
    _dismiss(job)
    return conclude(plan, job.end or End(0))


def _start(job: Job, order: dict[str, Any]) -> Any:
    """Fork the ranks and watch them to their end; in a rank, its Birth."""
    places = [Place(**place) for place in order["places"]]
    part = f"attempt-{places[0].attempt}"
    _tell_restart(job, order["left"], places[0])
    run = Run(job.plan, [], [], job.tether, kernel.oom_kills(), job.limit, job.wire)
    logs = open_logs(job.plan, [place.rank for place in places], part)
    for place, log in zip(places, logs, strict=True):
        born = fork(run, place, log, [job.wire.end])
        if born is not None:
            return born
    end = watch(run)
    close(run)
    _judge(job, run, end)
    if end.failure is not None and not run.recalled:
        leave(job.plan, end.failure, part)
    return None


def _judge(job: Job, run: Run, end: End) -> None:
    """Tell the agent how the attempt ended, and whether this node goes on."""
    failure = None if end.failure is None else attrs.asdict(end.failure)
    late = end.failure is not None and end.failure.kind == "timeout"
    job.over = run.asked is not None or late or (run.noticed and end.code == SAVED)
    job.end = None if run.recalled and not job.over else end
    say(job.wire, do="ended", code=end.code, failure=failure, leave=job.over)


def _next(job: Job) -> dict[str, Any]:
    """What the agent wants next; an end where it is gone, or the user wants one."""
    with signals() as wakeup, selectors.DefaultSelector() as selector:
        selector.register(wakeup, selectors.EVENT_READ)
        selector.register(job.wire.end, selectors.EVENT_READ)
        while True:
            try:
                order = hear(job.wire)
            except EOFError:
                return {"do": "end", "code": 1, "words": GONE}
            if order is not None:
                return order
            for key, _ in selector.select(_wait(job)):
                numbers = os.read(key.fd, 512) if key.fd == wakeup else b""
                for number in STOPPING.intersection(map(signal.Signals, numbers)):
                    os.kill(job.agent, signal.SIGTERM)
                    words = f"{number.name} came while no ranks ran"
                    return {"do": "end", "code": 128 + number, "words": words}
            if job.limit is not None and time.monotonic() >= job.limit:
                os.kill(job.agent, signal.SIGTERM)
                words = f"no ranks to end within {job.plan.timeout:g} s"
                return {"do": "end", "code": LATE, "words": words}


def _wait(job: Job) -> float | None:
    return None if job.limit is None else max(0.0, job.limit - time.monotonic())


def _ended(job: Job, order: dict[str, Any]) -> None:
    """The agent's last word: its own, or that of the node that failed first."""
    job.over = True
    cause = order.get("cause")
    if cause is not None:
        failure, here = Failure(**cause), job.end and job.end.failure
        if here is not None and not here.follows:
            return  # this node's own words have more to say
        text = told(failure, failure.host, 0)
        text = f"{text}\nthe ranks of this node stopped because of it"
        job.end = End(failure.code, failure, text)
    elif order["code"] is not None:
        words = f"accelx.spawn: {order['words']}"
        before = "" if job.end is None else job.end.text
        text = "\n".join(filter(None, (before, words)))
        job.end = End(order["code"], job.end and job.end.failure, text)


def _dismiss(job: Job) -> None:
    """Have the agent end: by itself, when asked, or by force."""
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            os.kill(job.agent, number)
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit or number == signal.SIGKILL:
            if os.waitpid(job.agent, os.WNOHANG)[0]:
                return
            time.sleep(0.01)


def _tell_restart(job: Job, left: int, place: Place) -> None:
    if place.attempt == 0:
        return
    if job.end is not None and job.end.text:
        echo = job.end.failure is not None and job.end.failure.follows
        _say(job.end.text.partition("\n")[0] if echo else job.end.text)
    ranks = f"{place.world} rank{'s' * (place.world > 1)}"
    times = f"{left} more restart{'s' * (left != 1)} allowed"
    _say(f"attempt {place.attempt} starts, with {ranks}; {times}")


def _say(words: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"accelx.spawn: {words}\n")
    sys.stderr.flush()
