"""A copy of the model on every rank; gradients are averaged as they come (DDP)."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from accelx import _torch, dtypes
from accelx.engines import copies, placed, plain
from accelx.engines.placed import Placed, Plan
from accelx.errors import PlacementError, PrecisionError
from accelx.records import Engine
from accelx.state import trainable

if TYPE_CHECKING:
    from accelx.state import State


SENT = {  # dtypes that DDP can send over any backend when it is made
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64),
}


@attrs.define(eq=False)
class Seen:
    """The DDP of a model, and whether the model was called since the last step."""

    ddp: Any
    leaf: Any = None  # a parameter of the DDP that is none of the model's
    called: bool = False


class _Carrying(nn.Module):
    """A model, and a scalar beside it."""

    def __init__(self, model: nn.Module, leaf: nn.Parameter) -> None:
        super().__init__()
        self.model, self.leaf = model, leaf


def _leaf(result: Placed, alone: bool) -> nn.Parameter | None:
    """A scalar to carry, where all backward passes are ours and have the digits."""
    dtype = result.trainable[-1][1].dtype  # of the bucket that is reduced first
    if alone or result.unused == "allow" or dtype not in (torch.float32, torch.float64):
        return None
    return nn.Parameter(torch.zeros((), dtype=dtype, device=result.env.device))


def place(model: nn.Module, plan: Plan) -> Placed:
    """Put rank 0's weights and buffers on every rank and hook DDP into `model`.

    Effects: two collectives; `model` keeps its object, class and names (L8).
    """
    reduce, param = (plan.precision or dtypes.PRESETS["fp32"]).reduce, "fp32"
    if plan.precision and reduce and reduce != (plan.precision.param or param):
        raise PrecisionError(
            "ddp reduces gradients in the dtype of the weights, but "
            f"{plan.precision!r} "
            f'asks for reduce={reduce!r}; leave reduce out, or write "fsdp2"'
        )
    model.to(plan.env.device)
    dtypes.cast(model, plan.precision)
    result = Placed(
        ENGINE,
        plan.env,
        model,
        trainable=trainable(model),
        drifting=placed.drifting(model, plan.env),
        unused=plan.unused,
    )
    return hooked(result, copies.try_blueprint(model), plan.alone)


def hooked(result: Placed, blank: Any, alone: bool) -> Placed:
    """`result` with DDP made and its two halves hooked around the model's forward."""
    model = result.model
    if not result.trainable:  # DDP refuses a model with nothing to reduce
        for tensor in (*model.parameters(), *model.buffers()):
            copies.from_main(tensor, result.env.device)
        return attrs.evolve(result, engine=plain.ENGINE)
    leaf = _leaf(result, alone)
    whole = model if leaf is None else _Carrying(model, leaf)
    odd = [(n, t) for n, t in copies.tensors(whole) if t.dtype not in SENT]
    for _, tensor in odd:
        copies.from_main(tensor, result.env.device)
    ddp = _torch.ddp(whole, result.unused == "allow", {name for name, _ in odd})
    seen = Seen(ddp, leaf)
    result = attrs.evolve(result, handle=seen, fork=copies.forker(blank, _again))

    # A deep copy of the model, as users make for an average, shares these hooks, and is
    # none of DDP's business.
    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module is model:
            seen.called = True
            return _naming(result, _torch.ddp_before, ddp, args, kwargs)
        return args, kwargs

    def behind(module: nn.Module, args: Any, output: Any) -> Any:
        if module is model:
            return _naming(result, _torch.ddp_behind, ddp, output)
        return output

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(behind)
    return result


def _again(old: Placed, model: nn.Module, source: nn.Module) -> Placed:
    """Place a copy, whose weights need not be sent."""
    copies.fill(model, source)
    fresh = attrs.evolve(
        old,
        model=model,
        trainable=trainable(model),
        drifting=placed.statistics(model) if old.drifting else (),
    )
    return hooked(fresh, copies.try_blueprint(model), old.handle.leaf is None)


def _naming(result: Placed, half: Any, *args: Any) -> Any:
    """DDP's complaint about missing gradients, with names for its numbers."""
    try:
        return half(*args)
    except RuntimeError as error:
        found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
        if found is None:
            raise
        first = int(result.handle.leaf is not None)  # the leaf is counted as 0
        indices = [int(i) - first for i in found[1].split()]
        names = [result.trainable[i][0] for i in indices if i >= 0]
        if not names:  # the loss that was carried is missing: no step of ours
            raise PlacementError(
                "a backward pass outside ax.step reached this model, which ddp then "
                "reduces half-way; lend it by `with ax.frozen(state) as model:`"
            ) from error
        raise placed.unused(names, result) from error


def backward(
    state: State,
    loss: Tensor,
    scale: float,
    leaf: Tensor | None = None,
    value: Tensor | None = None,
) -> None:
    """DDP takes the mean over ranks: times their number it is the sum."""
    world = state.slots["shard_model"].env.world
    plain.backward(state, loss, scale * world, leaf, value)


def carry(state: State) -> Any:
    """The loss travels in a bucket of gradients: a collective of its own costs more."""
    return state.slots["shard_model"].handle.leaf


def settle(state: State, scale: Tensor | float) -> None:
    """Check that every parameter took part, average statistics, multiply by `scale`."""
    here: Placed = state.slots["shard_model"]
    if not here.handle.called:
        raise PlacementError(
            f"ddp reduces gradients of what {type(here.model).__name__}.__call__ "
            "computed, but the loss did not call the model itself, so ranks would "
            "train apart; write model(...) in the loss, and reach other methods "
            "through forward"
        )
    here.handle.called = False
    placed.all_used(state)
    if here.unused == "error":
        _naming(here, _torch.ddp_finished, here.handle.ddp)
    placed.average(here.drifting, here.env)
    plain.settle(state, scale)


@contextmanager
def quiet(state: State) -> Generator[None]:
    """No reduction for the forward and backward passes inside."""
    ddp = state.slots["shard_model"].handle.ddp
    loud = ddp.require_backward_grad_sync
    ddp.require_backward_grad_sync = False
    try:
        yield
    finally:
        ddp.require_backward_grad_sync = loud


ENGINE = Engine("ddp", backward, settle, plain.update, plain.clip, quiet, carry)
