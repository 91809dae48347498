"""Weights, gradients and optimizer state in slices over ranks (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from accelx import _torch, comm, deferred, dtypes
from accelx.engines import (
    copies,
    experts,
    fsdp_step,
    methods,
    options,
    placed,
    suited,
    tensors,
    whole,
)
from accelx.engines.placed import Placed, Plan
from accelx.errors import PlacementError
from accelx.match import select
from accelx.records import Engine, Precision
from accelx.saves.lie import box_at

ENGINE = Engine(
    "fsdp2",
    fsdp_step.backward,
    fsdp_step.settle,
    fsdp_step.update,
    fsdp_step.clip,
    fsdp_step.quiet,
)
HYBRID = attrs.evolve(ENGINE, name="hsdp")
"""The same over two axes: slices over one, copies of them over the other."""


def place(model: nn.Module, plan: Plan) -> Placed:
    """Shard a module that every rank holds; rank 0's numbers count.

    What is on the meta device gets memory for this rank's slices alone, not yet set.
    """
    _shardable(model, plan)
    dtypes.cast(model, plan.precision)
    blank = copies.try_blueprint(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            copies.from_main(tensor, plan.env.device)
    for tensor in (*whole.ignored(model, plan.options.ignored), *model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(plan.env.device)
    result = _sharded(model, plan, blank)
    copies.furnish(model, lambda tensor: _home(plan, tensor))
    if plan.alone:
        whole.reduce_at_once(whole.ignored(model, plan.options.ignored), plan.env)
    return result


def place_deferred(factory: Callable[[], nn.Module], plan: Plan) -> Placed:
    """Shard a model while it is made: no rank ever holds it whole.

    The numbers are those of calling `factory` on rank 0; those that a later pass
    overwrites are neither made nor sent. Peak memory is this rank's slices,
    `deferred.BUDGET` and the largest weight.
    """
    model, recorder = deferred.build(factory)
    placed.claim(model, plan.env, plan.fills)
    placed.check(model, plan)
    _shardable(model, plan)
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
                made[id(source)] = copies.unset(like, _home(plan, like))
            else:
                made[id(source)] = _made(model, name, source, recorder, plan)
        copies.put(model, name, made[id(source)])
    if plan.alone:
        whole.reduce_at_once(whole.ignored(model, plan.options.ignored), plan.env)
    return result


def _made(
    model: nn.Module, name: str, source: Tensor, recorder: deferred.Recorder, plan: Plan
) -> Any:
    """Rank 0's `source`, in full or, for a weight, this rank's slice of it."""
    from torch.distributed.tensor import distribute_tensor

    like = copies.get(model, name)
    main = plan.everyone.main
    full = recorder.full(source).contiguous() if main else torch.empty(source.shape)
    full = full.to(device=plan.env.device, dtype=like.dtype)
    if not _torch.is_dtensor(like):
        full = full.clone()
        copies.from_main(full, plan.env.device)
        weight = isinstance(like, nn.Parameter)
        return nn.Parameter(full, like.requires_grad) if weight else full
    if plan.tensors is not None or plan.experts is not None:
        full = full.clone()
        copies.from_main(full, plan.env.device)
        slices = cut(full, like)
    else:
        slices = distribute_tensor(full, like.device_mesh, like.placements)
    return nn.Parameter(slices.to(_home(plan, like)), like.requires_grad)


def cut(full: Tensor, like: Any) -> Any:
    """This rank's slice of `full`, laid as `like`, over one mesh or two at once."""
    from torch.distributed.tensor import DTensor

    box = box_at(like, like.device_mesh.get_coordinate())
    index = [slice(0, 0)] * full.dim() if box is None else map(slice, box.lo, box.hi)
    local = full[tuple(index)].reshape(_torch.local_of(like).shape).clone()
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=full.shape,
        stride=full.stride(),
    )


def _home(plan: Plan, tensor: Tensor) -> str:
    """Where a weight or buffer lies between steps."""
    away = plan.options.offload and _torch.is_dtensor(tensor)
    return "cpu" if away else plan.env.device


