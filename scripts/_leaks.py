"""What a run of tests has left behind on a Linux machine: processes, shared memory.

A process that is left holds its ports as well; one that is gone can hold none.
"""

import contextlib
import os
from pathlib import Path

MARK = "ACCELX_SUITE"  # in the environment of all that the tests start
SHARED = Path("/dev/shm")


def shared() -> set[str]:
    """Names of the files in shared memory."""
    return {path.name for path in SHARED.iterdir()} if SHARED.is_dir() else set()


def left(mark: str, before: set[str]) -> list[str]:
    """What is wrong after the tests, a line each."""
    found = [f"process {pid} is left: {words}" for pid, words in survivors(mark)]
    new = shared() - before
    used = in_use() if new else set()
    return found + [f"{SHARED / name} is left" for name in sorted(new - used)]


def survivors(mark: str) -> list[tuple[int, str]]:
    """Processes with `mark` in their environment, this one left out."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found.append((int(folder.name), words.decode()[:200]))
    return found


def in_use() -> set[str]:
    """Files in shared memory that a living process has mapped or open."""
    paths: list[str] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            maps = (folder / "maps").read_text().splitlines()
            paths += [line.split()[-1] for line in maps if "/" in line]
            for fd in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):  # closed meanwhile
                    paths.append(str(fd.readlink()))
    return {Path(path).name for path in paths if path.startswith(f"{SHARED}/")}
