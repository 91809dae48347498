"""Which device and which backend a rank gets, as a function of what the machine has."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import attrs

from accelx.errors import PlacementError

if TYPE_CHECKING:
    import torch

    from accelx.records import Env


@attrs.frozen
class Kind:
    """What devices of one kind can do; the defaults are those of an unknown kind."""

    backend: str = "gloo"  # of torch.distributed
    shared: bool = False  # there is one, without a number, and no process group over it
    float64: bool = True
    pinned: bool = False  # host memory that its copies want pinned


KINDS = {
    "cpu": Kind(),
    "cuda": Kind("nccl", pinned=True),
    "xpu": Kind("xccl", pinned=True),
    "tpu": Kind("tpu_dist", float64=False),  # of torch_tpu
    "mps": Kind(shared=True, float64=False),
    "xla": Kind(shared=True),  # of torch_xla, all devices at once
}


def kind_of(device: str) -> Kind:
    """What `device`, such as "cuda:3", can do."""
    return KINDS.get(device.partition(":")[0], Kind())


def has_float64(device: str) -> bool:
    """Whether `device` computes in float64. Of Intel's GPUs (xpu) some do: it is asked.

    Starts the context of such a device.
    """
    return _asked(device) if device.startswith("xpu") else kind_of(device).float64


def widest(device: str) -> torch.dtype:
    """float64 where `device` computes in it, else float32: for sums over ranks."""
    import torch

    return torch.float64 if has_float64(device) else torch.float32


@cache
def _asked(device: str) -> bool:
    import torch

    return bool(torch.xpu.get_device_properties(device).has_fp64)


@attrs.frozen
class Hardware:
    """What this machine has: found by `probe`, written by hand in a test."""

    kind: str = ""  # of the accelerator in torch's words; "" without one
    count: int = 0  # devices of it that work
    xla: bool = False  # torch_xla is installed and was asked for


def probe(xla: bool = False) -> Hardware:
    """What torch can really use here. Starts no device context.

    By torch.accelerator alone: a package that brings a device of its own, such as
    torch_tpu, has its name on torch also where the machine has none.
    """
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if found else 0
    return Hardware(found.type, count, xla) if found and count else Hardware(xla=xla)


def choose_device(hardware: Hardware, env: Env) -> str:
    """The device of this rank: torch's accelerator, or XLA where it was asked for, cpu.

    The index is the local rank; more local ranks than devices raise PlacementError, as
    do several ranks on XLA. Several on one MPS device get the CPU: it has no
    collectives.
    """
    kind = hardware.kind
    if kind and not kind_of(kind).shared:
        return _indexed(kind, hardware.count, env)
    if kind and env.world == 1:
        return kind
    if not hardware.xla:
        return "cpu"
    if env.world > 1:
        raise PlacementError(several(env.world))
    return "xla"


def named_device(device: object, env: Env) -> str:
    """The device that was asked for; one of its kind with the local rank's index.

    Raises TypeError for what is no text, PlacementError for a device that is not here.
    """
    if not isinstance(device, str):
        near = "cpu" if isinstance(device, int) else str(device)
        raise TypeError(
            f'connect(device=...) wants a text such as "cuda:0", got {device!r}; write '
            f'device="{near}"'
        )
    kind, _, index = device.partition(":")
    if kind in ("cpu", "meta", "xla"):
        return device
    here = probe()
    if kind != here.kind or (index and not index.isdecimal()):
        has = f"{here.count} of {here.kind}" if here.kind else "none but the CPU"
        raise PlacementError(
            f"connect(device={device!r}) wants a device that torch can use, but here "
            f'it has {has}; write connect(device="{here.kind or "cpu"}"), or leave it '
            "out"
        )
    if kind_of(kind).shared and env.world > 1:
        raise PlacementError(
            f"{kind} is one device without collectives, but there are {env.world} "
            'ranks; start one, or write connect(device="cpu")'
        )
    if kind_of(kind).shared or (index and int(index) < here.count):
        return device
    if index:
        raise PlacementError(
            f"connect(device={device!r}) wants one of the {here.count} devices here; "
            f'write "{kind}", which is that of the local rank'
        )
    return _indexed(kind, here.count, env)


def _indexed(kind: str, count: int, env: Env) -> str:
    if env.local_world > count and env.local_rank >= count:
        raise PlacementError(
            f"each rank wants a {kind} device of its own, but this is local rank "
            f"{env.local_rank} of {env.local_world} and there are {count}; start "
            f'{count} ranks here, or write connect(device="cpu")'
        )
    return f"{kind}:{env.local_rank}"


def several(world: int) -> str:
    """Why there is no second rank on XLA."""
    return (
        "XLA wants one process, which divides its work over all devices of the host, "
        f"but there are {world} ranks; start one, without torchrun. Each of several "
        "would take itself for the only one, and what they reduce would stay apart; "
        'ranks on the CPU want connect(device="cpu")'
    )


def choose_backend(device: str) -> str:
    """The backend of torch.distributed for `device`: nccl, xccl, tpu_dist or gloo."""
    return kind_of(device).backend


def set_device(env: Env) -> None:
    """Make the device of `env` torch's current one, where devices have an index.

    On XLA: start its runtime, over all devices. Raises PlacementError for several ranks
    there, before a runtime or a group is opened.
    """
    import torch

    kind, _, index = env.device.partition(":")
    if kind == "xla":
        if env.world > 1:
            raise PlacementError(several(env.world))
        from accelx import _xla

        _xla.start()
    elif kind not in ("cpu", "meta") and not kind_of(kind).shared:
        torch.accelerator.set_device_index(int(index or 0))
