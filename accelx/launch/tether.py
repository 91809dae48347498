"""How a process ends with the one that started it, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int, number: signal.Signals) -> None:
    """Have the kernel send signal `number` here when the process `parent` ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), number)


def die_with_pipe(read: int) -> None:
    """Where the kernel sends none: a thread ends this process when the pipe does.

    The other end of the pipe is the launcher's alone, and closed by its end.
    """

    def wait() -> None:
        os.read(read, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="accelx-tether", daemon=True).start()
