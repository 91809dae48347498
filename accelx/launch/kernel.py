"""What the kernel says of memory: how many processes it ended for want of it."""

from __future__ import annotations

import re
from pathlib import Path

GIB = 1 << 30


def oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes of this control group were ended for want of memory.

    From cgroup v2's memory.events, cgroup v1's memory.oom_control, or the count of the
    whole machine; None where the kernel does not say. `root` holds proc/ and sys/. The
    kernel counts before it kills, so a process that is gone has been counted.
    """
    for path in (*_groups(root), root / "proc/vmstat"):
        found = re.search(r"^oom_kill (\d+)$", _text(path), re.MULTILINE)
        if found:
            return int(found[1])
    return None


def gib(size: int) -> str:
    """`11.8 GiB`."""
    return f"{size / GIB:.1f} GiB"


def _groups(root: Path) -> list[Path]:
    """Where the counts of this process's group may be. Innermost group first."""
    found: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            base, name = root / "sys/fs/cgroup", "memory.events"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.oom_control"
        else:
            continue
        # A container sees its own group at the top, by whatever name the host has.
        found += [base / path.strip("/") / name, base / name]
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not Linux, or a sandbox without it
        return ""
