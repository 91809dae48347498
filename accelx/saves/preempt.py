"""What a run does when it is told to leave: agree, save, say so, and go."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import attrs

from accelx import comm
from accelx.comm_flag import Flag
from accelx.errors import CheckpointError
from accelx.records import Env, Out
from accelx.saves.saver import Saver, metrics_of
from accelx.state import State, Transient

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run it again


@attrs.define(eq=False)
class Preempt(Transient):
    """The slot "on_preempt": which signal came, and when."""

    env: Env
    saver: Saver
    flag: Flag
    grace: float | None = None  # seconds
    asked: signal.Signals | None = None
    asked_at: float = 0.0  # time.monotonic()
    timer: threading.Timer | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Preempt:
        return self  # a fork hears the same signals

    def hear(self, number: int) -> None:
        """Note the first signal; with a grace, start to count."""
        if self.asked is not None:
            return
        self.asked, self.asked_at = signal.Signals(number), time.monotonic()
        if self.grace is not None:
            self.timer = threading.Timer(self.grace, self._late)
            self.timer.daemon = True
            self.timer.start()

    def boundary(self, state: State, out: Out | None) -> None:
        """Leave, saved, if any rank was told to. A collective on several ranks."""
        if self.flag.look(self.asked is not None):
            self._leave(state, out)

    def _leave(self, state: State, out: Out | None) -> NoReturn:
        other = state.slots.get("save_state")
        done = False
        if other is not None and self._rested(other):
            here = self.saver.url, state.position
            done = (other.url, other.saved) == here
        if not done:
            if other is not None and other.url == self.saver.url:
                self.saver.select, self.saver.base = other.select, other.base
            metrics = {} if out is None else metrics_of(out)
            self.saver.save(state, metrics, wait=True)
        if self.timer is not None:
            self.timer.cancel()
        if self.env.main:
            name = self.asked.name if self.asked else "another rank's signal"
            sys.stderr.write(
                f"accelx: {name}: step {state.step} is saved under {self.saver.url}; "
                f"leaving with exit code {PREEMPTED}, run it again to go on\n"
            )
        raise SystemExit(PREEMPTED)

    def _rested(self, other: Saver) -> bool:
        """Wait for the save under way; whether it is whole, and the same on all ranks.

        One that failed is no reason to leave without a save.
        """
        told = None
        try:
            other.background.join()
        except CheckpointError as error:
            told = str(error)
        failed = [one for one in comm.gather_objects(self.env, told) if one]
        if failed and self.env.main:
            sys.stderr.write(f"accelx: saving again before leaving: {failed[0]}\n")
        return not failed

    def _late(self) -> None:
        """Nothing was saved in time: say where the program is, and go."""
        assert self.asked is not None
        sys.stderr.write(
            f"accelx: {self.asked.name}: no step, batch or save ended within "
            f"{self.grace:g} s on rank {self.env.rank}; nothing was saved. It is at\n"
        )
        sys.stderr.flush()
        faulthandler.dump_traceback()
        os._exit(128 + self.asked)


def listen(preempt: Preempt, signals: Sequence[str]) -> None:
    """Have `preempt` hear `signals`; what heard them before still does.

    Effect: this process's signal handlers. Raises CheckpointError off the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise CheckpointError(
            "on_preempt wants the main thread, where Python hears signals, but ax.init "
            f"runs in {threading.current_thread().name}; call it in the main thread"
        )
    for name in signals:
        number = signal.Signals[name]
        signal.signal(number, _handler(preempt, signal.getsignal(number)))


def _handler(preempt: Preempt, before: Any) -> Callable[[int, Any], None]:
    def handler(number: int, frame: Any) -> None:
        preempt.hear(number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

    return handler
