"""Optimizer state, gradients and weights in flat slices over ranks (DeepSpeed's ZeRO).

DeepSpeed reduces gradients, slices and updates. Microbatches, means, clipping,
precision and schedules are the chain's, as on every engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accelx import dtypes
from accelx.engines import (
    copies,
    deepspeed_config as configs,
    deepspeed_open,
    deepspeed_slices,
    deepspeed_step as step,
    placed,
)
from accelx.engines.placed import Placed, Plan
from accelx.errors import PlacementError
from accelx.records import Engine, Transform

if TYPE_CHECKING:
    from accelx.state import State

# Optimizers that look at more of a weight than one entry, or that DeepSpeed replaces.
NOT_FLAT = ("Adafactor", "Muon", "Adagrad", "SparseAdam")


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


def place(model: nn.Module, plan: Plan) -> Placed:
    """Put rank 0's weights and buffers on every rank; slices come with the optimizer.

    Effects: collectives; `model` keeps its object, class and names (L8).
    """
    model.to(plan.env.device)
    dtypes.cast(model, plan.precision)
    for tensor in (*model.parameters(), *model.buffers()):
        copies.from_main(tensor, plan.env.device)
    seat = step.Seat(plan, configs.stage_of(plan.options))
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
        flat=lambda: _flat(seat),
        seen=_seen,
        written=lambda: _written(seat),
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
        return state
    _trainable(state, seat.stage)
    (seat.optimizer,) = state.optimizers
    seat.groups = [list(group["params"]) for group in seat.optimizer.param_groups]
    for _, p in state.trained:  # before DeepSpeed's own, which take gradients away
        p.register_post_accumulate_grad_hook(lambda p: seat.used.add(id(p)))
    config = configs.config(seat.plan.options, tx)
    seat.engine = deepspeed_open.initialize(
        here.env, state.model, seat.optimizer, config
    )
    return state


def _trainable(state: State, stage: int) -> None:
    """Refuse optimizers and weights that ZeRO would train otherwise."""
    kinds = [type(one).__name__ for one in state.optimizers]
    if len(kinds) > 1:
        raise PlacementError(
            f"deepspeed takes one optimizer a model, got {', '.join(kinds)}; give one "
            'with groups: ax.param_groups(...), or write shard_model(env, "fsdp2")'
        )
    wide = [n for n, p in state.trained if p.dtype == torch.float64]
    if wide:
        raise PlacementError(
            f"DeepSpeed reduces no gradient in float64, but {', '.join(wide[:5])} have "
            'such; add with_precision("fp32"), or write shard_model(env, "fsdp2")'
        )
    if not stage:
        return
    if kinds[0] in NOT_FLAT:
        raise PlacementError(
            f"ZeRO stage {stage} updates flat slices of weights, and {kinds[0]} would "
            'update weights otherwise; write stage=0, shard_model(env, "fsdp2"), or '
            "another optimizer, such as AdamW"
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


def _flat(seat: step.Seat) -> dict[int, Any]:
    if seat.engine is None or seat.stage < 3:
        return {}
    return deepspeed_slices.weights(seat.engine.module, seat.plan.env)


def _seen(state: State) -> tuple[Any, ...]:
    here: Placed = state.slots["shard_model"]
    seat: step.Seat = here.handle
    if seat.engine is None or not seat.stage:
        return state.optimizers
    cut = deepspeed_slices.slices(seat.zero, seat.stage, here.env)
    return (deepspeed_slices.seen(seat.optimizer, seat.groups, cut),)


def _written(seat: step.Seat) -> None:
    """Stage 3: what was gathered is not what slices are now."""
    if seat.engine is None or seat.stage < 3:
        return
    every = seat.params
    every[0].partition(param_list=every, has_been_updated=False)
    kept = seat.zero.persistent_parameters
    if kept:
        kept[0].all_gather(kept)


ENGINE = Engine(
    "deepspeed",
    step.backward,
    step.settle,
    step.update,
    step.clip,
    step.quiet,
    drop=step.drop,
)
