"""How a batch comes from a worker: small tensors as bytes, in the message itself.

torch puts every tensor into shared memory, and the program then asks the worker for
each one's file over a socket: some 0.2 ms a tensor, whatever its size. For larger
tensors, which would be copied several times on their way, that is the better way.

A message never waits for its reader. A worker that were killed while it waits would
leave half a message, and one whose program is killed would wait for good: so all that
workers may send ahead fits into their pipe, and a longer message into shared memory.
"""

from __future__ import annotations

import ctypes
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import attrs
import torch
from torch import Tensor, UntypedStorage

SMALL = 1 << 16  # bytes under a tensor up to which it goes with the message
PIPE, PAGE = 1 << 16, 1 << 12  # bytes of a pipe, which is filled page by page
ONCE = 1 << 14  # bytes that multiprocessing writes at once, with a header
AROUND = 512  # bytes around what is packed, at most


@attrs.frozen(eq=False)
class Parcels:
    """Makes a batch in a worker, and packs it; `ahead` is how many may be under way."""

    collate: Callable[[list[Any]], Any]
    ahead: int

    def __call__(self, items: list[Any]) -> Parcel:
        """The batch of `items`. Raises what cannot be pickled here, where it is seen:
        torch's queue would drop the batch, and the program wait for it.
        """
        out = io.BytesIO()
        _Pickler(out, pickle.HIGHEST_PROTOCOL).dump(self.collate(items))
        room = min(PIPE // self.ahead // PAGE * PAGE, ONCE) - AROUND
        if out.tell() <= room:
            return Parcel(out.getvalue())
        shared = torch.frombuffer(out.getbuffer(), dtype=torch.uint8)
        return Parcel(shared.share_memory_())


@attrs.frozen(eq=False)
class Parcel:
    """A batch that is unpacked where a queue takes it out."""

    data: bytes | Tensor  # (n,) uint8 in shared memory

    def __reduce__(self) -> Any:
        return _unpacked, (self.data,)


def _unpacked(data: bytes | Tensor) -> Any:
    if isinstance(data, bytes):
        return pickle.loads(data)
    view = (ctypes.c_char * data.numel()).from_address(data.data_ptr())
    return pickle.loads(view)


@attrs.frozen(eq=False)
class _Held:
    """The memory under tensors, which pickle keeps one of: views stay views of it."""

    storage: UntypedStorage


class _Pickler(ForkingPickler):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._held: dict[int, _Held] = {}

    def reducer_override(self, obj: Any) -> Any:
        """A plain small tensor by its bytes; all else as torch does it."""
        if type(obj) is _Held:
            data = ctypes.string_at(obj.storage.data_ptr(), obj.storage.nbytes())
            return _storage, (data,)
        if type(obj) is not Tensor or not _plain(obj):
            return NotImplemented
        storage = obj.untyped_storage()
        if not 0 < storage.nbytes() <= SMALL:
            return NotImplemented
        held = self._held.setdefault(storage.data_ptr(), _Held(storage))
        return _tensor, (held, obj.dtype, obj.storage_offset(), obj.shape, obj.stride())


def _plain(tensor: Tensor) -> bool:
    strided = tensor.layout is torch.strided and tensor.device.type == "cpu"
    own = tensor.requires_grad or tensor.is_quantized or tensor.is_nested
    return strided and not (own or tensor.is_conj() or tensor.is_neg())


def _storage(data: bytes) -> UntypedStorage:
    return UntypedStorage.from_buffer(data, byte_order="native", dtype=torch.uint8)


def _tensor(
    storage: UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
) -> Tensor:
    return torch.empty(0, dtype=dtype, device="cpu").set_(
        storage, offset, shape, stride
    )
