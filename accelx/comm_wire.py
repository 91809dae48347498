"""How values cross between ranks: headers by pickle, tensors as bytes."""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import attrs

from accelx.comm_ring import ring
from accelx.env_part import parts
from accelx.errors import CollectiveError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from accelx.records import Axis, Env

ALIGN = 16  # bytes of the widest dtype, complex128: pieces can be viewed where they lie


@attrs.frozen
class Spec:
    """What a rank tells of a tensor before it sends it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    cpu: bool
    grad: bool = False  # whether it is part of a graph

    @property
    def bytes(self) -> int:
        """How much of a buffer it takes."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return -(-size // ALIGN) * ALIGN


@attrs.frozen
class _Header:
    """What each rank sends first, so that a mismatch is an error and not a hang."""

    name: str
    value: bytes | None
    error: str = ""


def dist() -> Any:
    """torch.distributed, which its own annotations cover in part."""
    import torch.distributed

    return torch.distributed


def together(env: Env, name: str) -> None:
    """Refuse a collective of a rank that is alone."""
    if env.alone:
        raise CollectiveError(
            f"{name} wants every rank, but this is inside on_main, where rank "
            f"{env.rank} is alone and would wait for ever; call {name} before or after "
            "on_main, and pass its result in"
        )


def group(env: Env, name: str) -> Any:
    """The open process group."""
    if not dist().is_initialized():
        raise CollectiveError(
            f"{name} wants a process group, but rank {env.rank} of {env.world} has "
            "none open; write env = accelx.connect() first (one process alone has none "
            "and needs none)"
        )
    world = dist().group.WORLD
    return world if not env.whole else part(env.whole, _names(env), world)


def _names(env: Env) -> tuple[str, ...]:
    return tuple(axis.name for axis in env.axes)


@functools.lru_cache(maxsize=32)  # a group holds sockets and threads
def part(
    whole: tuple[Axis, ...],
    names: tuple[str, ...],
    world: object,
    backend: str | None = None,
) -> Any:
    """This rank's group of those that differ along `names` alone, made once by all."""
    mine = None
    for ranks in parts(whole, names):
        made = dist().new_group(ranks, backend=backend)
        if dist().get_rank() in ranks:
            mine = made
    return mine


def forget_parts() -> None:
    """Drop the groups that were made: the one they belong to is being closed."""
    part.cache_clear()


def exchange(
    env: Env, name: str, value: Any, key: Callable[[Any], object] | None = None
) -> list[Any]:
    """Every rank's `value`, by pickle, in rank order.

    `name` says which collective this is: where ranks meet in different ones, or a value
    does not pickle, all of them raise CollectiveError. With `key` the value is what a
    rank tells of its tree, and `key` what must agree of a leaf.
    """
    together(env, name)
    if env.world == 1:
        return [value]
    ours = group(env, name)
    headers: list[Any] = [None] * env.world
    header, tree = _header(name, value), value if key is not None else None
    with ring().begin(env, name, tree, lambda: _compared(tree, key)):
        dist().all_gather_object(headers, header, group=ours)
    _check(name, headers)
    return [pickle.loads(header.value) for header in headers]


def _compared(
    tree: dict[str, Any] | None, key: Callable[[Any], object] | None
) -> dict[str, tuple[str, str]]:
    """Of each leaf what ranks in lockstep compare, and how it is shown."""
    if tree is None or key is None:
        return {}
    return {f"tree{path}": (repr(key(x)), shown(x)) for path, x in tree.items()}


def shown(leaf: Any) -> str:
    """A leaf as a rank tells of it, in words."""
    if isinstance(leaf, Spec):
        return f"{str(leaf.dtype).removeprefix('torch.')} {leaf.shape}"
    return f"{type(leaf).__name__} {leaf!r:.60}"


def _header(name: str, value: Any) -> _Header:
    try:
        return _Header(name, pickle.dumps(value))
    except (
        Exception
    ) as error:  # told to every rank, which would wait for ever otherwise
        return _Header(name, None, f"{type(error).__name__}: {error}")


def _check(name: str, headers: list[_Header]) -> None:
    shown = grouped([header.name for header in headers])
    if len(shown) > 1:
        places = ", ".join(f"{what} on {ranks}" for what, ranks in shown.items())
        raise CollectiveError(
            f"every rank must call the same collective, but this was {places}; "
            "look for a branch on the rank around one of them"
        )
    for rank, header in enumerate(headers):
        if header.value is None:
            raise CollectiveError(
                f"{name} wants values that pickle, but on rank {rank} one does not "
                f"({header.error}); send plain data in its place"
            )


def grouped(texts: Sequence[str]) -> dict[str, str]:
    """Which ranks say what: {"gather": "ranks 0, 2", "reduce": "rank 1"}."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(rank)
    return {
        text: f"rank{'s' * (len(who) > 1)} {', '.join(map(str, who))}"
        for text, who in ranks.items()
    }


def wire_device(env: Env) -> str:
    """Where tensors must lie for the backend to send them."""
    return "cpu" if env.backend in (None, "gloo") else env.device


def spec_of(tensor: Tensor) -> Spec:
    """What other ranks must know of `tensor`."""
    import torch

    cpu, grad = tensor.device.type == "cpu", tensor.requires_grad
    grad = grad and torch.is_grad_enabled()
    return Spec(tensor.dtype, tuple(tensor.shape), cpu, grad)


def pack(env: Env, tensors: Sequence[Tensor], size: int) -> Tensor:
    """One buffer of `size` bytes, shape (size,), uint8, with the tensors one by one.

    As bytes every dtype travels on every backend, float8 and bool too.
    """
    import torch

    buffer = torch.zeros(size, dtype=torch.uint8, device=wire_device(env))
    at = 0
    for tensor in tensors:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        buffer[at : at + data.numel()] = data.to(buffer.device)
        at += spec_of(tensor).bytes
    return buffer


def unpack(env: Env, buffer: Tensor, specs: Sequence[Spec]) -> list[Tensor]:
    """The tensors of `specs` that `pack` put into `buffer`, each in its own memory."""
    made: list[Tensor] = []
    at = 0
    for spec in specs:
        size = math.prod(spec.shape) * spec.dtype.itemsize
        data = buffer[at : at + size].view(spec.dtype).reshape(spec.shape)
        made.append(data.to("cpu" if spec.cpu else env.device, copy=True))
        at += spec.bytes
    return made


def gather_bytes(env: Env, buffer: Tensor) -> list[Tensor]:
    """Every rank's buffer; all of one size."""
    import torch

    if env.world == 1:
        return [buffer]
    pieces = [torch.empty_like(buffer) for _ in range(env.world)]
    ours = group(env, "gather")
    with ring().begin(env, "gather"):
        dist().all_gather(pieces, buffer, group=ours)
    return pieces


def is_tensor(leaf: Any) -> TypeGuard[Tensor]:
    """Whether a leaf is a tensor of this rank alone; a DTensor is refused."""
    import torch

    from accelx._torch import is_dtensor

    if isinstance(leaf, torch.Tensor) and is_dtensor(leaf):
        raise CollectiveError(
            "collectives of a tree want this rank's own tensors, but one of shape "
            f"{tuple(leaf.shape)} is a DTensor, which is sharded already; "
            "write .full_tensor() or .to_local()"
        )
    return isinstance(leaf, torch.Tensor)
