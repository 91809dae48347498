"""What holds the memory of this rank."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from accelx.checkpoints.tables import size
from accelx.doctors.text import columns
from accelx.records import Env, check_env
from accelx.state import State, check_state

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MemoryReport", "memory_report"]

LARGEST = 5  # tensors that are named


@attrs.frozen
class Held:
    """What one part of a state holds on this rank, on one kind of device."""

    what: str  # parameters, buffers, gradients, optimizer state, or a slot's name
    device: str
    num_tensors: int
    bytes: int  # of storages, each counted once, where it is first met


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
    named = [] if state is None else list(_named(state))
    held, largest = _counted(named)
    allocated, peak, reserved, capacity = _device(env.device)
    return MemoryReport(
        env.rank,
        env.device,
        held,
        largest,
        _resident(),
        _resident_peak(),
        _host(),
        allocated,
        peak,
        reserved,
        capacity,
    )


def _named(state: State) -> Iterator[tuple[str, str, Tensor]]:
    """(part, name, tensor) of all that a state holds, each part after another."""
    from accelx import tree

    model = state.model
    for name, p in model.named_parameters():
        yield "parameters", name, p
    for name, b in model.named_buffers():
        yield "buffers", name, b
    names = {id(p): name for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if p.grad is not None:
            yield "gradients", f"{name}.grad", p.grad
    for optimizer in state.optimizers:
        for p, kept in optimizer.state.items():
            for path, leaf in tree.flatten(kept):
                if _is_tensor(leaf):
                    yield "optimizer state", f"{names.get(id(p), '?')}{path}", leaf
    for slot, value in state.slots.items():
        for path, leaf in tree.flatten(value):
            if _is_tensor(leaf):
                yield f"slot {slot}", f"{slot}{path}", leaf


def _is_tensor(leaf: object) -> bool:
    from torch import Tensor

    return isinstance(leaf, Tensor)


def _counted(
    named: list[tuple[str, str, Tensor]],
) -> tuple[tuple[Held, ...], tuple[tuple[str, str, int], ...]]:
    from accelx._torch import is_dtensor, local_of, storage_id

    seen, parts = set[int](), dict[tuple[str, str], list[int]]()
    each = list[tuple[str, str, int]]()
    for part, name, tensor in named:
        here = local_of(tensor) if is_dtensor(tensor) else tensor
        if storage_id(here) in seen:
            continue
        seen.add(storage_id(here))
        device = str(here.device)
        count = 0 if here.is_meta else here.untyped_storage().nbytes()
        parts.setdefault((part, device), []).append(count)
        each.append((name, device, count))
    held = [Held(p, d, len(counts), sum(counts)) for (p, d), counts in parts.items()]
    each.sort(key=lambda one: -one[2])
    return tuple(held), tuple(each[:LARGEST])


def _device(device: str) -> tuple[int | None, int | None, int | None, int | None]:
    """Allocated, its peak, reserved, capacity; None for a device without counts."""
    import torch

    kind = device.partition(":")[0]
    if kind not in ("cuda", "xpu"):
        return None, None, None, None
    module: Any = torch.get_device_module(kind)
    return (
        module.memory_allocated(device),
        module.max_memory_allocated(device),
        module.memory_reserved(device),
        module.get_device_properties(device).total_memory,
    )


def _resident() -> int | None:
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:  # not Linux
        return None
    import resource

    return int(pages) * resource.getpagesize()


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
