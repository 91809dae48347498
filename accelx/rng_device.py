"""Where the random numbers of a device stand, as bytes, and how they start."""

from __future__ import annotations

from typing import Any

import torch

WORD = 8  # bytes of XLA's state


def seed(device: str, n: int) -> None:
    """Start the device's numbers from `n` where torch.manual_seed does not: on XLA."""
    if _kind(device) == "xla":
        from accelx import _xla

        _xla.seed(n)


def state(device: str) -> bytes:
    """The state of the device's generator; empty for one without a state to be read."""
    kind = _kind(device)
    if kind == "cpu":
        return b""
    if kind == "xla":
        from accelx import _xla

        return _xla.random_state().to_bytes(WORD, "little")
    module = torch.get_device_module(kind)
    if not hasattr(module, "get_rng_state"):
        return b""
    return bytes(module.get_rng_state(*_numbered(device)).tolist())


def restore(device: str, saved: bytes) -> None:
    """Set the generator from what `state` gave; another kind's, told by length, not."""
    kind = _kind(device)
    if len(saved) != len(state(device)):
        return
    if kind == "xla":
        seed(device, int.from_bytes(saved, "little"))
        return
    module: Any = torch.get_device_module(kind)
    tensor = torch.frombuffer(bytearray(saved), dtype=torch.uint8)
    module.set_rng_state(tensor, *_numbered(device))


def _numbered(device: str) -> tuple[str, ...]:
    """The device as an argument: MPS has one, and takes none."""
    return () if _kind(device) == "mps" else (device,)


def _kind(device: str) -> str:
    return device.partition(":")[0]