def sharded(model: nn.Module, plan: Plan) -> Placed:
    """Cut what is in `model`, the same on all ranks of `plan.env`, in slices."""
    return _sharded(model, plan, PlacementError("it is not the whole model"))


def _sharded(model: nn.Module, plan: Plan, blank: Any) -> Placed:
    def again(old: Placed, copy: nn.Module, source: nn.Module) -> Placed:
        fresh = _sharded(copy, plan, blank)
        copies.fill(copy, source)
        return fresh

    fork = copies.forker(blank, again)
    dealt = [] if plan.experts is None else experts.split(model, plan)
    if plan.tensors is not None:
        tensors.split(model, plan, dealt)
        if plan.env.world == 1:
            return tensors.alone(model, plan, fork)
    kept = whole.ignored(model, plan.options.ignored)
    blocks = _slice(model, plan, kept, dealt)
    _ahead([model, *blocks], plan.options.prefetch)
    methods.gathering(model, plan.options.methods)
    laid = fsdp_step.Laid(
        tuple(_torch.fsdp_modules(model)),
        options.copies(plan.env, plan.kind),
        bool(kept),
        plan.precision and dtypes.dtype(plan.precision.reduce),
        _counted(model, plan),
        _experts(model, dealt, plan),
    )
    return Placed(
        attrs.evolve(ENGINE, name=plan.kind),
        plan.env,
        model,
        handle=laid,
        drifting=placed.drifting(model, plan.env),
        unused=plan.unused,
        fork=fork,
        rest=laid.rest,
        forget=lambda: _torch.fsdp_forget(model),
    )


def _slice(
    model: nn.Module, plan: Plan, kept: set[nn.Parameter], dealt: list[nn.Module]
) -> list[nn.Module]:
    """Have fully_shard cut what each block holds, and the root the rest; the blocks."""
    from torch.distributed.fsdp import fully_shard

    for p in model.parameters():
        if not p.is_contiguous():  # as in channels_last; it takes rows that lie in turn
            p.data = p.data.contiguous()

    common: dict[str, Any] = {"mesh": _mesh(plan), "ignored_params": kept or None}
    common |= _offloading(plan)
    policy, reshard = _policy(plan.precision), plan.options.reshard_after_forward

    def sliced(module: Any, **own: Any) -> None:
        options = common | policy(False) | own
        fully_shard(module, reshard_after_forward=reshard, **options)

    if dealt and experts.others(plan.env).world == 1:
        common["ignored_params"] = {p for m in dealt for p in m.parameters()}
    elif dealt:
        line = _mesh(attrs.evolve(plan, env=experts.others(plan.env)))
        for module in dealt:
            sliced(module, mesh=line)
    blocks = _blocks(model, plan, kept)
    for block in reversed(blocks):  # innermost first
        sliced(block)
    # backward starts at the root: what it holds is wanted again at once
    fully_shard(model, reshard_after_forward=False, **common | policy(True))
    return blocks


def _counted(model: nn.Module, plan: Plan) -> tensors.Counted | None:
    """On how many ranks each slice lies, where that is not the same of all weights."""
    if plan.tensors is not None:
        return tensors.Counted.of(model, plan.everyone, plan.tensors.over)
    return None if plan.experts is None else tensors.Counted.of(model, plan.everyone)


def _experts(
    model: nn.Module, dealt: list[nn.Module], plan: Plan
) -> fsdp_step.Experts | None:
    """Weights of which each rank of an axis has its own."""
    inside = {id(p) for module in dealt for p in module.parameters()}
    names = frozenset(n for n, p in model.named_parameters() if id(p) in inside)
    ranks = plan.env.world // experts.others(plan.env).world
    return fsdp_step.Experts(names, ranks) if dealt else None


def _mesh(plan: Plan) -> Any:
    """The ranks over which weights are cut, or, for whole copies, cut in one slice."""
    if plan.kind == "hsdp":
        return comm.crossed(plan.env)
    mesh = comm.line(plan.env)
    return _torch.copies_mesh(mesh) if plan.kind == "ddp" else mesh


