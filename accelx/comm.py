"""What ranks tell one another: collectives over trees, as functions of an Env."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from accelx.errors import CollectiveError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from accelx.records import Axis, Env


def mesh(env: Env) -> DeviceMesh:
    """The ranks laid out on `env.axes`: one and the same mesh each time it is asked for.

    Every rank must ask, the first time. Raises CollectiveError where there is no group.
    """
    _together(env, "mesh")
    group = _group(env, "mesh")
    return _mesh(env.axes, env.device.partition(":")[0], group)


@functools.cache  # DTensor and FSDP2 compare meshes by identity
def _mesh(axes: tuple[Axis, ...], kind: str, group: object) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    shape = tuple(axis.size for axis in axes)
    names = tuple(axis.name for axis in axes)
    return init_device_mesh(kind, shape, mesh_dim_names=names)


def forget_meshes() -> None:
    """Drop the meshes that were made: their group is being closed."""
    _mesh.cache_clear()


def sum_scalars(env: Env, tensor: Tensor, async_op: bool = False) -> Any:
    """Add a small tensor over all ranks, in place; returns a handle to wait for, or None.

    For the training step: no check, so every rank must bring the same shape and dtype.
    """
    import torch.distributed as dist

    if env.alone:
        _together(env, "sum_scalars")
    if env.world == 1:
        return None
    return dist.all_reduce(tensor, async_op=async_op)


def _together(env: Env, name: str) -> None:
    if env.alone:
        raise CollectiveError(
            f"{name} wants every rank, but this is inside on_main, where rank {env.rank} "
            f"is alone and would wait for ever; call {name} before or after on_main, "
            "and pass its result in"
        )


def _group(env: Env, name: str) -> object:
    import torch.distributed as dist

    if not dist.is_initialized():
        raise CollectiveError(
            f"{name} wants a process group, but rank {env.rank} of {env.world} has none "
            "open; with several ranks write env = accelx.connect() first, "
            "and one process alone needs no mesh"
        )
    return dist.group.WORLD
