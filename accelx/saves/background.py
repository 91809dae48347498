"""A save beside the training: a snapshot, a thread that writes it, one at a time."""

from __future__ import annotations

import atexit
import itertools
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import torch
from torch import Tensor

from accelx import _torch
from accelx.env_device import kind_of
from accelx.errors import CheckpointError
from accelx.saves.memory import copy
from accelx.saves.save import Job, run
from accelx.saves.verify import cores
from accelx.saves.write import Slab

PATIENCE = 1800.0  # seconds that a program which ends waits for the other ranks
POLL = 0.01  # seconds between looks at whether the other ranks have written
FAILED = 74  # EX_IOERR of sysexits.h: the last save of a run that ends failed


@attrs.define(eq=False)
class Background:
    """At most one save under way, and the host memory that snapshots share."""

    thread: threading.Thread | None = None
    error: BaseException | None = None
    buffer: Tensor | None = None
    watched: bool = False
    end: float = math.inf  # time.monotonic() after which nobody is waited for

    def start(self, job: Job, after: Callable[[Job], None]) -> None:
        """Copy what `job` writes, then write it in a thread. Returns after the copy."""
        if not self.watched:
            _before_threads_end(self._at_exit)
            self.watched = True
        copies = self._snapshot(job)

        def work() -> None:
            nonlocal job  # what was copied is let go
            time.sleep(POLL / 10)  # the step goes on first, not this thread's Python
            try:
                pairs = zip(job.slabs, copies, strict=True)
                kept = [attrs.evolve(slab, held=data) for slab, data in pairs]
                job = attrs.evolve(job, slabs=kept)
                run(job, _meeting(job, lambda: self.end))
                after(job)
            except BaseException as error:  # raised by the next step
                self.error = error

        self.thread = threading.Thread(target=work, name="accelx-save")
        self.thread.start()

    def join(self) -> None:
        """Wait for the save under way. Raises what made it fail."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def check(self) -> None:
        """Raise, once, what made the last save fail."""
        if self.error is None:
            return
        error, self.error = self.error, None
        raise CheckpointError(
            f"a save that went on beside the training failed: {error}\nThe run is "
            "whole; mend the cause, and start again from the newest checkpoint"
        ) from error

    def _snapshot(self, job: Job) -> Sequence[Tensor]:
        """Copies of what the job's slabs hold, (n,) uint8 each."""
        sizes = [slab.size for slab in job.slabs]
        size = sum(sizes)
        if self.buffer is None or self.buffer.numel() < size:
            pinned = kind_of(job.env.device).pinned
            self.buffer = None  # before the new one is made
            self.buffer = torch.empty(
                size, dtype=torch.uint8, device="cpu", pin_memory=pinned
            )
        _copy(job.slabs, self.buffer, job.env.local_world)
        return self.buffer[:size].split(sizes)

    def _at_exit(self) -> None:
        """A failure that no step is left to raise must not look like success."""
        self.end = time.monotonic() + PATIENCE
        try:
            self.join()
        except CheckpointError:
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(FAILED)


def _copy(slabs: Sequence[Slab], into: Tensor, neighbours: int) -> None:
    """Lay what `slabs` hold end to end: by two threads, since the step waits.

    By one where the `neighbours` on this machine leave no core for a second, and off a
    device: each thread has a stream of its own, and this one's is trained on.
    """
    on_cpu = all(slab.held.is_cpu for slab in slabs)
    places = list(itertools.accumulate((slab.size for slab in slabs), initial=0))
    start = into.data_ptr()

    def half(first: int) -> None:
        for slab, at in zip(slabs[first::2], places[first:-1:2], strict=True):
            if on_cpu:
                copy(slab.held, start + at)
            else:
                into[at : at + slab.size].copy_(slab.data)

    if not on_cpu or cores() <= neighbours:
        half(0)
        half(1)
        return
    with ThreadPoolExecutor(2, "accelx-copy") as pool:
        for _ in pool.map(half, range(2)):
            pass


def _before_threads_end(do: Callable[[], None]) -> None:
    """Call `do` when the program ends, while thread pools still take work.

    They close first, and a store may want one; atexit alone comes after that.
    """
    register: Any = getattr(threading, "_register_atexit", atexit.register)
    register(do)


def _meeting(job: Job, end: Callable[[], float]) -> Callable[[str, Any], list[Any]]:
    """How threads of all ranks tell each other: by keys of the store, no collective.

    Collectives of a thread would come between those of the training. After `end()` no
    rank is waited for: one that is gone may have left no error that this one sees.
    """
    env = job.env
    if env.world == 1:
        return lambda where, told: [told]
    store = _torch.prefixed(f"accelx/{job.store.root}", _torch.default_store())
    before = getattr(sys, "last_value", None)  # an interactive one of an earlier cell

    def wait(keys: list[str]) -> list[Any]:
        while not store.check(keys):
            failed = getattr(sys, "last_value", None) is not before
            if failed or time.monotonic() > end():
                raise CheckpointError("the run ended before all ranks had written")
            time.sleep(POLL)
        return [json.loads(store.get(key)) for key in keys]

    def meet(where: str, told: Any) -> list[Any]:
        store.set(f"{where}/{env.rank}", json.dumps(told))
        if env.main:  # one rank gathers, so that a thousand ask for one key each
            keys = [f"{where}/{rank}" for rank in range(env.world)]
            store.set(where, json.dumps(wait(keys)))
            for key in keys:
                store.delete_key(key)
        return wait([where])[0]

    return meet
