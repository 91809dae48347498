"""Private and version-dependent names of torch that simulated ranks need."""

# Private names are what this file is for.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from accelx._torch import has_numbers, is_dtensor, name_of


def fake_group(rank: int, world: int) -> None:
    """Open a default process group of `world` ranks that sends nothing."""
    from torch.distributed import init_process_group
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", rank=rank, world_size=world, store=FakeStore())


def knows_shapes() -> bool:
    """Whether torch's collectives run on tensors without numbers: 2.9's do not."""
    known = torch._C._dispatch_has_kernel_for_dispatch_key
    return known("c10d::broadcast_", "Meta")


def own_of(tensor: Any) -> Tensor:
    """What this rank holds of a tensor: its slice of a DTensor, or all."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def dtensor() -> type:
    """The class of DTensors."""
    from torch.distributed.tensor import DTensor

    return DTensor


STAGES = "to other stages"
_COLLECTIVES = {  # part of an operator's name: (name, whether its result is the whole)
    "allgather": ("gathered", True),
    "all_gather": ("gathered", True),
    "reduce_scatter": ("reduced, in slices", False),
    "allreduce": ("reduced", False),
    "all_reduce": ("reduced", False),
    "alltoall": ("exchanged", False),
    "all_to_all": ("exchanged", False),
    "broadcast": ("broadcast", False),
    "send": (STAGES, False),
}


def collective(func: Any, args: Any, kwargs: Any) -> tuple[str, int] | None:
    """A collective's name, and the bytes that a rank sends in it; None if it is none.

    Of n bytes that come together over g ranks a rank sends (g - 1) / g n, twice that in
    a sum of which all get all (Thakur, Rabenseifner, Gropp 2005).
    """
    if func.namespace not in ("c10d", "_c10d_functional"):
        return None
    known = [kind for part, kind in _COLLECTIVES.items() if part in name_of(func)]
    given = [*args, *kwargs.values()]
    size = max(map(_size, given), default=0)
    if not known or not size:
        return None
    (name, whole), *_ = known
    group = next((one for one in map(_group, given) if one is not None), None)
    if name == STAGES:
        return None if votes(func, args) else (name, size)
    if group is None:
        return name, size
    ranks = group.size()
    if name == "exchanged":
        return name, size - _stays(given, size, group)
    if whole and func.namespace == "_c10d_functional":
        size *= ranks  # the result is not among the arguments
    return name, size * (2 if name == "reduced" else 1) * (ranks - 1) // ranks


def _stays(given: list[Any], size: int, group: Any) -> int:
    """What of an exchange a rank sends to itself, by rows to each rank: the last list.

    Where there is none, as much as to any other.
    """
    lists = [one for one in given if isinstance(one, list) and one]  # type: ignore[reportUnknownVariableType]
    rows: Any = lists[-1] if lists else []
    if not rows or isinstance(rows[0], Tensor):
        return size // group.size()
    return size * rows[group.rank()] // max(sum(rows), 1)


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


def _group(value: Any) -> Any:
    """The process group that an argument is, or names; None for any other."""
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import _resolve_process_group

    if isinstance(value, str) and value.lower() not in ("sum", "avg", "max", "min"):
        return _resolve_process_group(value)  # type: ignore[arg-type]
    if isinstance(value, torch.ScriptObject):
        boxed = "ProcessGroup" in str(value._type())  # an op is boxed, too
        return ProcessGroup.unbox(value) if boxed else None
    return value if isinstance(value, ProcessGroup) else None


def numberless() -> Any:
    """A mode whose tensors have shapes and no numbers; real ones mix with them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def one_mode(mode: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments, with tensors of `mode` as those of another that is among them.

    An operation takes those of one mode alone, beside tensors with numbers.
    """
    given = [*args, *kwargs.values()]
    flat = [x for one in given for x in (one if isinstance(one, list) else (one,))]  # type: ignore[reportUnknownVariableType]
    others = [x.fake_mode for x in flat if getattr(x, "fake_mode", mode) is not mode]
    if not others:
        return args, kwargs

    def shape(leaf: Any) -> Any:
        if getattr(leaf, "fake_mode", None) is not mode:
            return leaf
        like = {"dtype": leaf.dtype, "device": leaf.device}
        with others[0]:
            return torch.empty_strided(leaf.shape, leaf.stride(), **like)

    return tree_map(shape, (args, kwargs))


@contextmanager
def receiving(mode: Any, told: Callable[[Tensor], None]) -> Generator[None]:
    """Have what stages receive into be tensors of `mode`; tell of each."""
    from torch.distributed.pipelining import stage

    real = stage._make_tensor_from_meta

    def made(*args: Any) -> Tensor:
        with mode:
            tensor = real(*args)
        told(tensor)
        return tensor

    stage._make_tensor_from_meta = made
    try:
        yield
    finally:
        stage._make_tensor_from_meta = real


def votes(func: Any, args: Any) -> list[Tensor]:
    """The numbers by which stages ask one another, once, if all know their shapes."""
    p2p = func.namespace == "c10d" and name_of(func) in ("send", "recv_")
    return list(args[0]) if p2p and all(map(has_numbers, args[0])) else []


def identity(storage: Any) -> int:
    """What tells a storage from all others that are alive."""
    return storage._cdata


def made(func: Any, result: Any, mode: Any) -> Iterator[Any]:
    """Storages of a result that are new memory.

    Left out is what an operation hands on of its arguments, and tensors of another
    mode: DTensor tries an operation on those to learn its shape.
    """
    given = result if isinstance(result, tuple) else (result,)
    for one, new in zip(given, _new(func), strict=False):
        for tensor in one if isinstance(one, list) else (one,):  # type: ignore[reportUnknownVariableType]
            own = new and isinstance(tensor, Tensor)
            if own and getattr(tensor, "fake_mode", mode) is mode:
                yield tensor.untyped_storage()


@functools.cache
def _new(func: Any) -> tuple[bool, ...]:
    """Of each result of an operation, whether it is no view of an argument."""
    return tuple(one.alias_info is None for one in func._schema.returns)


def moved(func: Any, args: Any) -> Iterator[Any]:
    """Storages that FSDP2 fills in place, where there are numbers: here it copies."""
    if func.namespace == "fsdp" and "all_gather_copy_in" in name_of(func):
        yield args[1].untyped_storage()


def touched(tensor: Tensor) -> bool:
    """Whether anything was written in place since it was made."""
    return tensor._version > 0


@contextmanager
def resizing(*told: Callable[[Any], None]) -> Generator[None]:
    """Tell of each storage that is made larger or smaller: no operation says it."""
    resize = torch.UntypedStorage.resize_

    def resized(storage: Any, size: int) -> Any:
        result = resize(storage, size)
        for one in told:
            one(storage)
        return result

    torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


@contextmanager
def alike() -> Generator[None]:
    """Have `torch.chunk` make one tensor for all parts of a shape: without numbers
    they are the same, and FSDP2 asks for as many as there are ranks for each weight.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    chunk = torch.chunk

    def chunked(tensor: Any, chunks: int, dim: int = 0) -> Any:
        length = tensor.size(dim)
        if not isinstance(tensor, FakeTensor) or not length:
            return chunk(tensor, chunks, dim)
        size = -(-length // chunks)
        many, rest = divmod(length, size)
        last = [tensor.narrow(dim, many * size, rest)] if rest else []
        return (*[tensor.narrow(dim, 0, size)] * many, *last)

    torch.chunk = chunked  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.chunk = chunk
