"""Optimizer state, gradients and weights in flat slices over ranks (DeepSpeed's ZeRO).

DeepSpeed reduces gradients, slices and updates. Microbatches, means, clipping,
precision and schedules are the chain's, as on every engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accelx import deferred, dtypes
from accelx.engines import (
    copies,
    deepspeed_carry,
    deepspeed_config as configs,
    deepspeed_cut,
    deepspeed_held,
    deepspeed_open,
    deepspeed_slices,
    deepspeed_step as step,
    placed,
    suited,
)
from accelx.engines.placed import Placed, Plan
from accelx.errors import NeutralityWarning, PlacementError
from accelx.records import Engine, Transform

if TYPE_CHECKING:
    from accelx.state import State

# Optimizers that look at more of a weight than one entry, or that DeepSpeed replaces.
NOT_FLAT = (
    *("Adafactor", "Muon", "Adagrad", "SparseAdam"),
    *("Lamb", "LAMB", "FusedLamb", "OnebitLamb", "Lars", "LARS", "Shampoo", "SOAP"),
)
# Those that update each number by itself, of torch and of DeepSpeed.
FLAT = (
    *("Adam", "AdamW", "SGD", "RMSprop", "RAdam", "NAdam", "Adamax", "Adadelta"),
    *("ASGD", "Rprop"),
    *("DeepSpeedCPUAdam", "FusedAdam", "DeepSpeedCPULion", "FusedLion"),
)

_REDUCED = (torch.float32, torch.float16, torch.bfloat16)


def check(plan: Plan, tx: Transform) -> None:
    """Refuse what does not fit, before a model is made."""
    configs.check(plan.options, plan.unused, tx)
    if plan.alone:
        raise PlacementError(
            "deepspeed updates weights itself, so it wants the optimizer, too; write "
            'state = ax.init(ax.shard_model(env, "deepspeed"), model, optim)'
        )
    if plan.everyone.world != plan.env.world or plan.tensors is not None:
        raise PlacementError(
            "deepspeed reduces over all ranks, but ranks along some axes of this Env "
            'share their rows; write shard_model(env, "fsdp2")'
        )
    if plan.env.world > 1:
        settings = configs.config(plan.options, tx)["zero_optimization"]
        deepspeed_open.check(plan.env, settings)


def place(model: nn.Module, plan: Plan) -> Placed:
    """Put rank 0's weights and buffers on every rank, under stage 3 in slices.

    Other slices come with the optimizer. Effects: collectives; `model` keeps its
    object, class and names (L8).
    """
    stage = configs.stage_of(plan.options)
    _sendable(model, stage)
    if stage:
        suited.dense(model)
    if stage == 3:
        return _cut(model, plan, Tensor.detach)
    model.to(plan.env.device)
    for weight in model.parameters():
        weight.data = weight.data.contiguous()  # DeepSpeed sends no other, as bytes
    dtypes.cast(model, plan.precision)
    for tensor in (*model.parameters(), *model.buffers()):
        copies.from_main(tensor, plan.env.device)
    return _placed(model, plan, step.Seat(plan, stage))


def place_deferred(factory: Callable[[], nn.Module], plan: Plan) -> Placed:
    """Slice a model while it is made, under stage 3: no rank ever holds it whole.

    The numbers are those of calling `factory` on rank 0. Peak memory is this rank's
    slices, `deferred.BUDGET` and the largest weight.
    """
    model, recorder = deferred.build(factory)
    placed.claim(model, plan.env, plan.fills)
    placed.check(model, plan)
    _sendable(model, 3)
    suited.dense(model)
    return _cut(model, plan, recorder.full)


def cuts(plan: Plan) -> bool:
    """Whether weights, too, are in slices: the third stage of ZeRO."""
    return configs.stage_of(plan.options) == 3


def _sendable(model: nn.Module, stage: int) -> None:
    """Refuse weights that DeepSpeed cannot send or cut, by name."""
    least = 1 if stage == 3 else 0
    few = [n for n, p in model.named_parameters() if not p.dim() or p.numel() < least]
    if few:
        raise PlacementError(
            "deepspeed wants weights with a dimension, and stage 3 with an element, "
            f"but {', '.join(few[:5])} has none; write torch.zeros(1) instead of "
            'torch.zeros(()), leave an empty one out, or use shard_model(env, "ddp")'
        )


def _cut(model: nn.Module, plan: Plan, full: deepspeed_cut.Full) -> Placed:
    deepspeed_cut.cut(model, plan, full)
    return _placed(model, plan, step.Seat(plan, 3, cut=True))


def _placed(model: nn.Module, plan: Plan, seat: step.Seat) -> Placed:
    return Placed(
        ENGINE,
        plan.env,
        model,
        handle=seat,
        drifting=placed.drifting(model, plan.env),
        unused=plan.unused,
        fork=_no_fork,
        begin=_begin,
        forget=lambda: step.forget(seat),
        flat=lambda: _flat(seat, model),
        seen=_seen,
        written=lambda: _written(seat),
        inside=lambda: deepspeed_held.held(seat, model),
        export=_export,
    )


def _no_fork(state: State) -> State:
    raise PlacementError(
        "fork wants a copy that steps as the state does, but DeepSpeed's engine cannot "
        'be copied; save and load the state, or write shard_model(env, "fsdp2")'
    )


def _begin(state: State, tx: Transform) -> State:
    """Hand model and optimizer to DeepSpeed."""
    here: Placed = state.slots["shard_model"]
    seat: step.Seat = here.handle
    if not state.optimizers:
        if seat.cut:
            deepspeed_cut.whole(state.model)
            seat.cut = False
        return state
    _trainable(state, seat.stage)
    (seat.optimizer,) = state.optimizers
    seat.groups = [list(group["params"]) for group in seat.optimizer.param_groups]
    used = seat.used  # not the seat, which a weight would keep for good
    for name, p in state.trained:  # before DeepSpeed's own, which take gradients away
        p.register_post_accumulate_grad_hook(partial(used.note, name))
    if seat.cut:
        deepspeed_cut.bare(state.model)
    limit = tx.find("clip")
    seat.limit = 0.0 if limit is None else limit.norm
    config = configs.config(seat.plan.options, tx)
    seat.engine = deepspeed_open.initialize(
        here.env, state.model, seat.optimizer, config
    )
    seat.carried = deepspeed_carry.carried(seat.engine.optimizer, seat.stage, here.env)
    seat.look()
    return state


def _trainable(state: State, stage: int) -> None:
    """Refuse optimizers and weights that ZeRO would train otherwise."""
    kinds = [type(one).__name__ for one in state.optimizers]
    if len(kinds) > 1:
        raise PlacementError(
            f"deepspeed takes one optimizer a model, got {', '.join(kinds)}; give one "
            'with groups: ax.param_groups(...), or write shard_model(env, "fsdp2")'
        )
    odd = [(n, p) for n, p in state.trained if p.dtype not in _REDUCED]
    if odd:
        names, kind = ", ".join(n for n, _ in odd[:5]), odd[0][1].dtype
        better = 'add with_precision("fp32"), or ' if kind == torch.float64 else ""
        raise PlacementError(
            f"DeepSpeed reduces no gradient in {kind}, but {names} would have such; "
            f'{better}write shard_model(env, "ddp")'
        )
    if not stage:
        return
    if kinds[0] in NOT_FLAT:
        raise PlacementError(
            f"ZeRO stage {stage} updates flat slices of weights, and {kinds[0]} would "
            'update weights otherwise; write stage=0, shard_model(env, "fsdp2"), or '
            "another optimizer, such as AdamW"
        )
    if not any(one.__name__ in FLAT for one in type(state.optimizers[0]).__mro__):
        warnings.warn(
            f"ZeRO stage {stage} updates flat slices of weights, and nothing is known "
            f"of {kinds[0]}: if it looks at more of a weight than one number, at its "
            'norm or shape, it trains otherwise here; then write stage=0, or "fsdp2"',
            NeutralityWarning,
            stacklevel=2,
        )
    other = [f"{n} is {p.dtype}" for n, p in state.trained if p.dtype != torch.float32]
    if other:
        raise PlacementError(
            "ZeRO keeps the weights that it updates in float32, but "
            f'{", ".join(other[:5])}; add with_precision("fp32"), or write stage=0, or '
            'shard_model(env, "fsdp2")'
        )
    if not all(any(p.requires_grad for p in g["params"]) for g in _groups(state)):
        raise PlacementError(
            "ZeRO wants a trained weight in each group of the optimizer, but one has "
            "none; leave it out: [p for p in m.parameters() if p.requires_grad]"
        )


def _groups(state: State) -> list[dict[str, Any]]:
    return state.optimizers[0].param_groups


def _flat(seat: step.Seat, model: nn.Module) -> dict[int, Any]:
    return deepspeed_slices.weights(model, seat.plan.env) if seat.cut else {}


def _seen(state: State) -> tuple[Any, ...]:
    here: Placed = state.slots["shard_model"]
    seat: step.Seat = here.handle
    if seat.engine is None or not seat.stage:
        return state.optimizers
    cut = deepspeed_slices.slices(seat.zero, seat.stage, here.env)
    return (deepspeed_slices.seen(seat.optimizer, seat.groups, cut),)


def _export(state: State, folder: str, name: str) -> None:
    """Save as DeepSpeed does, with what is accelx's while it trains: counts, clip."""
    here: Placed = state.slots["shard_model"]
    seat: step.Seat = here.handle
    if seat.engine is None:
        raise PlacementError(
            "a checkpoint of DeepSpeed has an optimizer's state, but ax.init was given "
            "none; write export((env, state), out), which writes weights"
        )
    seat.engine.global_steps, seat.engine.skipped_steps = state.step, state.skipped
    if not seat.stage:
        deepspeed_open.save(here.env, seat.engine, folder, name)
        return
    seat.zero.refresh_fp32_params()
    seat.zero.clip_grad = seat.limit  # those who load it clip as it says
    try:
        deepspeed_open.save(here.env, seat.engine, folder, name)
    finally:
        seat.zero.clip_grad = 0.0


def _written(seat: step.Seat) -> None:
    """Stage 3: what was gathered is not what slices are now."""
    if seat.engine is None or seat.stage < 3:
        return
    every = seat.params
    every[0].partition(param_list=every, has_been_updated=False)
    kept = seat.zero.persistent_parameters
    if kept:
        kept[0].all_gather(kept)
    seat.look()


ENGINE = Engine(
    "deepspeed",
    step.backward,
    step.settle,
    step.update,
    step.clip,
    step.quiet,
    step.carry,
    drop=step.drop,
)
