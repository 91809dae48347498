"""How what ranks print reaches the caller's own output, where that is no file of its.

In a notebook `sys.stdout` leads to the cell, and what a child process writes does not.
"""

from __future__ import annotations

import codecs
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TextIO

import attrs

TICK = 0.2  # seconds; a process that a rank has left behind may hold a stream open


@attrs.define(eq=False)
class Shown:
    """A pipe from the launcher, and the stream of this process that shows it."""

    source: int  # file descriptor to read
    stream: TextIO
    decoder: codecs.IncrementalDecoder


def elsewhere() -> tuple[TextIO | None, TextIO | None]:
    """stdout and stderr where they lead away from this process's; else None."""
    streams = ((sys.stdout, 1), (sys.stderr, 2))
    out, err = (None if _own(stream, fd) else stream for stream, fd in streams)
    return out, err


def pipes(
    launcher: subprocess.Popen[bytes], streams: Sequence[TextIO | None]
) -> list[Shown]:
    """What is to be read of a launcher that was started with a PIPE for each stream."""
    make = codecs.getincrementaldecoder("utf-8")
    both = zip((launcher.stdout, launcher.stderr), streams, strict=True)
    return [
        Shown(pipe.fileno(), stream, make("replace"))
        for pipe, stream in both
        if pipe is not None and stream is not None
    ]


def wait(
    launcher: subprocess.Popen[bytes], shown: Sequence[Shown], timeout: float | None
) -> int:
    """Show what is written until the launcher ends; its exit code.

    Raises subprocess.TimeoutExpired after `timeout` seconds.
    """
    limit = None if timeout is None else time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for one in shown:
            os.set_blocking(one.source, False)
            selector.register(one.source, selectors.EVENT_READ, one)
        while selector.get_map() and launcher.poll() is None:
            left = _left(launcher, limit, timeout)
            for key, _ in selector.select(TICK if left is None else min(TICK, left)):
                if not _show(key.data):
                    selector.unregister(key.fd)
        for key in list(selector.get_map().values()):
            while _show(key.data):
                pass
    return launcher.wait(_left(launcher, limit, timeout))


def _left(
    launcher: subprocess.Popen[bytes], limit: float | None, timeout: float | None
) -> float | None:
    """Seconds to the limit; None without one."""
    if limit is None or timeout is None:
        return None
    left = limit - time.monotonic()
    if left <= 0 and launcher.poll() is None:
        raise subprocess.TimeoutExpired(launcher.args, timeout)
    return max(0.0, left)


def _show(one: Shown) -> bool:
    """Pass on what can be read now; False when there is no more."""
    try:
        data = os.read(one.source, 1 << 16)
    except BlockingIOError:
        return False
    text = one.decoder.decode(data, final=not data)
    if text:
        one.stream.write(text)
        one.stream.flush()
    return data != b""


def _own(stream: TextIO | None, fd: int) -> bool:
    """Whether the stream writes where a child process does."""
    try:
        return stream is None or stream.fileno() == fd
    except (AttributeError, OSError, ValueError):  # a stream need not be a file
        return False
