"""Where the ranks' output goes: straight to the screen, or through here on its way."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import attrs

from accelx.comm_hang import forget
from accelx.errors import SpawnError
from accelx.launch.plan import Plan

Log = BinaryIO | None
END = re.compile(rb"(\r?\n|\r)")


@attrs.define(eq=False)
class Stream:
    """One output stream of one rank, read through a pipe."""

    rank: int
    source: int  # file descriptor to read
    screen: int  # 1 or 2
    prefix: bytes
    log: BinaryIO | None
    line: bytes = b""  # begun and not ended


def wanted(plan: Plan) -> bool:
    """Whether output has to pass through the launcher."""
    return plan.prefix or plan.log_dir is not None


def open_logs(plan: Plan, ranks: Iterable[int], part: str = "") -> list[Log]:
    """A log file for each of `ranks`, emptied; Nones without `--log-dir`.

    `part` is a folder in that of the logs.
    """
    if plan.log_dir is None:
        return [None for _ in ranks]
    folder = Path(plan.log_dir, part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failure.json").unlink(missing_ok=True)
        for rank in ranks:
            forget(folder, range(rank, rank + 1))
        names = (folder / f"rank-{rank}.log" for rank in ranks)
        return [name.open("wb", buffering=0) for name in names]
    except OSError as error:
        raise SpawnError(
            f"--log-dir wants a folder that can be written, got {plan.log_dir!r} "
            f"({error.strerror}); write another, such as --log-dir logs"
        ) from error


def prefix_of(plan: Plan, rank: int, world: int) -> bytes:
    """`[3] `, as wide for every rank."""
    width = len(str(world - 1))
    return f"[{rank:>{width}}] ".encode() if plan.prefix else b""


def pump(stream: Stream) -> bool:
    """Pass on what can be read now; False when the rank has closed its end."""
    data = _read(stream)
    if data:
        _pass_on(stream, data)
    return data != b""


def finish(stream: Stream) -> None:
    """Pass on what is left, a last line without an end too."""
    while data := _read(stream):
        _pass_on(stream, data)
    if stream.line:
        put(stream.screen, stream.prefix + stream.line + b"\n")
    os.close(stream.source)


def _read(stream: Stream) -> bytes | None:
    try:
        return os.read(stream.source, 1 << 16)
    except BlockingIOError:
        return None


def _pass_on(stream: Stream, data: bytes) -> None:
    write_log(stream, data)
    if not stream.prefix:
        put(stream.screen, data)
        return
    *parts, stream.line = END.split(stream.line + data)
    lines = zip(parts[::2], parts[1::2], strict=True)
    # A progress bar ends its states by a carriage return: each is a line of its own.
    shown = (
        stream.prefix + line + b"\n" for line, end in lines if line or end != b"\r"
    )
    put(stream.screen, b"".join(shown))


def write_log(stream: Stream, data: bytes) -> None:
    """Add to the rank's log. A full disk ends the log, not the run."""
    if stream.log is None:
        return
    try:
        stream.log.write(data)
    except OSError as error:
        put(2, f"accelx.spawn: log of rank {stream.rank} ends: {error}\n".encode())
        stream.log = None


def put(screen: int, data: bytes) -> None:
    """Write all of `data`; a reader that has gone (`| head`) is no error of a rank."""
    with contextlib.suppress(BrokenPipeError):
        while data:
            data = data[os.write(screen, data) :]
