"""Which device and which backend a rank gets, as a function of what the machine has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from accelx.errors import PlacementError

if TYPE_CHECKING:
    from accelx.records import Env

BACKENDS = {"cuda": "nccl", "xpu": "xccl", "xla": "xla"}  # of other devices: gloo


@attrs.frozen
class Hardware:
    """What this machine has: found by `probe`, written by hand in a test."""

    cuda: int = 0  # devices that work
    xpu: int = 0
    mps: bool = False
    xla: bool = False  # torch_xla is installed and was asked for


def probe(xla: bool = False) -> Hardware:
    """What torch can really use here. Starts no device context."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    kind = found.type if found else ""
    count = torch.accelerator.device_count() if found else 0
    return Hardware(
        cuda=count if kind == "cuda" else 0,
        xpu=count if kind == "xpu" else 0,
        mps=kind == "mps",
        xla=xla,
    )


def choose_device(hardware: Hardware, env: Env) -> str:
    """The device of this rank: cuda, xpu, mps, xla, cpu, in that order.

    On CUDA and XPU the index is the local rank; more local ranks than devices raise
    PlacementError. Several ranks on one MPS device get the CPU: MPS has no collectives.
    """
    for kind, count in (("cuda", hardware.cuda), ("xpu", hardware.xpu)):
        if count:
            return _indexed(kind, count, env)
    if hardware.mps and env.world == 1:
        return "mps"
    return "xla" if hardware.xla else "cpu"


def _indexed(kind: str, count: int, env: Env) -> str:
    if env.local_world > count and env.local_rank >= count:
        raise PlacementError(
            f"each rank wants a {kind} device of its own, but this is local rank "
            f"{env.local_rank} of {env.local_world} and there are {count}; start "
            f'{count} ranks here, or write connect(device="cpu")'
        )
    return f"{kind}:{env.local_rank}"


def choose_backend(device: str) -> str:
    """The backend of torch.distributed for `device`: nccl, xccl, xla or gloo."""
    return BACKENDS.get(device.partition(":")[0], "gloo")


def set_device(device: str) -> None:
    """Make `device` torch's current one, where devices have an index."""
    import torch

    kind, _, index = device.partition(":")
    if kind in ("cuda", "xpu"):
        torch.get_device_module(kind).set_device(int(index or 0))
