"""How a model in DeepSpeed's hands goes backward and updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from accelx import _torch, comm
from accelx.engines import placed, plain
from accelx.engines.deepspeed_carry import Carried
from accelx.engines.placed import Placed, Plan
from accelx.errors import PlacementError
from accelx.nonfinite import NonFiniteError

if TYPE_CHECKING:
    from accelx.state import State


@attrs.define(eq=False)
class Used:
    """Which weights got a gradient: since the last step, and in this backward pass."""

    names: set[str] = attrs.field(factory=set)
    now: set[str] | None = None  # None where a second one does no harm

    def note(self, name: str, weight: Tensor) -> None:
        """The weight of that name has one. Raises PlacementError for its second."""
        if self.now is not None:
            if name in self.now:
                raise PlacementError(
                    "ZeRO stages 2 and 3 reduce the gradient of a weight when it "
                    f"comes, but that of {name} came in two parts, as where "
                    "torch.utils.checkpoint(use_reentrant=True) is around each of two "
                    "uses; write use_reentrant=False, or ax.remat(blocks), or stage=1"
                )
            self.now.add(name)
        self.names.add(name)


@attrs.define(eq=False)
class Seat:
    """DeepSpeed's engine of a model, and what it does not keep itself."""

    plan: Plan
    stage: int
    engine: Any = None  # from the time that there are optimizers
    optimizer: Any = None  # the user's
    groups: list[list[Any]] = attrs.field(factory=list)  # its weights, before ZeRO
    used: Used = attrs.field(factory=lambda: Used())
    cut: bool = False  # whether weights are in slices already
    limit: float = 0.0  # that of clip, 0 without one
    inside: bool = False  # whether a backward pass has begun and not ended
    carried: Carried | None = None
    versions: list[tuple[int, int]] = attrs.field(factory=list)  # as `look` saw them

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer, which holds gradients; of stages 1 to 3."""
        return self.engine.optimizer

    @property
    def params(self) -> list[Any]:
        """The model's weights, under stage 3 with DeepSpeed's methods."""
        return list(self.engine.module.parameters())

    def look(self) -> None:
        """Note how often weights and their slices were written into, under stage 3."""
        if self.stage == 3:
            self.versions = _versions(self.params)


def _versions(weights: list[Any]) -> list[tuple[int, int]]:
    count = _torch.version_of
    return [(count(p), count(p.ds_tensor)) for p in weights]


def backward(
    state: State,
    loss: Tensor,
    scale: float,
    leaf: Tensor | None = None,
    value: Tensor | None = None,
) -> None:
    """DeepSpeed takes the mean over ranks: times their number it is the sum."""
    here: Placed = state.slots["shard_model"]
    seat: Seat = here.handle
    if seat.engine is None:
        raise PlacementError(
            "deepspeed trains with an optimizer, but ax.init was given none; write "
            "ax.init(tx, model, lambda m: AdamW(m.parameters()))"
        )
    if state.pending and seat.stage:
        raise PlacementError(
            f"ZeRO stage {seat.stage} holds the gradients of one ax.grads, and those "
            "before are not applied; add the losses up in one, or write stage=0, or "
            'shard_model(env, "fsdp2")'
        )
    if loss.dtype in (torch.float16, torch.bfloat16):
        loss = loss.float()  # a scale such as 1/3 or 65536 has no exact half
    if seat.stage == 3:
        _unwritten(seat)
    seat.inside = True
    seat.used.now = set() if seat.stage >= 2 else None
    if seat.stage:
        # what its forward does, which is not called: the loss calls the model itself
        seat.zero.clear_backward_seen_flag()
        seat.zero.backward_prologue()
        seat.zero.enter_backward()
        seat.zero.set_gradient_accumulation_boundary(False)
    whole = loss * (scale * here.env.world)
    back = partial(seat.engine.backward, whole, scale_wrt_gas=False)
    if seat.carried is None or value is None:
        back()
    else:
        seat.carried.along(value, back, here.env.world)
    seat.inside, seat.used.now = False, None


def _unwritten(seat: Seat) -> None:
    """Refuse weights that were written from outside, and not into their slices.

    DeepSpeed itself writes into none of the weights, and its GatheredParameters, which
    lets others do so, into slices, too.
    """
    before, now = seat.versions, _versions(seat.params)
    if now == before:
        return
    seat.versions = now
    names = [name for name, _ in seat.engine.module.named_parameters()]
    pairs = zip(names, before, now, strict=True)
    lost = [n for n, old, new in pairs if old[0] != new[0] and old[1] == new[1]]
    if lost:
        raise PlacementError(
            f"{', '.join(lost[:5])} {'were' if lost[1:] else 'was'} written from "
            "outside, but ZeRO stage 3 updates slices, so that would be lost; write it "
            "inside deepspeed.zero.GatheredParameters(..., modifier_rank=0), or stage=2"
        )


def carry(state: State) -> Any:
    """The loss travels in a bucket of gradients, where backward passes send some."""
    seat: Seat = state.slots["shard_model"].handle
    return None if seat.carried is None else seat.carried.leaf


def settle(state: State, scale: Tensor | float) -> None:
    """Reduce what is not, check that every parameter took part, multiply by `scale`."""
    here: Placed = state.slots["shard_model"]
    seat: Seat = here.handle
    missing = [n for n, _ in state.trained if n not in seat.used.names]
    if missing:
        raise placed.unused(missing, here, allowed=False)
    seat.used.names.clear()
    if seat.stage >= 2:  # reduced already: each backward pass has added to the slices
        seat.zero.finalize_gradient_accumulation_boundary()
    elif seat.stage == 1:
        seat.zero.set_gradient_accumulation_boundary(True)
        seat.zero.reduce_gradients()
    else:
        seat.engine.buffered_allreduce_fallback()
    placed.average(here.drifting, here.env)
    if not (isinstance(scale, float) and scale == 1.0):
        _scale(state, scale)


def _gradients(state: State) -> list[Tensor]:
    """This rank's slices of gradients, padding included, which is zero."""
    seat: Seat = state.slots["shard_model"].handle
    if not seat.stage:
        return plain.gradients(state)
    away = seat.zero.offload_optimizer if seat.stage == 3 else seat.zero.cpu_offload
    if away:
        return [m.grad for m in masters(seat) if m.grad is not None]
    return [g for group in seat.zero.averaged_gradients.values() for g in group]


