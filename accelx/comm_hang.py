"""What a rank leaves in a folder for whoever asks why it hangs, and how that is read.

`rank-3.ops` is the ring of its operations, always current; `rank-3.stack` has the
Python stacks of its threads, from when nothing had happened for as long as a collective
may take, or from a SIGQUIT; `rank-3.flight.json` is what torch has recorded itself.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from accelx.comm_ring import HEAD, LENGTH, Operation, Ring, operations, ring

if TYPE_CHECKING:
    from accelx.records import Env

MAGIC = b"accelx-ops-2"
# magic, rank, world, pid, whether it has left, wall minus monotonic clock, host
WHO = struct.Struct("<16sIIIId128s")
EARLY = 0.9  # of a collective's timeout: torch may end the process at its end
LOOKS = 20  # within that time
NAME = re.compile(r"rank-(\d+)\.(ops|stack|flight\.json)")


@attrs.frozen
class Left:
    """What one rank has left."""

    rank: int
    world: int
    pid: int = 0
    host: str = ""
    ended: bool = False  # it closed its group
    ahead: float = 0.0  # seconds of the wall clock over the monotonic one
    operations: tuple[Operation, ...] = ()
    stack: str = ""  # as faulthandler writes it, the last dump at the end
    looked: float = 0.0  # by the wall clock, when it was written
    flight: str = ""  # JSON


def leave(env: Env, folder: str, limit: float) -> None:
    """From now on leave in `folder` what this rank does; `limit` in seconds.

    Effects: files; a thread that looks now and then; SIGQUIT writes stacks, and is the
    launcher's to ask where that is ours.
    """
    mine, root = ring(), Path(folder)
    if mine.leave is not None:  # connected before
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        if env.main:
            forget(root, range(env.world, sys.maxsize))  # of a larger run
        mine.move(_memory(root / f"rank-{env.rank}.ops", env))
        stack = (root / f"rank-{env.rank}.stack").open("w")
    except OSError as error:
        raise ValueError(
            f"connect(reports=...) wants a folder that can be written, got {folder!r} "
            f"({error.strerror}); write another, or none"
        ) from error
    asks = env.launcher != "accelx" and hasattr(faulthandler, "register")
    if asks:
        own = signal.getsignal(signal.SIGQUIT) not in (signal.SIG_DFL, None)
        faulthandler.register(signal.SIGQUIT, stack, all_threads=True, chain=own)
    over = threading.Event()
    watch = threading.Thread(
        target=_watch, args=(mine, stack, limit, over), name="accelx-hang", daemon=True
    )
    watch.start()

    def go() -> None:
        over.set()
        watch.join()
        if asks:
            faulthandler.unregister(signal.SIGQUIT)
        stack.close()
        WHO.pack_into(mine.memory, 0, *_who(env, ended=True))

    mine.leave = go


def forget(folder: Path, ranks: range) -> None:
    """Remove what ranks of those numbers have left."""
    for path in folder.iterdir():
        found = NAME.fullmatch(path.name)
        if found and int(found[1]) in ranks:
            path.unlink(missing_ok=True)


def _memory(path: Path, env: Env) -> mmap.mmap:
    for old in (path, path.with_suffix(".flight.json")):
        old.unlink(missing_ok=True)  # cut, it would kill whoever still writes into it
    with path.open("xb+") as file:
        file.write(bytes(LENGTH))  # of a hole a full disk would tell by a SIGBUS
        file.flush()
        memory = mmap.mmap(file.fileno(), LENGTH)
    WHO.pack_into(memory, 0, *_who(env, ended=False))
    return memory


def _who(env: Env, ended: bool) -> tuple[Any, ...]:
    ahead, host = time.time() - time.monotonic(), socket.gethostname().encode()
    return MAGIC, env.rank, env.world, os.getpid(), ended, ahead, host


def _watch(mine: Ring, stack: Any, limit: float, over: threading.Event) -> None:
    """Write once where the program stands each time that nothing happens for long."""
    last = began = time.monotonic()
    told = None
    while not over.wait(min(30.0, limit / LOOKS)):
        each = operations(mine.memory)
        last = max((max(one.begun, one.ended) for one in each), default=began)
        if last != told and time.monotonic() - last > EARLY * limit:
            told = last
            faulthandler.dump_traceback(stack, all_threads=True)
            _write_flight(Path(stack.name))


def _write_flight(stack: Path) -> None:
    from accelx._torch import flight_recorder

    if data := flight_recorder():
        stack.with_suffix(".flight.json").write_bytes(data)


def read(folder: Path) -> list[Left]:
    """What the ranks have left there, in their order; empty where nothing is."""
    found = (NAME.fullmatch(path.name) for path in folder.iterdir())
    ranks = sorted({int(name[1]) for name in found if name and name[2] == "ops"})
    return [_left(folder / f"rank-{rank}.ops") for rank in ranks]


def _left(path: Path) -> Left:
    data = path.read_bytes()
    if len(data) != LENGTH or not data.startswith(MAGIC):
        return Left(int(NAME.fullmatch(path.name)[1]), 0)  # type: ignore[reportOptionalSubscript]
    _, rank, world, pid, ended, ahead, host = WHO.unpack_from(data, 0)
    flight, stack = path.with_suffix(".flight.json"), path.with_suffix(".stack")
    return Left(
        rank,
        world,
        pid,
        host.rstrip(b"\0").decode(errors="replace"),
        bool(ended),
        ahead,
        tuple(operations(data)),
        stack.read_text(errors="replace") if stack.exists() else "",
        stack.stat().st_mtime if stack.exists() else 0.0,
        flight.read_text(errors="replace") if flight.exists() else "",
    )


assert WHO.size <= HEAD
