"""A run as it stands: its ranks, what is known of them, and what comes next."""

from __future__ import annotations

import signal

import attrs

from accelx.launch.failure import Failure
from accelx.launch.output import Stream
from accelx.launch.plan import Plan
from accelx.launch.wire import Wire


@attrs.define(eq=False)
class Rank:
    """A process that was started, and what is known of it."""

    number: int
    pid: int
    report: int  # file descriptor to read
    stack: int  # file descriptor: where a fault was, or the program is
    heard: bytes = b""
    code: int | None = None  # None while it runs
    failure: Failure | None = None
    stopped: bool = False  # the launcher told it to end


@attrs.define(eq=False)
class Run:
    """The whole run as it stands."""

    plan: Plan
    ranks: list[Rank]
    streams: list[Stream]
    tether: tuple[int, int] | None = None  # a pipe; only the launcher can write to it
    oom_kills: int | None = None  # by the kernel in this control group, those explained
    limit: float | None = None  # when the run has taken too long
    agent: Wire | None = None  # who may recall the ranks, to start them anew
    recalled: bool = False
    noticed: bool = False  # a SIGUSR1 or SIGUSR2 was passed on
    asked: signal.Signals | None = None  # the user's wish to stop
    asked_at: float = 0.0
    stage: str = "running"  # settling, asking, ending, killing
    deadline: float | None = None
    answer: float | None = None  # when to look what ranks that were asked have said
    patience: float = 0.0  # until when they may take to say it
    said: dict[int, int] = attrs.field(factory=dict[int, int])  # bytes at the last look
    looked: float = 0.0  # by the wall clock, when they were asked
    notes: list[str] = attrs.field(factory=list[str])  # on ranks that hang
    stopped_at: float = float("inf")  # what fails later fails because it was stopped
    unkind: list[int] = attrs.field(factory=list[int])  # ranks that had to be killed

    @property
    def alive(self) -> list[Rank]:
        """The ranks that have not ended."""
        return [rank for rank in self.ranks if rank.code is None]


@attrs.frozen
class End:
    """How the run ended."""

    code: int
    failure: Failure | None = None
    text: str = ""  # what the screen shows last
