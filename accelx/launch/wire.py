"""How the launcher and its agent, two processes, talk: lines of JSON over sockets."""

from __future__ import annotations

import contextlib
import json
import select
import socket
from typing import Any

import attrs


@attrs.define(eq=False)
class Wire:
    """One end of it."""

    end: socket.socket
    heard: bytes = b""  # read, and not yet asked for


def pair() -> tuple[Wire, Wire]:
    """Two ends that belong together."""
    ours, theirs = socket.socketpair()
    return Wire(ours), Wire(theirs)


def say(wire: Wire, **words: Any) -> None:
    """Send one line. The other side may be gone: reading says that."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        wire.end.sendall(json.dumps(words).encode() + b"\n")


def hear(wire: Wire, wait: float | None = 0) -> dict[str, Any] | None:
    """The next line, waited for so many seconds, or for ever; None if none has come.

    Raises EOFError when the other side has closed its end.
    """
    while b"\n" not in wire.heard:
        ready, _, _ = select.select([wire.end], [], [], wait)
        if not ready:
            return None
        try:
            data = wire.end.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError
        wire.heard += data
    line, _, wire.heard = wire.heard.partition(b"\n")
    return json.loads(line)
