"""When other threads have come to rest, so that Python may end.

A thread of gloo lets go of a tensor that it has sent a little after the program may go
on. Where that was the last hold on it, the thread asks for Python's lock; and where
Python ends just then, the process aborts after its last step with "terminate called
without an active exception" (pytorch#190489; seen with torch 2.13 on Python 3.11).
"""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

PAUSE = 0.001  # seconds in which a thread that waits for Python's lock gets it
LIMIT = 0.5  # seconds; of 214 ends at a load of 7 to 15 on 2 cores one took 0.37
STATUS = re.compile(r"State:\s+(\w)|ctxt_switches:\s+(\d+)")


def rest(limit: float = LIMIT, tasks: Path = Path("/proc/self/task")) -> bool:
    """Wait until the threads that are not Python's sleep, and have slept for a while.

    Returns whether they do, after `limit` seconds at most. Where the kernel does not
    say, it is enough that those go on that wait for Python's lock.
    """
    end, before = time.monotonic() + limit, None
    while time.monotonic() < end:
        time.sleep(PAUSE)
        now = _standing(tasks)
        # One that waited for the lock at the look before has run since.
        if now == before and all(state == "S" for state, *_ in now.values()):
            return True
        before = now
    return False


def _standing(tasks: Path) -> dict[str, list[str]]:
    """Thread -> its state, and how often it has given up a core."""
    ours = {str(thread.native_id) for thread in threading.enumerate()}
    ours.add(str(threading.get_native_id()))  # in a fork, Python 3.11 has the old one
    found: dict[str, list[str]] = {}
    for task in tasks.glob("*"):
        if task.name not in ours and (text := _text(task / "status")):
            found[task.name] = [a or b for a, b in STATUS.findall(text)]
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the thread has ended
        return ""
