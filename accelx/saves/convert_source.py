"""What another tool's checkpoint holds, in torch's words, its tensors still unread."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from accelx import storage
from accelx.errors import AccelxError, CheckpointError, DamagedError
from accelx.saves.boxes import Ints
from accelx.saves.check import extent
from accelx.saves.dtypes import KINDS, NAMES
from accelx.saves.memory import view
from accelx.storage import Store

LENGTH = 8  # bytes that say how long a safetensors header is
HEADER = 100_000_000  # bytes: safetensors' own limit


@attrs.frozen(eq=False)
class Lazy:
    """A tensor in a file, known by its header."""

    dtype: str  # torch's name
    shape: Ints
    read: Callable[[], Tensor]


@attrs.frozen(eq=False)
class Pickled:
    """A value that lies in a file as torch.save wrote it."""

    read: Callable[[], Any]


@attrs.frozen(eq=False)
class Optim:
    """An optimizer's state_dict. Its parameters go by name, or by position."""

    where: str  # the file or key that it was in
    groups: Sequence[Mapping[str, Any]]
    state: Mapping[Any, Mapping[str, Any]]


@attrs.frozen(eq=False)
class Source:
    """A checkpoint of another tool; what is in `left_out` says why."""

    model: Mapping[str, Any]
    optims: Sequence[Optim] = ()
    schedules: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    scaler: Mapping[str, Any] | None = None
    left_out: tuple[tuple[str, str], ...] = ()


def held(tensor: Tensor) -> Lazy:
    """A tensor that is in memory, or mapped into it."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in KINDS or tensor.layout is not torch.strided:
        raise CheckpointError(
            f"a checkpoint wants dense tensors, got one of {tensor.dtype} and "
            f"{tensor.layout}; save the plain tensors that it is made of"
        )
    return Lazy(dtype, tuple(tensor.shape), lambda: tensor)


def value(leaf: Any) -> Any:
    """What a leaf stands for, read now."""
    return leaf.read() if isinstance(leaf, Lazy | Pickled) else leaf


def torch_load(store: Store, name: str, offset: int = 0, size: int = -1) -> Any:
    """What torch.save wrote: a file, mapped where it is local, or a part of one.

    With weights_only, so that nothing in it runs. Raises CheckpointError.
    """
    where = f"{store.url}/{name}"
    try:
        if size < 0 and store.local:
            path = storage.path_of(store, name)
            return torch.load(path, "cpu", weights_only=True, mmap=True)
        length = size if size >= 0 else storage.sizes(store)[name] or 0
        data = bytearray(length)
        with storage.reading(store, name) as read:
            read(offset, memoryview(data))
        return torch.load(io.BytesIO(data), "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{where} wants to hold tensors and plain data, got something that "
            f"torch.load(weights_only=True) refuses: {str(error)[:200]}; save it as "
            "tensors, numbers and text"
        ) from None
    except AccelxError:
        raise
    except Exception as error:  # of a damaged file torch may raise anything
        raise DamagedError(
            f"{where} wants to be what torch.save wrote, got {str(error)[:200]}; it is "
            "damaged: take another checkpoint"
        ) from error


@attrs.frozen(eq=False)
class Block:
    """One tensor of a safetensors file, and where it lies in a larger one."""

    name: str
    offsets: Ints | None  # of its first element; None where it is whole
    lazy: Lazy


def safetensors(store: Store, name: str) -> list[Block]:
    """The tensors of a safetensors file. Reads its header; runs nothing."""
    what = f"{store.url}/{name}"
    size = storage.sizes(store).get(name) or 0
    start, header = _header(store, name, size, what)
    about = header.pop("__metadata__", {})
    try:
        cut = json.loads(about.get("DCP_SHARDING_INFO", "{}"))
        return [
            _block(store, name, key, one, cut.get(key), (start, size))
            for key, one in header.items()
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(what, f"the header's {error}") from None


def _header(
    store: Store, name: str, size: int, what: str
) -> tuple[int, dict[str, Any]]:
    with storage.reading(store, name) as read:
        length = bytearray(min(LENGTH, size))
        read(0, memoryview(length))
        count = int.from_bytes(length, "little")
        if len(length) < LENGTH or count > min(HEADER, size - LENGTH):
            raise _damaged(what, f"a header of {count} bytes in {size}")
        text = bytearray(count)
        read(LENGTH, memoryview(text))
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(what, f"a header that is no JSON ({str(error)[:80]})") from None
    if not isinstance(header, dict):
        raise _damaged(what, "a header that is no object")
    return LENGTH + count, header  # type: ignore[reportUnknownVariableType]


def _block(
    store: Store, file: str, name: str, one: Any, cut: Any, span: tuple[int, int]
) -> Block:
    what, (start, size) = f"{store.url}/{file}", span
    if one["dtype"] not in NAMES:
        raise CheckpointError(
            f"{what} holds {name!r} as {one['dtype']!r}, and accelx knows "
            f"{', '.join(NAMES)}; cast it before it is saved"
        )
    dtype = NAMES[one["dtype"]]
    shape = extent(one["shape"], dtype, what)
    low, high = one["data_offsets"]
    count = torch.Size(shape).numel() * KINDS[dtype].width
    if high - low != count or low < 0 or start + high > size:
        raise _damaged(what, f"{name!r} at bytes {low} to {high}, and not {count}")

    def read() -> Tensor:
        out = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
        if count:
            with storage.reading(store, file) as fill:
                fill(start + low, view(out))
        return out

    offsets = tuple(int(n) for n in cut["saved_offsets"]) if cut else None
    if offsets is not None and len(offsets) != len(shape):
        raise _damaged(what, f"{name!r} {list(shape)} at {list(offsets)}")
    return Block(name, offsets, Lazy(dtype, shape, read))


def _damaged(what: str, came: str) -> DamagedError:
    return DamagedError(
        f"{what} wants to be a safetensors file, got {came}; it is damaged: take "
        "another checkpoint"
    )
