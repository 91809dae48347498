"""Weights, gradients and optimizer state in slices over ranks (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accelx import _torch, comm, deferred, dtypes
from accelx.engines import copies, placed, plain
from accelx.engines.placed import Placed, Plan
from accelx.errors import PlacementError, UnusedParameterError
from accelx.match import select
from accelx.records import Engine, Precision

if TYPE_CHECKING:
    from accelx.state import State


def place(model: nn.Module, plan: Plan) -> Placed:
    """Shard a module that every rank holds; rank 0's numbers count.

    What is on the meta device gets memory for this rank's slices alone, not yet set.
    """
    dtypes.cast(model, plan.precision)
    blank = copies.try_blueprint(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            copies.from_main(tensor, plan.env.device)
    for _, buffer in model.named_buffers():
        if not buffer.is_meta:
            buffer.data = buffer.data.to(plan.env.device)
    result = _sharded(model, plan, blank)
    copies.furnish(model, plan.env.device)
    return result


def place_deferred(factory: Callable[[], nn.Module], plan: Plan) -> Placed:
    """Shard a model while it is made: no rank ever holds it whole.

    The numbers are those of calling `factory` on rank 0; those that a later pass
    overwrites are neither made nor sent. Peak memory is this rank's slices,
    `deferred.BUDGET` and the largest weight.
    """
    model, recorder = deferred.build(factory)
    placed.claim(model, plan.env, plan.fills)
    blank = placed.filled(model, plan.blank)
    sources = copies.tensors(model)
    copies.empty(model)
    dtypes.cast(model, plan.precision)
    result = _sharded(model, plan, copies.try_blueprint(model))
    made: dict[int, Any] = {}
    for name, source in sources:
        if id(source) not in made:
            if source.is_meta or id(source) in blank:
                like = copies.get(model, name)
                made[id(source)] = copies.unset(like, plan.env.device)
            else:
                made[id(source)] = _made(model, name, source, recorder, plan)
        copies.put(model, name, made[id(source)])
    return result


def _made(
    model: nn.Module, name: str, source: Tensor, recorder: deferred.Recorder, plan: Plan
) -> Any:
    """Rank 0's `source`, in full or, for a weight, this rank's slice of it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    like = copies.get(model, name)
    full = recorder.full(source) if plan.env.main else torch.empty(source.shape)
    full = full.to(device=plan.env.device, dtype=like.dtype)
    if not isinstance(like, DTensor):
        full = full.clone()
        copies.from_main(full, plan.env.device)
        return full
    slices = distribute_tensor(full, like.device_mesh, like.placements)
    return nn.Parameter(slices, like.requires_grad)


def _sharded(model: nn.Module, plan: Plan, blank: Any) -> Placed:
    from torch.distributed.fsdp import fully_shard

    _shardable(model, plan)
    policy = _policy(plan.precision)
    mesh = comm.mesh(plan.env)
    blocks = [m for _, m in select(model, plan.blocks) if not _tied(m, model)]
    for block in reversed(blocks):  # innermost first
        fully_shard(block, mesh=mesh, **policy(False))
    fully_shard(model, mesh=mesh, **policy(True))

    def again(old: Placed, copy: nn.Module, source: nn.Module) -> Placed:
        fresh = _sharded(copy, plan, blank)
        copies.fill(copy, source)
        return fresh

    def rest() -> None:
        for module in _torch.fsdp_modules(model):
            module.reshard()

    return Placed(
        ENGINE,
        plan.env,
        model,
        drifting=placed.drifting(model, plan.env),
        unused=plan.unused,
        fork=copies.forker(blank, again),
        rest=rest,
        forget=lambda: _torch.fsdp_forget(model),
    )


def _tied(block: nn.Module, model: nn.Module) -> bool:
    """Whether `block` shares a weight with the outside: then the root gathers it."""
    inside = {id(m) for m in block.modules()}
    ours = {id(p) for p in block.parameters()}
    return any(
        id(p) in ours
        for m in model.modules()
        if id(m) not in inside
        for p in m.parameters(recurse=False)
    )


def _shardable(model: nn.Module, plan: Plan) -> None:
    """Refuse what fully_shard cannot do, by name."""
    if len(plan.env.axes) != 1:
        names = ", ".join(f"{a.name}={a.size}" for a in plan.env.axes)
        raise PlacementError(
            f"fsdp2 shards over one axis, but this Env has ({names}); write "
            "ax.connect() without axes"
        )
    scalars = [n for n, p in model.named_parameters() if p.dim() == 0]
    if scalars:
        raise PlacementError(
            "fsdp2 slices weights along their first dimension, but "
            f"{', '.join(scalars)} "
            'has none; write torch.zeros(1) instead of torch.zeros(()), or use "ddp"'
        )


def _policy(wanted: Precision | None) -> Callable[[bool], dict[str, Any]]:
    """The mixed-precision argument for a block, or for the root."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if wanted is None:
        return lambda root: {}
    compute, reduce, output = map(
        dtypes.dtype, (wanted.compute, wanted.reduce, wanted.output)
    )
    if wanted.compute == wanted.param:
        compute = None
    # an output dtype on inner blocks would hand float32 to the next one's half weights
    return lambda root: {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute,
            reduce_dtype=reduce,
            output_dtype=output if root else None,
            cast_forward_inputs=False,  # autocast casts where it is safe to
        )
    }


def backward(state: State, loss: Tensor, scale: float) -> None:
    """FSDP2 takes the mean over ranks: times their number it is the sum."""
    plain.backward(state, loss, scale * state.slots["shard_model"].env.world)


def settle(state: State, scale: Tensor | float) -> None:
    """Check that every parameter took part, average statistics, multiply by `scale`."""
    here: Placed = state.slots["shard_model"]
    placed.all_used(state)
    if here.unused == "allow":
        _same_used(state, here)
    placed.average(here.drifting, here.env)
    if not (isinstance(scale, float) and scale == 1.0):
        _torch.scale_(_local(plain.gradients(state)), scale)


def _same_used(state: State, here: Placed) -> None:
    """FSDP2 packs the gradients that a rank has: they must be the same ones on all."""
    marks = torch.tensor([float(p.grad is not None) for _, p in state.trained])
    sums = marks.to(here.env.device)
    comm.sum_scalars(here.env, sums)
    mixed = (sums > 0) & (sums < here.env.world)
    if mixed.any():
        names = [n for (n, _), odd in zip(state.trained, mixed, strict=True) if odd]
        raise UnusedParameterError(
            "fsdp2 wants every rank to use the same parameters in a step, but only "
            f"some ranks used {', '.join(names[:8])}; add 0 * parameter.sum() to the "
            "loss where "
            'a rank does not use it, or write shard_model(env, "ddp", unused="allow")'
        )


def _local(grads: list[Tensor]) -> list[Any]:
    return [g.to_local() if hasattr(g, "to_local") else g for g in grads]  # type: ignore[reportAttributeAccessIssue]


def clip(state: State, limit: float | None) -> Tensor:
    """The 2-norm over all slices on all ranks, (); scales to `limit` beyond it."""
    grads = plain.gradients(state)
    square = plain.total(_local(grads)).square()
    env = state.slots["shard_model"].env
    square = square.to(env.device)
    comm.sum_scalars(env, square)
    return plain.limited(_local(grads), square.sqrt(), limit)


@contextmanager
def quiet(state: State) -> Generator[None]:
    """No reduction for the forward and backward passes inside."""
    model: Any = state.model
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


ENGINE = Engine("fsdp2", backward, settle, plain.update, clip, quiet)
