"""What holds the memory of this rank."""

from __future__ import annotations

import sys
from typing import Any

import attrs

from accelx.doctors.text import columns
from accelx.fit_held import Held, device_use, held_by, resident
from accelx.records import Env, check_env
from accelx.state import State, check_state
from accelx.text import size

__all__ = ["MemoryReport", "memory_report"]


@attrs.frozen(repr=False)
class MemoryReport:
    """What `memory_report` found, in bytes. Prints as a table."""

    rank: int
    device: str
    held: tuple[Held, ...]
    largest: tuple[tuple[str, str, int], ...]  # name, device, bytes
    process: int | None  # resident in host memory now
    process_peak: int | None
    host: int | None  # of the machine, or of the container where that is less
    allocated: int | None  # of the device, by tensors; None without one
    allocated_peak: int | None
    reserved: int | None  # of the device, by torch's allocator
    capacity: int | None  # of the device

    def of(self, what: str) -> int:
        """Bytes of one part, on all devices."""
        return sum(one.bytes for one in self.held if one.what == what)

    @property
    def other(self) -> int | None:
        """Bytes of the device in tensors that no part of the state holds."""
        if self.allocated is None:
            return None
        mine = sum(one.bytes for one in self.held if one.device != "cpu")
        return max(0, self.allocated - mine)

    @property
    def data(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return attrs.asdict(self)

    def __repr__(self) -> str:
        rows = [(h.what, h.device, h.num_tensors, size(h.bytes)) for h in self.held]
        if self.other is not None:
            what = "activations and others"
            rows.append((what, self.device, "", size(self.other)))  # type: ignore[reportArgumentType]
        lines = [f"rank {self.rank} on {self.device}"]
        lines += ["", *columns("part device >tensors >size", rows)] if rows else []
        big = [(name, device, size(count)) for name, device, count in self.largest]
        lines += ["", *columns("largest device >size", big)] if big else []
        return "\n".join([*lines, "", *_totals(self)])


def _totals(report: MemoryReport) -> list[str]:
    def said(count: int | None) -> str:
        return "unknown" if count is None else size(count)

    host = (
        f"host    {said(report.process)} resident, peak {said(report.process_peak)}, "
        f"of {said(report.host)}"
    )
    if report.allocated is None:
        return [host]
    return [
        host,
        f"device  {said(report.allocated)} in tensors, peak "
        f"{said(report.allocated_peak)}, {said(report.reserved)} reserved, of "
        f"{said(report.capacity)}",
    ]


def memory_report(env: Env, state: State | None = None) -> MemoryReport:
    """What holds memory on this rank: parts of the state, process and device.

    Counted are storages, so ties and views count once, of sharded tensors this rank's
    slice, and of gradients the bucket that they are views of. The peak of the device
    is since the process began, or since torch's `reset_peak_memory_stats`. Says nothing
    of other ranks: print it on each. Looks only: no collective, no effect. Raises
    SpentStateError on a spent state.
    """
    check_env("memory_report", env)
    if state is not None:
        check_state("memory_report", state)
    held, largest = ((), ()) if state is None else held_by(state)
    allocated, peak, reserved, capacity = device_use(env.device)
    return MemoryReport(
        env.rank,
        env.device,
        held,
        largest,
        resident(),
        _resident_peak(),
        _host(),
        allocated,
        peak,
        reserved,
        capacity,
    )


def _resident_peak() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _host() -> int | None:
    from accelx.doctors.look import memory

    found = memory()
    known = [n for n in (found["total"], found["limit"]) if n is not None]
    return min(known, default=None)
