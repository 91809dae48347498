"""Every name of torch_xla, one small function each; imported when a run is on XLA.

torch_xla's own runtime holds which devices there are and whether tensors lie over all
of them (SPMD); nothing is kept here.
"""

# The checker runs without torch_xla; private names are what this file is for.
# pyright: reportMissingImports=false, reportPrivateUsage=false

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from accelx.errors import MissingExtraError, PlacementError

AXIS = "device"  # the one axis of the mesh of this process's devices


def start() -> None:
    """Start the runtime. With several devices tensors lie over all of them from now on.

    An effect on the whole process, not to be undone; torch_xla notes it in a variable
    of its own, XLA_USE_SPMD. Raises MissingExtraError without torch_xla,
    PlacementError for several hosts.
    """
    runtime = _runtime()
    if runtime.process_count() > 1:
        raise PlacementError(
            "accelx runs XLA in one process with all devices of one host, but the "
            f"runtime has {runtime.process_count()} processes; start the program on "
            "one host"
        )
    if devices() > 1 and not runtime.is_spmd():
        runtime.use_spmd()


def devices() -> int:
    """How many devices this process has."""
    return int(_runtime().addressable_runtime_device_count())


def spread() -> bool:
    """Whether a tensor may lie over several devices."""
    return bool(_runtime().is_spmd())


def cut(wait: bool = False) -> None:
    """Run what was asked for so far: operations are noted until then, not done.

    With `wait` it is done on return; otherwise the devices are at work. Random numbers
    go on where they were: by itself torch_xla starts others, and a run would depend on
    how often it was looked at.
    """
    stands = random_state()
    import torch_xla

    torch_xla.sync(wait=wait)
    seed(stands)


def slice_dim(shape: tuple[int, ...]) -> int | None:
    """The first dimension that the devices divide, or else the longest.

    None where it would leave a device without a row.
    """
    count = devices()
    even = next((d for d, n in enumerate(shape) if n and n % count == 0), None)
    if even is not None:
        return even
    longest = max(range(len(shape)), key=shape.__getitem__, default=None)
    return None if longest is None or not _fills(shape[longest], count) else longest


def _fills(rows: int, count: int) -> bool:
    """Whether slices of equal length, the last one shorter, are as many as `count`."""
    return -(-rows // -(-rows // count)) == count if rows else False


def lay(tensor: Tensor, dim: int | None) -> None:
    """Lay `tensor` over the devices in slices along `dim`; None: whole on each.

    Does nothing where tensors lie on one device.
    """
    if not spread():
        return
    import torch_xla

    spec = tuple(AXIS if d == dim else None for d in range(tensor.dim()))
    how = _mesh(devices()).get_op_sharding(spec)
    # spmd.mark_sharding also makes a wrapper, which we drop: 400 us in place of 1
    torch_xla._XLAC._xla_mark_sharding(tensor, how)


def put(thing: Any) -> Any:
    """A batch's tensor on the devices, its rows divided over them; uneven ones too."""
    there = thing.to("xla")
    if isinstance(there, Tensor) and there.dim() and there.size(0) >= devices():
        lay(there, 0)
    return there


def host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, of slices put together there: nothing is compiled.

    A plain `.cpu()` compiles a program for each tensor in slices, each time.
    """
    tensor = tensor.detach()
    if not spread():
        return tensor.cpu()
    from torch_xla.distributed import spmd

    cut(wait=True)
    sliced = spmd.wrap_if_sharded(tensor)
    if sliced is tensor:
        return tensor.cpu()
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    for shard in sliced.local_shards:
        if shard.indices is ...:  # whole on each
            return shard.data.clone()
        at = tuple(shard.indices)
        made[at] = shard.data[tuple(slice(s.stop - s.start) for s in at)]  # no padding
    return made


def number(value: Tensor | float, dtype: torch.dtype) -> Tensor:
    """A scalar, (), that is an input of what is compiled, whatever its value.

    torch_xla takes a 0 or 1 without a dimension for a constant and compiles once more.
    """
    return torch.as_tensor(value, dtype=dtype).reshape(1).to("xla").squeeze(0)


def seed(n: int) -> None:
    """Start the devices' random numbers from `n`; torch.manual_seed does not."""
    _runtime()
    import torch_xla

    torch_xla.manual_seed(n)


def random_state() -> int:
    """Where the devices' random numbers stand: an integer of 64 bits, unsigned."""
    _runtime()
    from torch_xla.core import xla_model

    return int(xla_model.get_rng_state())


@cache
def _mesh(count: int) -> Any:
    """The devices in a row. torch_xla keeps what it computes of one on the object."""
    from torch_xla.distributed import spmd

    return spmd.Mesh(list(range(count)), (count,), (AXIS,))


def _runtime() -> Any:
    try:
        from torch_xla import runtime
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "the device xla wants torch_xla, which is not installed "
            f"({error}); write pip install 'accelx[xla]' in an environment of its own: "
            "it brings torch 2.9"
        ) from None
    except ImportError as error:  # built for another torch
        raise MissingExtraError(
            "the device xla wants the torch that torch_xla was built for, 2.9, got "
            f"torch {torch.__version__} ({error}); write pip install 'accelx[xla]' in "
            "an environment of its own"
        ) from None
    return runtime