def masters(seat: Seat) -> list[Tensor]:
    """The slices that the optimizer updates, each (n,), of stages 1 to 3."""
    if seat.stage == 3:
        return seat.zero.fp32_partitioned_groups_flat
    return seat.zero.single_partition_of_fp32_groups


def _scale(state: State, factor: Tensor | float) -> None:
    grads = _gradients(state)
    if grads:
        if isinstance(factor, Tensor):
            factor = factor.to(grads[0].device)  # offloaded ones are elsewhere
        _torch.scale_(grads, factor)


def clip(state: State, limit: float | None) -> Tensor:
    """The 2-norm over all weights, each counted once, (); scales to `limit` beyond."""
    here: Placed = state.slots["shard_model"]
    square = plain.total(_gradients(state)).square().to(here.env.device)
    if here.handle.stage:
        comm.sum_scalars(here.env, square)
    norm = square.sqrt()
    if limit is not None:
        factor = plain.shrink(norm, limit)
        # no times nan, which the padding of slices would keep for all steps to come
        _scale(state, torch.where(norm.isfinite(), factor, torch.ones_like(factor)))
    return norm


def update(state: State) -> None:
    """Step the optimizer over slices and gather what it changed."""
    seat: Seat = state.slots["shard_model"].handle
    seat.engine.global_steps += 1  # what DeepSpeed's own checkpoints say
    if not seat.stage:
        plain.update(state)
        return
    # weights that were written from outside count, on every engine
    if seat.stage < 3:
        _put_back(seat.zero)
    seat.zero.refresh_fp32_params()
    seat.zero.step()
    seat.zero.zero_grad()
    seat.look()
    if seat.zero.overflow:
        raise NonFiniteError(
            f"ZeRO stage {seat.stage} makes no update of gradients that are not "
            "finite; add clip(1.0), which skips such a step on all ranks and says so, "
            'or clip(float("inf")), which only looks'
        )


def _put_back(zero: Any) -> None:
    """Have weights that were replaced (`p.data = ...`) where ZeRO looks for them."""
    for flat, weights, starts in zip(
        zero.bit16_groups_flat,
        zero.round_robin_bit16_groups,
        zero.round_robin_bit16_offsets,
        strict=True,
    ):
        first, size = flat.data_ptr(), flat.element_size()
        for weight, at in zip(weights, starts, strict=True):
            if weight.data_ptr() != first + at * size:
                own = flat.narrow(0, at, weight.numel()).view_as(weight)
                own.copy_(weight.detach())


def quiet(state: State) -> AbstractContextManager[None]:
    """Nothing to keep quiet.

    Stages 0 and 1 reduce when gradients are settled, 2 and 3 after each backward pass:
    they have no room for gradients that are whole.
    """
    return nullcontext()


def drop(state: State) -> None:
    """Let go of gradients that make no update."""
    state.model.zero_grad(set_to_none=True)
    forget(state.slots["shard_model"].handle)


def forget(seat: Seat) -> None:
    """Make DeepSpeed forget gradients, and a backward pass that was broken off."""
    seat.used.names.clear()
    seat.used.now = None
    if seat.engine is None or not seat.stage:
        seat.inside = False
        return
    zero = seat.zero
    if seat.inside:
        zero.exit_backward()
        seat.inside = False
    if seat.carried is not None:
        seat.carried.waiting = None
    for bucket in zero.ipg_buckets.values():
        bucket.clear_params() if seat.stage == 3 else bucket.clear()
    for key in _keys(zero.params_already_reduced):
        zero.params_already_reduced[key] = False
    zero.zero_grad()
    zero.averaged_gradients = {}
    if seat.stage < 3:
        zero.micro_step_id = -1  # as its step leaves it
        zero.all_grad_tensors = {}


def _keys(marks: Any) -> Iterator[Any]:
    return iter(list(marks) if isinstance(marks, dict) else range(len(marks)))  # type: ignore[reportUnknownArgumentType]
