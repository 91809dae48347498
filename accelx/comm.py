"""What ranks tell one another, and who waits for whom, as functions of an Env."""

from __future__ import annotations

import functools
import pickle
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import attrs

from accelx.comm_ring import forget_ring
from accelx.comm_rows import gather_rows
from accelx.comm_split import split
from accelx.comm_trees import broadcast, gather, gather_objects, pad, reduce
from accelx.comm_wire import dist, exchange, forget_parts, group, together
from accelx.env_part import along
from accelx.errors import CollectiveError
from accelx.records import Env

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from accelx.records import Axis

__all__ = [
    "barrier",
    "broadcast",
    "crossed",
    "forget_meshes",
    "gather",
    "gather_objects",
    "gather_rows",
    "line",
    "main_first",
    "mesh",
    "on_main",
    "pad",
    "reduce",
    "split",
    "sum_scalars",
]

P = ParamSpec("P")
T = TypeVar("T")


def barrier(env: Env) -> None:
    """Wait here until every rank is here."""
    exchange(env, "barrier", None)


@contextmanager
def main_first(env: Env) -> Generator[None]:
    """`with main_first(env):` runs the body on rank 0, and then on the others.

    For a download or a cache that rank 0 fills. If it fails on rank 0, the others raise
    the same in place of running it. They wait as long as a collective may take.
    """
    together(env, "main_first")
    if not env.main:
        failure = exchange(env, "main_first", None)[0]
        if failure is not None:
            raise failure
        yield
        return
    try:
        yield
    except BaseException as error:
        exchange(env, "main_first", _sendable(error))
        raise
    exchange(env, "main_first", None)


def _sendable(error: BaseException) -> BaseException:
    """The error itself if it survives pickle, or else what it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a user's own exception raises there
        said = "".join(traceback.format_exception(error))
        return CollectiveError(f"main_first wants rank 0 to succeed, but:\n{said}")
    return error


def on_main(
    env: Env, fn: Callable[Concatenate[Env, P], T], *args: P.args, **kwargs: P.kwargs
) -> T | None:
    """`fn(env, *args, **kwargs)` on rank 0, and None at once on the others.

    The Env that `fn` gets is alone: a collective with it raises CollectiveError, where
    it would wait for ever. One process is no exception.
    """
    if not env.main:
        return None
    return fn(attrs.evolve(env, alone=True), *args, **kwargs)


def sum_scalars(env: Env, tensor: Tensor, async_op: bool = False) -> Any:
    """Add a small tensor over all ranks, in place; a handle to wait for, or None.

    For the training step: no check, so every rank must bring the same shape and dtype.
    """
    if env.alone:
        together(env, "sum_scalars")
    if env.world == 1:
        return None
    ours = group(env, "sum_scalars") if env.whole else None  # 1 us
    return dist().all_reduce(tensor, group=ours, async_op=async_op)


def mesh(env: Env) -> DeviceMesh:
    """The ranks laid out on `env.axes`: one and the same mesh each time it is asked.

    With several axes every rank must ask, the first time; `connect` has done so. For a
    part of the ranks it is a slice of the mesh of all.
    Raises CollectiveError where there is no group: one process alone needs no mesh.
    """
    together(env, "mesh")
    group(env, "mesh")
    kind, world = env.device.partition(":")[0], dist().group.WORLD
    if not env.whole:
        return _mesh(env.axes, kind, world)
    return _slice(env.whole, env.axes, kind, world)


def line(env: Env) -> DeviceMesh:
    """The ranks of `env` as a mesh of one axis, outermost first; as `mesh` else."""
    laid = mesh(env)
    return laid if laid.ndim == 1 else _flat(laid, "_".join(a.name for a in env.axes))


def crossed(env: Env) -> DeviceMesh:
    """The ranks of `env` as a mesh of two axes: the outermost, and all others as one.

    As `mesh` else.
    """
    laid = mesh(env)
    if laid.ndim == 2:
        return laid
    outer, *inner = (axis.name for axis in env.axes)
    every = mesh(attrs.evolve(env, axes=env.whole or env.axes, whole=()))
    return _crossed(every, mesh(along(env, outer)), line(along(env, *inner)))


@functools.cache
def _crossed(every: DeviceMesh, outer: DeviceMesh, inner: DeviceMesh) -> DeviceMesh:
    from accelx import _torch

    return _torch.crossed_mesh(every, outer, inner)


@functools.cache
def _flat(laid: DeviceMesh, name: str) -> DeviceMesh:
    from accelx import _torch

    return _torch.flat_mesh(laid, name)


@functools.cache
def _slice(
    whole: tuple[Axis, ...], axes: tuple[Axis, ...], kind: str, world: object
) -> DeviceMesh:
    return _mesh(whole, kind, world)[tuple(axis.name for axis in axes)]


@functools.cache  # DTensor and FSDP2 compare meshes by identity
def _mesh(axes: tuple[Axis, ...], kind: str, group: object) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    shape = tuple(axis.size for axis in axes)
    names = tuple(axis.name for axis in axes)
    return init_device_mesh(kind, shape, mesh_dim_names=names)


def forget_meshes() -> None:
    """Drop the meshes that were made: their group is being closed."""
    _crossed.cache_clear()
    _flat.cache_clear()
    _slice.cache_clear()
    _mesh.cache_clear()
    forget_parts()
    forget_ring()
