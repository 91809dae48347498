"""Which blocks a process keeps in memory: those that it is in the middle of."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable

from accelx.data.blocks import MEMORY, TURNS
from accelx.data.formats.format import Part

# In the shuffled order a reader comes back to a block within TURNS of its own batches;
# a block that was not asked for in so many batches is let go, or in so many rows.
IDLE, IDLE_ROWS = 4 * TURNS, 4096
BLOCKS = 256  # at most
BYTES = 2 * MEMORY  # at most, the one that was read last always among them


class Cache:
    """Blocks by number, the one used longest ago first.

    A forked process begins anew: its parent's lock may be held by a thread that it
    has not. So does one that gets this by pickle.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._parts: OrderedDict[int, tuple[Part, int]] = OrderedDict()
        self._nbytes = 0
        self._rows = 0  # that were taken so far
        self._most = 0  # of one batch
        self.reads = 0  # blocks that were read in this process

    def __reduce__(self) -> tuple[type[Cache], tuple[()]]:
        return Cache, ()

    def missing(self, numbers: list[int]) -> list[int]:
        """Those of the blocks that are not here."""
        if self._pid != os.getpid():
            return numbers
        return [number for number in numbers if number not in self._parts]

    def part(self, number: int, load: Callable[[], Part]) -> Part:
        """The block, read by `load` where it is not here."""
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            kept = self._parts.pop(number, None)
            if kept is not None:
                self._parts[number] = (kept[0], self._rows)
                return kept[0]
        part = load()  # outside of the lock: other threads go on
        with self._lock:
            self.reads += 1
            if number not in self._parts:
                self._nbytes += part.nbytes
                self._parts[number] = (part, self._rows)
            self._let_go()
        return part

    def took(self, rows: int) -> None:
        """Count the rows of a batch, by which blocks grow idle."""
        if self._pid == os.getpid():
            with self._lock:
                self._rows += rows
                self._most = max(self._most, rows)
                self._let_go()

    def _let_go(self) -> None:
        idle = max(IDLE_ROWS, IDLE * self._most)
        while len(self._parts) > 1:
            part, used = next(iter(self._parts.values()))
            many = len(self._parts) > BLOCKS or self._nbytes > BYTES
            if not many and self._rows - used <= idle:
                break
            self._parts.popitem(last=False)
            self._nbytes -= part.nbytes
