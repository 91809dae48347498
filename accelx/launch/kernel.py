"""What the kernel says of this control group: memory it ran out of, CPU time it has."""

from __future__ import annotations

import re
from pathlib import Path

from accelx import cgroup

GIB = 1 << 30


def oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes of this control group were ended for want of memory.

    From cgroup v2's memory.events, cgroup v1's memory.oom_control, or the count of the
    whole machine; None where the kernel does not say. `root` holds proc/ and sys/. The
    kernel counts before it kills, so a process that is gone has been counted.
    """
    names = ("memory.events", "memory.oom_control")
    groups = cgroup.folders("memory", root)
    paths = [folder / name for folder in groups for name in names]
    for path in (*paths, root / "proc/vmstat"):
        found = re.search(r"^oom_kill (\d+)$", cgroup.text(path), re.MULTILINE)
        if found:
            return int(found[1])
    return None


def quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that this control group may use; None without a limit.

    The least of its own and those of the groups around it, in cgroup v2 or v1.
    """
    limits: list[float] = []
    for folder in cgroup.folders("cpu", root):
        most, _, period = cgroup.text(folder / "cpu.max").partition(" ")
        if not most:
            most = cgroup.text(folder / "cpu.cfs_quota_us")
            period = cgroup.text(folder / "cpu.cfs_period_us")
        if most.isdecimal() and period.isdecimal():
            limits.append(int(most) / int(period))
    return min(limits, default=None)


def gib(size: int) -> str:
    """`11.8 GiB`."""
    return f"{size / GIB:.1f} GiB"
