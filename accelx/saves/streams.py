"""Where each rank's random generators stand, as bytes of a fixed length."""

from __future__ import annotations

import hashlib
import random
import struct
import sys
from typing import Any

import torch
from torch import Tensor

from accelx import rng_device
from accelx.errors import DamagedError
from accelx.saves.memory import view

WORDS = 624  # 32-bit words of a Mersenne twister's state
TORCH = 5056  # bytes of torch's CPU generator
DEVICE = 64  # bytes kept for a device's: CUDA has 16
# python: words, position, has gauss, gauss; numpy: is there, the same; torch; device
FORM = struct.Struct(f"<{WORDS}IIIdI{WORDS}IIId{TORCH}s I{DEVICE}s")
SIZE = FORM.size


def now(device: str) -> Tensor:
    """The state of this process's generators, (1, SIZE) uint8, on the CPU."""
    _, words, gauss = random.getstate()
    python = (*words, int(gauss is not None), gauss or 0.0)
    own = bytes(view(torch.get_rng_state()))
    there = _device_state(device)
    data = FORM.pack(*python, *_numpy(), own, len(there), there)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(1, SIZE)


def _numpy() -> tuple[Any, ...]:
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return (0, *(0,) * WORDS, 0, 0, 0.0)
    _, words, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    return (1, *words.tolist(), position, has_gauss, gauss)


def _device_state(device: str) -> bytes:
    state = rng_device.state(device)
    return state if len(state) <= DEVICE else b""


def rows_for(rank: int, saved: int) -> tuple[int, int]:
    """Which of `saved` rows a rank needs: its own, or all to derive one from."""
    return (rank, rank + 1) if rank < saved else (0, saved)


def restore(rows: Tensor, rank: int, saved: int, device: str) -> None:
    """Set this process's generators from `rows_for(rank, saved)`, (n, SIZE) uint8.

    On as many ranks: to the bit. A rank beyond those that were saved takes the stream
    of rank r modulo their number: as it is if all streams were the same, as ranks that
    share a seed have them, and else one of its own that is derived from it.
    Effect: the global generators of Python, NumPy (if it is imported), torch, device.
    """
    row = rows[0 if rank < saved else rank % saved]
    if rank >= saved and not bool((rows == rows[0]).all()):
        _derived(bytes(view(row)), rank, device)
        return
    if len(row) != SIZE:
        raise DamagedError(
            f"the random streams want {SIZE} bytes a rank, got {len(row)}; leave them "
            'out: load_state(..., only=("model.**", "optim.**", "slots.**", "step", '
            '"skipped"))'
        )
    fields = FORM.unpack(bytes(view(row)))
    python, rest = fields[: WORDS + 3], fields[WORDS + 3 :]
    _check(python[WORDS], rest[WORDS + 1], rest[-3])
    random.setstate((3, python[: WORDS + 1], python[-1] if python[-2] else None))
    there, *numbers = rest[: WORDS + 4]
    if there and "numpy" in sys.modules:
        _set_numpy(numbers)
    torch.set_rng_state(torch.frombuffer(bytearray(rest[-3]), dtype=torch.uint8))
    if rest[-2]:
        rng_device.restore(device, rest[-1][: rest[-2]])


def _check(python: int, numpy: int, own: bytes) -> None:
    """Refuse a place outside a generator's words: NumPy and torch would read there."""
    left, seeded, place = struct.unpack_from("<iiQ", own, 8)  # of THGeneratorState
    torchs = seeded == 1 and 0 < left <= WORDS and place + left <= WORDS + 1
    if max(python, numpy) > WORDS or not torchs:
        raise DamagedError(
            f"the random streams want places in {WORDS} words, got {python}, {numpy}, "
            f"and {place} with {left} left; they were tampered with: take another "
            "checkpoint"
        )


def _set_numpy(numbers: list[Any]) -> None:
    numpy: Any = sys.modules["numpy"]
    words = numpy.array(numbers[:WORDS], dtype=numpy.uint32)
    numpy.random.set_state(("MT19937", words, *numbers[WORDS:]))


def _derived(row: bytes, rank: int, device: str) -> None:
    """Start every generator from a number of the stream's and the rank's own."""
    word = hashlib.blake2b(row + rank.to_bytes(8, "little")).digest()[:8]
    seed = int.from_bytes(word, "little")
    random.seed(seed)
    torch.manual_seed(seed >> 1)
    rng_device.seed(device, seed >> 1)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
