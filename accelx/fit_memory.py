"""What a device has in use, at its peak, and left: as functions that read it."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch

from accelx import cgroup

FULL = (  # what allocators say where they have no error type of their own
    "out of memory",
    "can't allocate memory",
    "DefaultCPUAllocator",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "RESOURCE_EXHAUSTED",
)


def is_full(error: BaseException) -> bool:
    """Whether `error` says that memory has run out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error) for s in FULL)


@attrs.frozen
class Meter:
    """How the memory of one device is read; all in bytes."""

    start: Callable[[], int]  # forget the peak; what is in use now
    peak: Callable[[], int]  # the most that was in use since then
    room: Callable[[bool], int]  # what could be had; True: limits with an error, too


def meter(device: str) -> Meter | None:
    """The Meter of `device`, such as "cuda:0" or "cpu"; None where nothing tells.

    Accelerators that have `mem_get_info` are read through it; there the room is what
    is free now, and an allocator's error is the only limit. A CPU is read from /proc:
    the peak is that of this process, the room is what the machine and the control group
    have left, and, if asked, what RLIMIT_AS and RLIMIT_DATA leave.
    """
    if torch.device(device).type == "cpu":
        return _CPU if Path("/proc/self/clear_refs").exists() else None
    found = module_of(device)
    if not hasattr(found, "mem_get_info"):
        return None

    def start() -> int:
        found.reset_peak_memory_stats(device)
        return found.memory_reserved(device)

    return Meter(
        start,
        lambda: found.max_memory_reserved(device),
        lambda limits: found.mem_get_info(device)[0],
    )


def module_of(device: str) -> Any:
    """torch's module for the kind of `device`, `torch.cuda` say; None for a CPU."""
    kind = torch.device(device).type
    return None if kind == "cpu" else getattr(torch, kind, None)


def let_go(device: str, cycles: bool = False) -> None:
    """Give memory that nothing uses back to the device. Effect on the whole process.

    With `cycles` also that of objects which hold one another, as errors do.
    """
    if cycles:
        gc.collect()
    found = module_of(device)
    if hasattr(found, "empty_cache"):
        found.empty_cache()
    if torch.device(device).type == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)


def _start() -> int:
    Path("/proc/self/clear_refs").write_text("5")  # see proc_pid_clear_refs(5)
    return _status("VmRSS")


def _status(key: str) -> int:
    return _kilobytes(Path("/proc/self/status"), key)


def _kilobytes(path: Path, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _room(limits: bool) -> int:
    rooms = [_kilobytes(Path("/proc/meminfo"), "MemAvailable"), *_of_group()]
    if limits:
        import resource

        for kind, used in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
            most = resource.getrlimit(getattr(resource, kind))[0]
            if most != resource.RLIM_INFINITY:
                rooms.append(most - _status(used))
    return min(rooms)


def _of_group(root: Path = cgroup.ROOT) -> list[int]:
    """What the control groups around this process leave, where they have a limit."""
    rooms: list[int] = []
    for folder in cgroup.folders("memory", root):
        most, used, stat = (
            cgroup.text(folder / new) or cgroup.text(folder / old)
            for new, old in (
                ("memory.max", "memory.limit_in_bytes"),
                ("memory.current", "memory.usage_in_bytes"),
                ("memory.stat", "memory.stat"),
            )
        )
        if most.isdecimal() and used.isdecimal():
            # file pages are given back when memory is wanted
            cached = re.search(r"^(?:file|total_cache) (\d+)$", stat, re.MULTILINE)
            rooms.append(int(most) - int(used) + int(cached[1] if cached else 0))
    return rooms


_CPU = Meter(_start, lambda: _status("VmHWM"), _room)