def _ahead(modules: list[Any], count: int) -> None:
    """Have each module gather the `count` after it as it runs, those before it back."""
    for i, module in enumerate(modules if count else ()):
        module.set_modules_to_forward_prefetch(modules[i + 1 : i + 1 + count])
        module.set_modules_to_backward_prefetch(modules[max(0, i - count) : i][::-1])


def _offloading(plan: Plan) -> dict[str, Any]:
    if not plan.options.offload:
        return {}
    from torch.distributed.fsdp import CPUOffloadPolicy

    # pinned for copies to a device; on CPU ranks there is none to pin for
    pinned = plan.env.device.partition(":")[0] != "cpu"
    return {"offload_policy": CPUOffloadPolicy(pin_memory=pinned)}


def _blocks(model: nn.Module, plan: Plan, kept: set[nn.Parameter]) -> list[nn.Module]:
    """The modules that are gathered one at a time, outermost first."""
    return [m for _, m in _untied(model, plan, kept)]


def _untied(
    model: nn.Module, plan: Plan, kept: set[nn.Parameter]
) -> list[tuple[str, nn.Module]]:
    """Blocks that share no weight with the outside: else the root gathers it."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            holders.setdefault(id(p), set()).add(id(module))

    def apart(block: nn.Module) -> bool:
        inside = {id(m) for m in block.modules()}
        ours = [holders[id(p)] for p in block.parameters() if p not in kept]
        return all(held <= inside for held in ours)

    return [(n, m) for n, m in select(model, plan.blocks) if apart(m)]


def _shardable(model: nn.Module, plan: Plan) -> None:
    """Refuse what fully_shard cannot do, by name, before anything is moved."""
    kept = whole.ignored(model, plan.options.ignored)
    named = [(n, p) for n, p in model.named_parameters() if p not in kept]
    scalars = [n for n, p in named if p.dim() == 0]
    if scalars:
        cut = plan.tensors is not None or plan.experts is not None
        rest = f', or use "ddp", or leave it whole: ignored={scalars[0]!r}'
        raise PlacementError(
            f"{'a cut model' if cut else plan.kind} slices weights along their first "
            f"dimension, but {', '.join(scalars)} has none; write torch.zeros(1) "
            f"instead of torch.zeros(()){'' if cut else rest}"
        )
    empty = [n for n, p in named if p.requires_grad and not p.numel()]
    if empty:
        raise PlacementError(
            f"slices want numbers in the weights that are trained, but {empty[0]} has "
            f"none; leave it out of the model, or whole: ignored={empty[0]!r}"
        )
    for name, block in select(model, plan.blocks):
        if type(block).forward is nn.Module.forward:
            raise PlacementError(
                f"a block wants to be called as a module, but {name} is a "
                f"{type(block).__name__}, which only holds others; write "
                f"blocks={name + '.*'!r}"
            )
    suited.in_slices(model)
    methods.gathered(model, plan.options.methods, _blocks(model, plan, kept))
    if plan.precision is None or plan.precision.param is None:
        _one_dtype(model, named, plan, kept)


def _one_dtype(
    model: nn.Module,
    named: list[tuple[str, Any]],
    plan: Plan,
    kept: set[nn.Parameter],
) -> None:
    """Weights that are gathered together are trained in one dtype."""
    of: dict[int, str] = {}
    for name, block in _untied(model, plan, kept):  # the innermost comes last
        of |= {id(p): name for p in block.parameters()}
    first: dict[str, tuple[str, torch.dtype]] = {}
    for name, p in named:
        if p.requires_grad:
            group = of.get(id(p), "")
            other, dtype = first.setdefault(group, (name, p.dtype))
            if dtype != p.dtype:
                raise PlacementError(
                    f"{plan.kind} gathers {group or 'what no block holds'} at once, so "
                    f"its trainable weights want one dtype, but {other} is {dtype} and "
                    f'{name} is {p.dtype}; add with_precision("fp32"), name the module '
                    f"of one of them in blocks, or leave it whole: ignored={name!r}"
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
