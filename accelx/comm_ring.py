"""What this rank did last: a ring of its operations, readable after its end.

It lies in memory that may be a file's. The kernel keeps that current, whatever becomes
of the process, and without a thread, a handler or Python's lock.
"""

from __future__ import annotations

import functools
import mmap
import re
import struct
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import attrs

from accelx.comm_site import FILE, Known, site

if TYPE_CHECKING:
    from accelx.records import Env

    Told = dict[str, tuple[str, str]]  # part -> what must agree, how it is shown
    Tell = Callable[[], Told]
    # (env, name, at, tell): compares with the other ranks, before an operation
    Check = Callable[[Env, str, str, Tell], None]

SLOTS = 64  # operations that are kept
HEAD = 256  # bytes before them, for who this is
# ended (0 before, negative where it failed), begun (both monotonic), number, update,
# line, name, file, what it brings; whole doubles, so that `ended` is one of them
SLOT = struct.Struct(f"=ddQqQ44s{FILE}s48s")
NONE = -1  # in place of the number of an update
OPEN, ENDED, FAILED = 0, 1, 2
LENGTH = HEAD + SLOTS * SLOT.size
# What torch's errors say where ranks did not meet; read from torch 2.13.
LOST = re.compile(
    "[Tt]imed out|timeout|closed by peer|reset by peer|Broken pipe"
    "|caused by a remote worker|unexpectedly closed"
)

_pack, _now = SLOT.pack_into, time.monotonic


class Entry:
    """An operation under way: `with ring.begin(...):` ends it."""

    __slots__ = ("at", "ended", "memory", "times")

    def __init__(self, memory: Any, times: memoryview[float], number: int) -> None:
        self.memory, self.at = memory, HEAD + number * SLOT.size
        # the memory as doubles: a write takes 0.03 us less than by a struct
        self.times, self.ended = times, self.at // 8

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.times[self.ended] = _now()
            return
        self.times[self.ended] = -_now()
        if isinstance(error, RuntimeError) and LOST.search(str(error)):
            error.add_note(f"this rank was in {_said(self.memory, self.at)}")


class _Names(dict[str, bytes]):
    """Names of operations, each encoded once."""

    def __missing__(self, name: str) -> bytes:
        return self.setdefault(name, name.encode())


def _entries(ring: Ring) -> list[Entry]:
    times = memoryview(ring.memory).cast("d")
    return [Entry(ring.memory, times, i) for i in range(SLOTS)]


@attrs.define(eq=False)
class Ring:
    """The last operations of this process."""

    memory: Any = attrs.field(factory=lambda: mmap.mmap(-1, LENGTH))
    number: int = 0  # of operations begun
    check: Check | None = None  # what `with_lockstep` does before each
    leave: Callable[[], None] | None = None  # what is to be done at the end
    known: Known = attrs.field(factory=Known)
    names: _Names = attrs.field(factory=lambda: _Names())
    entries: list[Entry] = attrs.Factory(_entries, takes_self=True)  # made once: 0.2 us

    def begin(
        self, env: Env, name: str, what: Any = None, tell: Tell | None = None
    ) -> Entry:
        """Write that an operation begins; its Entry is to be ended.

        `what` is what it brings: a tree as ranks tell of it, or the number of a step.
        `tell` is what ranks that go in lockstep compare; without it they do not.
        """
        file, line = site(self.known)
        self.number = number = self.number + 1
        entry, told = self.entries[number % SLOTS], self.names[name]
        update, brings = NONE, b""
        if type(what) is int:
            update = what
        elif what:
            brings = _brings(what)
        at, now = entry.at, _now()
        _pack(self.memory, at, 0.0, now, number, update, line, told, file, brings)
        if self.check is not None and tell is not None:
            with entry:
                self.check(env, name, f"{file.decode()}:{line}", tell)
            entry.times[entry.ended] = 0.0
        return entry

    def move(self, memory: Any) -> None:
        """Go on in other memory of the same length, such as a file's."""
        memory[HEAD:] = self.memory[HEAD:]
        self.memory = memory
        self.entries = _entries(self)


@functools.cache
def ring() -> Ring:
    """The ring of this process and its group, made when it is first asked for.

    To ask torch each time whether the group is still the same would take 0.2 us.
    """
    return Ring()


def forget_ring() -> None:
    """Drop the ring: its group is being closed, or another is opened."""
    leave = ring().leave
    if leave is not None:
        leave()
    ring.cache_clear()


@attrs.frozen
class Operation:
    """One operation of a rank, as its ring has it."""

    number: int  # of this rank's operations, from 1
    name: str
    file: str
    line: int
    brings: str = ""
    state: int = OPEN
    begun: float = 0.0  # seconds of the monotonic clock
    ended: float = 0.0


def operations(memory: Any) -> list[Operation]:
    """The operations in a ring's memory, in their order."""
    each = (_operation(memory, HEAD + i * SLOT.size) for i in range(SLOTS))
    return sorted((one for one in each if one.number), key=lambda one: one.number)


def _operation(memory: Any, at: int) -> Operation:
    ended, begun, number, update, line, *texts = SLOT.unpack_from(memory, at)
    state = OPEN if not ended else ENDED if ended > 0 else FAILED
    name, file, brings = (t.rstrip(b"\0").decode(errors="replace") for t in texts)
    brings = brings if update == NONE else f"update {update}"
    return Operation(number, name, file, line, brings, state, begun, abs(ended))


def _said(memory: Any, at: int) -> str:
    one = _operation(memory, at)
    brings = f" of {one.brings}" * bool(one.brings)
    return f"{one.name}{brings} at {one.file}:{one.line} (#{one.number})"


def _brings(what: dict[str, Any]) -> bytes:
    """`3 leaves, float32 (4, 8)` of a tree as told."""
    for first in what.values():  # one tree in 0.03 us less than by next(iter())
        dtype = getattr(first, "dtype", None)
        return b"" if dtype is None else _shown(len(what), dtype, first.shape)
    return b""


@functools.lru_cache(maxsize=256)
def _shown(count: int, dtype: object, shape: tuple[int, ...]) -> bytes:
    many = f"{count} leaves, " * (count > 1)
    return f"{many}{str(dtype).removeprefix('torch.')} {shape}".encode()
