"""Every private or version-dependent name of torch, one small function each."""

# Private names are what this file is for.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import socket
import sys
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from accelx.errors import PlacementError

DispatchMode = TorchDispatchMode


def storage_id(tensor: Tensor) -> int:
    """An identity of the storage under `tensor`, also on the meta device."""
    return tensor.untyped_storage()._cdata


def default_store() -> Any:
    """The store of the open default group."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def scale_(tensors: list[Tensor], factor: Tensor | float) -> None:
    """Multiply many tensors in place, in few kernels."""
    torch._foreach_mul_(tensors, factor)  # type: ignore[reportArgumentType]


def norms(tensors: list[Tensor]) -> list[Tensor]:
    """The 2-norm of each tensor, in few kernels."""
    return list(torch._foreach_norm(tensors, 2.0))


def clamp_(tensors: list[Tensor], limit: float) -> None:
    """Clamp many tensors to [-limit, limit] in place, in few kernels."""
    torch._foreach_clamp_min_(tensors, -limit)
    torch._foreach_clamp_max_(tensors, limit)


def in_backward() -> bool:
    """Whether a backward pass is under way in this thread."""
    return torch._C._current_graph_task_id() != -1


def version_of(tensor: Tensor) -> int:
    """How often something was written into a tensor."""
    return tensor._version


def written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments, in lists too, that an operator writes into."""
    found: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        alias = argument.alias_info
        if alias is not None and alias.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += value if isinstance(value, list | tuple) else [value]
    return [t for t in found if isinstance(t, Tensor)]


def copies_mesh(mesh: Any) -> Any:
    """The ranks of a mesh of one dim as copies of one slice, for fully_shard."""
    if not hasattr(mesh, "_unflatten"):
        raise PlacementError(
            'weights that ranks have in part want a newer torch beside "ddp", got '
            f'{torch.__version__}; install "torch>=2.13", or write '
            'shard_model(env, "fsdp2")'
        )
    return mesh._unflatten(0, (mesh.size(), 1), ("copies", "slice"))


def all_to_all(rows: Tensor, into: list[int], out: list[int], group: Any) -> Tensor:
    """Send `out[r]` rows to each rank r, get `into[r]` from it; gradients go back."""
    from torch.distributed import _functional_collectives as collectives

    if rows.requires_grad:
        made = collectives.all_to_all_single_autograd(rows, into, out, group)
    else:
        made = collectives.all_to_all_single(rows, into, out, group)
    return collectives.wait_tensor(made)


def has_hooks(weight: Tensor) -> bool:
    """Whether someone has asked to see the gradients of `weight`."""
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


def has_grad_hooks(weight: Tensor) -> bool:
    """Whether someone would see what autograd brings to `weight`."""
    return bool(weight._backward_hooks)


