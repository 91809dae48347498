"""What this process finds around it: the one file here that asks the system."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs

from accelx.env_detect import detect
from accelx.env_device import choose_backend, choose_device, probe
from accelx.errors import AccelxError
from accelx.launch.machine import Machine, cores, look as machine_of
from accelx.storage_at import SECRET, scrubbed

REQUIRED = (
    *("torch", "attrs", "typing-extensions", "safetensors", "fsspec", "xxhash"),
    "tenacity",
)
OPTIONAL = (
    *("rich", "s3fs", "gcsfs", "pyarrow", "datasets", "torchdata", "torchao"),
    *("deepspeed", "torch_xla", "torch_tpu", "tensorboard", "wandb", "numpy"),
    *("transformers", "accelerate", "lightning-fabric", "torchmetrics", "triton"),
)
SHOWN = (  # variables that change what a run does, beside those of launchers
    *("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES"),
    *("GLOO_SOCKET_IFNAME", "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE"),
    *("NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "PJRT_DEVICE", "PYTHONHASHSEED"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NVML_BASED_CUDA_CHECK", "TMPDIR"),
    *("TORCH_CPP_LOG_LEVEL", "TORCH_DISTRIBUTED_DEBUG", "TORCH_NCCL_BLOCKING_WAIT"),
)
UNSHOWN = re.compile(f"{SECRET.pattern}|jwt|auth|cookie|private", re.IGNORECASE)
LIMITS = {"nofile": "open files", "memlock": "locked memory", "nproc": "processes"}
GROUPS = Path("/sys/fs/cgroup")
DRIVER = Path("/proc/driver/nvidia/version")


class Noted(Mapping[str, str]):
    """A mapping that remembers which of its names were asked for and are set."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self.given = given
        self.read: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        value = self.given[name]
        if value:
            self.read[name] = value
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


def open_ones(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables without those whose name tells of a secret."""
    return {k: scrubbed(v) for k, v in environ.items() if not UNSHOWN.search(k)}


def look(environ: Mapping[str, str]) -> dict[str, Any]:
    """Everything that a report is made of, as plain data. No device is started but
    those that torch asks for their names; nothing is written.
    """
    known = open_ones(environ)
    machine = machine_of(known)
    return {
        "accelx": sys.modules["accelx"].__version__,
        "python": platform.python_version(),
        "system": {
            "name": platform.platform(),
            "machine": platform.machine(),
            "container": _container(),
            "infiniband": Path("/dev/infiniband").exists(),
        },
        "cpu": _cpu(machine),
        "memory": memory(),
        "torch": _torch(),
        "gpus_present": _present(),
        "required": {name: _version(name) for name in REQUIRED},
        "optional": {name: _version(name) for name in OPTIONAL},
        "detected": detected(known),
        "variables": {name: known[name] for name in SHOWN if known.get(name)},
        "limits": _limits(),
        "folders": _folders(),
    }


def detected(environ: Mapping[str, str]) -> dict[str, Any]:
    """What `detect` makes of the variables, which of them it read, or why it cannot."""
    noted = Noted(environ)
    try:
        env = detect(noted)
        xla = "PJRT_DEVICE" in environ and find_spec("torch_xla") is not None
        device = choose_device(probe(xla=xla), env)
    except AccelxError as error:
        return {"error": scrubbed(str(error)), "variables": dict(noted.read)}
    placed = attrs.asdict(attrs.evolve(env, device=device))
    kept = ("rank", "world", "local_rank", "local_world", "node", "nodes")
    return {
        "error": "",
        "launcher": env.launcher,
        **{name: placed[name] for name in kept},
        "rendezvous": env.rendezvous,
        "device": device,
        "backend": choose_backend(device),
        "variables": dict(noted.read),
    }


def _cpu(machine: Machine) -> dict[str, Any]:
    return {
        "usable": len(machine.cpus),  # logical CPUs that this process is bound to
        "present": os.cpu_count(),  # and that there are
        "cores": len(cores(machine.cpus)),
        "nodes": len({cpu.node for cpu in machine.cpus}),  # NUMA
        "quota": machine.quota,  # CPUs' worth of time of a container
    }


def memory() -> dict[str, int | None]:
    """Bytes; None where the system does not say."""
    told = dict(re.findall(r"(\w+):\s+(\d+) kB", _text(Path("/proc/meminfo"))))
    total = int(told["MemTotal"]) * 1024 if "MemTotal" in told else _pages()
    free = int(told["MemAvailable"]) * 1024 if "MemAvailable" in told else None
    limit = _number(GROUPS / "memory.max", GROUPS / "memory/memory.limit_in_bytes")
    used = _number(GROUPS / "memory.current", GROUPS / "memory/memory.usage_in_bytes")
    if limit is not None and total is not None and limit >= total:
        limit = None  # version 1 writes a huge number where there is none
    return {"total": total, "available": free, "limit": limit, "used": used}


def _pages() -> int | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _torch() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    found = torch.accelerator.current_accelerator(check_available=True)
    kind = found.type if found else "cpu"
    asked = {
        "gloo": "is_gloo_available",
        "nccl": "is_nccl_available",
        "mpi": "is_mpi_available",
        "ucc": "is_ucc_available",
        "xccl": "is_xccl_available",
    }
    nccl = dist.is_available() and dist.is_nccl_available()
    there = [n for n, name in asked.items() if getattr(dist, name, lambda: False)()]
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "nccl": _nccl() if nccl else None,
        "driver": _driver(),
        "threads": torch.get_num_threads(),
        "backends": there if dist.is_available() else [],
        "accelerator": kind,
        "devices": _devices(kind),
    }


def _devices(kind: str) -> list[dict[str, Any]]:
    import torch

    if kind not in ("cuda", "xpu"):
        return [{"name": kind}] if kind != "cpu" else []
    module = torch.get_device_module(kind)
    each = [module.get_device_properties(i) for i in range(module.device_count())]
    return [{"name": p.name, "memory": p.total_memory} for p in each]


def _nccl() -> str:
    from torch.cuda import nccl

    return ".".join(map(str, nccl.version()))


def _driver() -> str | None:
    """The version of NVIDIA's driver, as the kernel tells it."""
    found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", _text(DRIVER))
    return found[1] if found else None


def _present() -> int:
    """GPUs of NVIDIA that the system has, whether torch can use them or not."""
    folder = Path("/dev")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sum(re.fullmatch(r"nvidia\d+", name) is not None for name in names)


def _limits() -> dict[str, int | None]:
    """Soft limits of this process; None where there is none."""
    if sys.platform == "win32":
        return {}
    import resource

    found = dict[str, int | None]()
    for name in LIMITS:
        number = getattr(resource, f"RLIMIT_{name.upper()}", None)
        if number is not None:
            soft, _ = resource.getrlimit(number)
            found[name] = None if soft == resource.RLIM_INFINITY else soft
    return found


def _folders() -> dict[str, dict[str, int]]:
    """Bytes in all and free of folders that runs write to."""
    found = dict[str, dict[str, int]]()
    for name, path in (("shm", "/dev/shm"), ("temporary", tempfile.gettempdir())):
        if Path(path).is_dir():
            usage = shutil.disk_usage(path)
            found[name] = {"size": usage.total, "free": usage.free}
    return found


def _container() -> bool:
    marks = (Path("/.dockerenv"), Path("/run/.containerenv"))
    return any(mark.exists() for mark in marks)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _number(*paths: Path) -> int | None:
    text = next((text for path in paths if (text := _text(path))), "")
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # not Linux, or a sandbox without it
        return ""
