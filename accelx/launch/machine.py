"""What this machine offers its ranks: CPUs by core and NUMA node, quota, GPUs."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import attrs

from accelx.launch.kernel import quota
from accelx.launch.system import LINUX, offered

SYSTEM = Path("/sys/devices/system")


@attrs.frozen(order=True)
class Cpu:
    """One logical CPU and where it sits; CPUs of one core are hardware threads."""

    node: int
    package: int
    core: int
    number: int


@attrs.frozen
class Machine:
    """What the plan is made from: found by `look`, written by hand in a test."""

    host: str = "localhost"
    system: str = "linux"  # as sys.platform
    has: frozenset[str] = LINUX  # what its `os` offers
    cpus: tuple[Cpu, ...] = (Cpu(0, 0, 0, 0),)  # that this process may use
    quota: float | None = None  # CPUs' worth of time that the container may use
    gpus: int = 0  # CUDA devices that torch will use


def look(environ: Mapping[str, str]) -> Machine:
    """This machine, without importing torch or starting a device."""
    return Machine(
        host=socket.gethostname(),
        system=sys.platform,
        has=offered(),
        cpus=_cpus(),
        quota=quota(),
        gpus=_gpus(environ),
    )


def cores(cpus: tuple[Cpu, ...]) -> list[tuple[Cpu, ...]]:
    """Logical CPUs grouped into cores, neighbours on one NUMA node side by side."""
    key = attrs.astuple
    return [tuple(g) for _, g in groupby(sorted(cpus), lambda cpu: key(cpu)[:3])]


def shares(cpus: tuple[Cpu, ...], num_ranks: int) -> list[tuple[int, ...]]:
    """CPU numbers of each rank: whole cores, disjoint, sizes apart by one core at most.

    Empty where there are fewer cores than ranks: then nothing is bound.
    """
    whole = cores(cpus)
    each, extra = divmod(len(whole), num_ranks)
    if not each:
        return []
    ends = [(rank + 1) * each + min(rank + 1, extra) for rank in range(num_ranks)]
    return [
        tuple(sorted(cpu.number for core in whole[start:end] for cpu in core))
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def near(cpus: tuple[Cpu, ...], num_ranks: int) -> list[tuple[int, ...]]:
    """CPU numbers of each rank: one whole NUMA node, which neighbours share.

    Where there are fewer ranks than nodes, each has several. No CPU is left out.
    """
    nodes = [
        [cpu.number for cpu in group]
        for _, group in groupby(sorted(cpus), lambda cpu: cpu.node)
    ]
    found: list[tuple[int, ...]] = []
    for rank in range(num_ranks):
        low = rank * len(nodes) // num_ranks
        high = max(low + 1, (rank + 1) * len(nodes) // num_ranks)
        found.append(tuple(sorted(n for node in nodes[low:high] for n in node)))
    return found


def usable_gpus(devices: int, visible: str | None, build: str | None) -> int:
    """How many CUDA devices torch will see.

    `devices` is what the machine has, `visible` is CUDA_VISIBLE_DEVICES, and `build` is
    the label of torch's version (`cpu` of 2.13.0+cpu; None where there is none).
    """
    if build is not None and not build.startswith("cu"):
        return 0
    if visible is None:
        return devices
    count = 0
    for word in (word.strip() for word in visible.split(",")):
        if word.isdecimal() and int(word) >= devices:
            break  # CUDA stops at the first entry that names no device
        if not word or word.startswith("-"):
            break
        count += 1
    return count if devices else 0


def _gpus(environ: Mapping[str, str]) -> int:
    folder = Path("/dev")
    paths = folder.iterdir() if folder.is_dir() else iter(())
    devices = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in paths)
    if not devices:
        return 0
    from importlib.metadata import PackageNotFoundError, version

    try:
        _, _, label = version("torch").partition("+")
    except PackageNotFoundError:  # a build without metadata: torch itself will say
        label = ""
    return usable_gpus(devices, environ.get("CUDA_VISIBLE_DEVICES"), label or None)


def _cpus() -> tuple[Cpu, ...]:
    if not hasattr(os, "sched_getaffinity"):
        return tuple(Cpu(0, 0, number, number) for number in range(os.cpu_count() or 1))
    nodes = _nodes()
    allowed = sorted(os.sched_getaffinity(0))
    return tuple(_cpu(number, nodes.get(number, 0)) for number in allowed)


def _cpu(number: int, node: int) -> Cpu:
    place = SYSTEM / f"cpu/cpu{number}/topology"
    package = _number(place / "physical_package_id", 0)
    return Cpu(node, package, _number(place / "core_id", number), number)


def _nodes() -> dict[int, int]:
    found: dict[int, int] = {}
    for folder in SYSTEM.glob("node/node[0-9]*"):
        for part in _text(folder / "cpulist").split(","):
            first, _, last = part.partition("-")
            if first:
                numbers = range(int(first), int(last or first) + 1)
                found.update(dict.fromkeys(numbers, int(folder.name[4:])))
    return found


def _number(path: Path, default: int) -> int:
    text = _text(path)
    return int(text) if text.isdecimal() else default


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # not Linux, or a sandbox without /sys
        return ""