def hooks_inside(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    """The hooks of each module inside of `module`, by the numbers that torch gives."""
    inside = [m for m in module.modules() if m is not module]
    return tuple((*m._forward_pre_hooks, *m._forward_hooks) for m in inside)


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The submodules, and `model`, that fully_shard was called on."""
    from torch.distributed.fsdp import FSDPModule

    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def fsdp_slices(model: nn.Module) -> list[Any]:
    """The weights in slices that FSDP modules gather and reduce."""
    groups = [g for module in fsdp_modules(model) for g in _fsdp_groups(module)]
    return [p.sharded_param for group in groups for p in group.fsdp_params]


def _fsdp_groups(module: Any) -> list[Any]:
    """What a module gathers at once."""
    state = module._get_fsdp_state()
    # 2.13 allows several groups a module; before, there was one or None
    groups = getattr(state, "_fsdp_param_groups", None)
    each = [state._fsdp_param_group] if groups is None else groups
    return [group for group in each if group is not None]


def fsdp_told(module: Any, loss: Tensor) -> None:
    """Have an FSDP module hear from the loss that its backward pass begins.

    It asks its output, whose hook torch loses where the output is a view and is written
    to (`logits /= 2`; torch 2.13). To hear it twice is as once.
    """
    if loss.requires_grad:
        loss.register_hook(module._get_fsdp_state()._pre_backward)


def fsdp_forget(model: nn.Module) -> None:
    """Make FSDP modules forget a forward or backward pass that was broken off."""
    root = model._get_fsdp_state()  # type: ignore[reportCallIssue]
    # torch 2.13; before the first forward there is nothing that it could reset
    begun = root._is_root is not None and hasattr(root._comm_ctx, "all_gather_state")
    if begun and hasattr(root, "_reset_iter_state"):
        root._reset_iter_state()
    root._state_ctx.post_backward_final_callback_queued = False
    for module in fsdp_modules(model):
        for group in _fsdp_groups(module):
            for p in group.fsdp_params:
                p.unsharded_accumulated_grad = None
                if hasattr(p, "_unsharded_param"):
                    p._unsharded_param.grad = None
        module.reshard()


def prefixed(prefix: str, store: Any) -> Any:
    """A view of `store` that puts `prefix` before each key."""
    from torch.distributed import PrefixStore

    return PrefixStore(prefix, store)


def rendezvous(url: str, rank: int, world: int, timeout: timedelta | None) -> Any:
    """The store at `url`; rank 0 serves it unless a launcher does."""
    from torch.distributed.rendezvous import rendezvous as meet

    wait = {} if timeout is None else {"timeout": timeout}
    store, _, _ = next(meet(url, rank, world, **wait))
    return store


def loopback_store(port: int, world: int, timeout: timedelta | None) -> Any:
    """A store served on 127.0.0.1 alone: by itself torch listens on every interface."""
    from torch.distributed import TCPStore

    listener = socket.create_server(("127.0.0.1", port), backlog=2048)
    wait: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    return TCPStore(
        "127.0.0.1",
        port,
        world,
        is_master=True,
        multi_tenant=False,
        master_listen_fd=listener.detach(),
        **wait,
    )


def group_timeout(group: Any) -> float:
    """Seconds that a collective of `group` may take."""
    from torch.distributed.distributed_c10d import default_pg_timeout

    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    limit: timedelta = getattr(options, "_timeout", default_pg_timeout)
    return limit.total_seconds()


def flight_recorder() -> bytes:
    """What torch itself has recorded of its collectives, as JSON; empty before 2.13."""
    from torch._C import _distributed_c10d as c10d

    dump: Any = getattr(c10d, "_dump_fr_trace_json", None)
    return b"" if dump is None else bytes(dump())


def store_errors() -> tuple[type[Exception], ...]:
    """What a store raises when the one that serves it is gone."""
    from torch.distributed import DistNetworkError, DistStoreError

    return DistNetworkError, DistStoreError


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a DTensor, without importing what defines it (0.5 s)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def mixed(tensors: Iterable[Tensor]) -> bool:
    """Whether some of these are DTensors and others not."""
    return len({is_dtensor(tensor) for tensor in tensors}) > 1


def end_workers(iterator: Any) -> None:
    """Stop the workers behind an iterator of a DataLoader, and wait for them."""
    iterator._shutdown_workers()


def moded() -> bool:
    """Whether a mode sees torch's calls: a default device, a mode of the user's."""
    functions = torch._C._len_torch_function_stack()
    return bool(functions or torch._C._len_torch_dispatch_stack())


def stock_collate() -> bool:
    """Whether `default_collate` does with each type what torch wrote."""
    from torch.utils.data._utils import collate

    stock = 7 if hasattr(collate, "np") else 5  # without NumPy
    made = collate.default_collate_fn_map.values()
    return len(made) == stock and all(f.__module__ == collate.__name__ for f in made)


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is more than a shape, as those of a simulated rank are not."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    fake = module is not None and isinstance(tensor, module.FakeTensor)
    return not fake


def mutates(func: Any) -> bool:
    """Whether an operator, as a dispatch mode sees it, writes into an argument."""
    return func._schema.is_mutable


def name_of(func: Any) -> str:
    """An operator's name without its namespace and overload."""
    return func._schema.name.split("::")[1]


def local_of(tensor: Any) -> Tensor:
    """This rank's slice of a DTensor, without gradients; `to_local` takes 40 us."""
    local = tensor._local_tensor
    plain = type(local) is Tensor  # not one that is still on its way
    return (local if plain else tensor.detach().to_local()).detach()


class _Apart(torch.autograd.Function):
    """Its tensor as it is; a gradient in memory of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[reportIncompatibleMethodOverride]
        return grad.clone()


class _Own(torch.autograd.Function):
    """`_Apart` after `to_local` at once, which takes 25 us and not 48."""

    @staticmethod
    def forward(ctx: Any, weight: Any, placements: Any) -> Tensor:
        ctx.like, ctx.spec = weight._local_tensor, weight._spec
        ctx.placements = placements
        return ctx.like.view_as(ctx.like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[reportIncompatibleMethodOverride]
        from torch.distributed.tensor import DTensor

        spec, placements = ctx.spec, ctx.placements
        own = torch.empty_like(ctx.like).copy_(grad)  # laid out as the weight
        if placements is None and not own.requires_grad:
            made: Any = DTensor
            return made(own, copy.copy(spec), requires_grad=False), None
        whole = {"shape": spec.shape, "stride": spec.stride}
        placements = placements or spec.placements
        return DTensor.from_local(own, spec.mesh, placements, **whole), None


def own_local(weight: Any, grad_placements: Any = None) -> Tensor:
    """This rank's slice of a DTensor, with gradients that microbatches may add to.

    After `to_local` alone torch (2.13) takes the DTensor around a gradient for nobody
    else's, and adds the next one in place: into memory that is also the gradient of
    what was added to this weight, or of a slice of it.
    """
    if type(weight._local_tensor) is Tensor and not torch.compiler.is_compiling():
        return _Own.apply(weight, grad_placements)
    return _Apart.apply(weight.to_local(grad_placements=grad_placements))


def local_box(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: list[int],
    placements: Any,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and global offset of the slice that a rank of a mesh holds of a DTensor."""
    from torch.distributed.tensor import _utils

    size, offset = _utils._compute_local_shape_and_global_offset(
        shape, mesh_shape, coordinate, placements
    )
    return tuple(size), tuple(offset)


def flat_mesh(mesh: Any, name: str) -> Any:
    """The ranks of a mesh of several dims as one dim of that name."""
    return mesh._flatten(name)


def crossed_mesh(every: Any, outer: Any, inner: Any) -> Any:
    """A mesh of two dims out of two of one dim each, both cut from the mesh `every`."""
    join = getattr(type(every), "_concatenate", None)
    if join is None:  # before 2.10; since, torch warns of it
        return every[outer.mesh_dim_names[0], inner.mesh_dim_names[0]]
    return join([outer, inner])
