"""What in a report asks for a change, and which: pure, from the report's data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from accelx.text import size

Data = Mapping[str, Any]
GIB = 2**30
OLDEST = (2, 9)  # torch
FILES = 4096  # sockets and files of a rank with loader workers and a store
SHM = GIB  # batches of loader workers pass through it
SPACE = GIB  # temporary files
LOCKED = 64 * 2**20  # what InfiniBand registers at the least
ROOM = 2 * GIB


def advice(data: Data) -> list[dict[str, str]]:
    """Each thing that is not well, and what to do about it."""
    return [
        {"what": what, "remedy": remedy}
        for look in LOOKS
        for what, remedy in look(data)
    ]


Found = Iterator[tuple[str, str]]


def _detection(data: Data) -> Found:
    if data["detected"]["error"]:
        yield data["detected"]["error"], "set or unset the variables that it names"


def _torch(data: Data) -> Found:
    version = data["torch"]["version"]
    parts = version.split("+")[0].split(".")[:2]
    if all(part.isdecimal() for part in parts) and tuple(map(int, parts)) < OLDEST:
        yield f"torch {version} is older than accelx wants", "pip install 'torch>=2.9'"
    if "gloo" not in data["torch"]["backends"]:
        yield "this torch has no gloo", "install a build of torch with distributed"


def _packages(data: Data) -> Found:
    missing = [name for name, found in data["required"].items() if found is None]
    if missing:
        names = " ".join(missing)
        yield f"not installed: {', '.join(missing)}", f"pip install {names}"


def _gpus(data: Data) -> Found:
    here, torch = data["gpus_present"], data["torch"]
    if not here or torch["accelerator"] == "cuda":
        return
    if torch["cuda"] is None:
        yield (
            f"{here} GPUs are here, but torch {torch['version']} cannot use them",
            "install a build of torch for CUDA: pytorch.org/get-started",
        )
    elif data["variables"].get("CUDA_VISIBLE_DEVICES", "").strip("-1, ") == "" and (
        "CUDA_VISIBLE_DEVICES" in data["variables"]
    ):
        yield f"{here} GPUs are hidden", "unset CUDA_VISIBLE_DEVICES"
    else:
        yield (
            f"{here} GPUs are here, but torch does not reach them",
            f"a driver for CUDA {torch['cuda']} or newer; look at nvidia-smi",
        )


def _cpus(data: Data) -> Found:
    cpu, threads = data["cpu"], data["torch"]["threads"]
    worth = cpu["usable"] if cpu["quota"] is None else min(cpu["usable"], cpu["quota"])
    if threads > max(1, worth):
        few = max(1, int(worth))
        yield (
            f"torch uses {threads} threads, but has {worth:g} CPUs' worth of time",
            f"set OMP_NUM_THREADS={few}, or start by python -m accelx.spawn",
        )


def _memory(data: Data) -> Found:
    memory = data["memory"]
    limit, used = memory["limit"], memory["used"]
    if limit is not None and used is not None and limit - used < ROOM:
        yield (
            f"the container has {size(max(0, limit - used))} of its {size(limit)} left",
            "give it more memory, or end what else runs in it",
        )
    elif memory["available"] is not None and memory["available"] < ROOM:
        yield f"{size(memory['available'])} of memory are left", "end what else runs"


def _folders(data: Data) -> Found:
    shm = data["folders"].get("shm")
    if shm is not None and shm["free"] < SHM:
        yield (
            f"/dev/shm has {size(shm['free'])} left, which workers of loaders need",
            "docker run --shm-size=8g; in Kubernetes an emptyDir of medium Memory",
        )
    space = data["folders"].get("temporary")
    if space is not None and space["free"] < SPACE:
        yield (
            f"the folder of temporary files has {size(space['free'])} left",
            "free space there, or set TMPDIR to another disk",
        )


def _limits(data: Data) -> Found:
    files = data["limits"].get("nofile")
    if files is not None and files < FILES:
        yield f"a process may open {files} files", "ulimit -n 65536"
    locked = data["limits"].get("memlock")
    if data["system"]["infiniband"] and locked is not None and locked < LOCKED:
        yield (
            f"InfiniBand is here, but a process may lock {size(locked)} of memory",
            "ulimit -l unlimited",
        )


def _variables(data: Data) -> Found:
    slow = {
        "CUDA_LAUNCH_BLOCKING": "1",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_IB_DISABLE": "1",
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
        "TORCH_NCCL_BLOCKING_WAIT": "1",
    }
    for name, value in slow.items():
        if data["variables"].get(name, "").upper() == value:
            yield f"{name}={value} makes a run slower", f"unset {name}"


LOOKS: tuple[Callable[[Data], Found], ...] = (
    *(_detection, _torch, _packages, _gpus, _cpus, _memory, _folders, _limits),
    _variables,
)
