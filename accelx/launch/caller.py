"""How a program starts the launcher for one call, and what ends it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from accelx.errors import SpawnError
from accelx.launch import call
from accelx.launch.shown import Shown, elsewhere, pipes, wait

GRACE = 5.0  # seconds from the end of the time limit to SIGKILL
START = "import sys; sys.path.insert(0, {!r}); from accelx.launch.door import main; "


def collect(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    n: int | Literal["auto"],
    timeout: float | None,
    prefix: bool | None = None,
) -> list[Any]:
    """Call `fn(*args)` in `n` ranks, as `accelx.spawn` says.

    What a rank raises is the `error` of a SpawnError.
    """
    call.check_not_loading()
    if n != "auto" and (type(n) is not int or n < 1):
        raise SpawnError(f"n is a number of ranks, 1 or more, got {n!r}; write n=2")
    words = ["-n", str(n), "--grace", str(GRACE)]
    if prefix or (prefix is None and elsewhere() != (None, None)):
        words.append("--prefix")
    return launched(fn, args, words, timeout)


def launched(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    words: Sequence[str],
    timeout: float | None = None,
) -> list[Any]:
    """Call `fn(*args)` in the ranks of a launcher with these options."""
    with tempfile.TemporaryDirectory(prefix="accelx-spawn-") as name:
        folder = Path(name)
        call.pack(folder, fn, args)
        code = _start(folder, words, timeout)
        if code != 0:
            raise call.complaint(folder, code)
        return call.unpack(folder)


def _start(folder: Path, words: Sequence[str], timeout: float | None) -> int:
    root = str(Path(__file__).parents[2])
    code = START.format(root) + f"sys.exit(main({[*words, '--call', str(folder)]!r}))"
    streams = elsewhere()
    out, err = (None if stream is None else subprocess.PIPE for stream in streams)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=out, stderr=err) as launcher:
        shown = pipes(launcher, streams)
        try:
            return wait(launcher, shown, timeout)
        except subprocess.TimeoutExpired as error:
            late = call.unfinished(folder) or "their launcher"
            raise SpawnError(
                f"the ranks were to end within {timeout:g} s, but {late} had not; "
                "write a larger timeout, or look for a wait that one rank does not "
                "come to"
            ) from error
        finally:
            _end(launcher, shown)


def _end(launcher: subprocess.Popen[bytes], shown: Sequence[Shown]) -> None:
    if launcher.poll() is not None:
        return
    try:
        launcher.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            wait(launcher, shown, GRACE + 5)
    finally:
        launcher.kill()  # if it has not ended; the kernel then ends its ranks
        launcher.wait()
