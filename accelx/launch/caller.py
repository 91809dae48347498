"""How a program starts the launcher for one call, and what ends it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from accelx.errors import SpawnError
from accelx.launch import call

GRACE = 5.0  # seconds from the end of the time limit to SIGKILL
START = "import sys; sys.path.insert(0, {!r}); from accelx.launch.door import main; "


def collect(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    n: int | Literal["auto"],
    timeout: float | None,
) -> list[Any]:
    """Call `fn(*args)` in `n` ranks, as `accelx.spawn` says."""
    call.check_not_loading()
    if n != "auto" and (type(n) is not int or n < 1):
        raise SpawnError(f"n is a number of ranks, 1 or more, got {n!r}; write n=2")
    with tempfile.TemporaryDirectory(prefix="accelx-spawn-") as name:
        folder = Path(name)
        call.pack(folder, fn, args)
        code = _start(folder, n, timeout)
        if code != 0:
            raise SpawnError(call.complaint(folder, code))
        return call.unpack(folder)


def _start(folder: Path, n: int | str, timeout: float | None) -> int:
    root = str(Path(__file__).parents[2])
    words = ["-n", str(n), "--grace", str(GRACE), "--call", str(folder)]
    code = START.format(root) + f"sys.exit(main({words!r}))"
    launcher = subprocess.Popen([sys.executable, "-c", code])
    try:
        return launcher.wait(timeout)
    except subprocess.TimeoutExpired as error:
        late = call.unfinished(folder) or "their launcher"
        raise SpawnError(
            f"the ranks were to end within {timeout:g} s, but {late} had not; write a "
            "larger timeout, or look for a wait that one rank does not come to"
        ) from error
    finally:
        _end(launcher)


def _end(launcher: subprocess.Popen[bytes]) -> None:
    if launcher.poll() is not None:
        return
    launcher.terminate()
    try:
        launcher.wait(GRACE + 5)
    except subprocess.TimeoutExpired:
        launcher.kill()  # the kernel then ends its ranks
        launcher.wait()
