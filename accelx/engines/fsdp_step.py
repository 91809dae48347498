"""How a model in slices goes backward and updates."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from accelx import _torch, comm
from accelx.engines import experts, placed, plain, tensors, whole
from accelx.engines.fsdp_read import Reads
from accelx.engines.placed import Placed
from accelx.errors import UnusedParameterError

if TYPE_CHECKING:
    from accelx.state import State


@attrs.frozen
class Experts:
    """Weights that came from the tokens of all ranks of an axis, by name."""

    names: frozenset[str]
    ranks: int


@attrs.frozen
class Laid:
    """How weights lie over ranks."""

    modules: tuple[Any, ...]  # those that gather
    copies: int  # ranks that hold the same slice
    whole: bool  # whether some weights are in no slices
    wire: torch.dtype | None  # in which gradients travel; None for their own
    counted: tensors.Counted | None = None  # where weights do not all lie alike
    experts: Experts | None = None
    reads: Reads = attrs.field(factory=Reads)

    def rest(self) -> None:
        """Let go of what was gathered: weights are slices again."""
        for module in self.modules:
            module.reshard()


def backward(state: State, loss: Tensor, scale: float) -> None:
    """FSDP2 takes the mean over ranks: times their number it is the sum."""
    here: Placed = state.slots["shard_model"]
    here.handle.reads.watch(state)
    _torch.fsdp_told(here.handle.modules[0], loss)  # the root
    plain.backward(state, loss, scale * here.env.world)


def settle(state: State, scale: Tensor | float) -> None:
    """Check that every parameter took part, average what FSDP2 leaves, scale."""
    here: Placed = state.slots["shard_model"]
    placed.all_used(state)
    if here.unused == "allow":
        _same_used(state, here)
    if here.handle.whole:
        kept = whole.parted(plain.gradients(state))[1]
        whole.reduce(kept, here.env, here.handle.wire)
    if here.handle.experts is not None:
        dealt: Experts = here.handle.experts
        experts.divide(dealt.names, dealt.ranks, state.trained)
    if here.handle.counted is not None:
        here.handle.counted.alike(state)
    placed.average(here.drifting, here.env)
    if not (isinstance(scale, float) and scale == 1.0):
        _scale(state, scale)


def _same_used(state: State, here: Placed) -> None:
    """FSDP2 packs the gradients that a rank has: they must be the same ones on all."""
    marks = torch.tensor([float(p.grad is not None) for _, p in state.trained])
    sums = marks.to(here.env.device)
    comm.sum_scalars(here.env, sums)
    mixed = (sums > 0) & (sums < here.env.world)
    if mixed.any():
        names = [n for (n, _), odd in zip(state.trained, mixed, strict=True) if odd]
        raise UnusedParameterError(
            f"{here.engine.name} wants every rank to use the same parameters in a step,"
            f" but only some ranks used {', '.join(names[:8])}; add 0 * "
            "parameter.sum() to the loss where a rank does not use it, or write "
            'shard_model(env, "ddp", unused="allow")'
        )


def _scale(state: State, factor: Tensor | float) -> None:
    """Multiply what this rank has of the gradients, wherever it lies."""
    for grads in whole.parted(plain.gradients(state)):
        if grads:
            if isinstance(factor, Tensor):
                factor = factor.to(grads[0].device)  # offloaded ones are elsewhere
            _torch.scale_(grads, factor)


def update(state: State) -> None:
    """Step the optimizers over slices, also where a forward has gathered since."""
    # a model that was evaluated before apply would go on with the weights from before
    here: Placed = state.slots["shard_model"]
    here.rest()
    if not here.handle.whole:
        tensors.update(state)
        return
    with whole.one_by_one(state.optimizers):
        tensors.update(state)


def clip(state: State, limit: float | None) -> Tensor:
    """The 2-norm over all weights, each counted once, (); scales to `limit` beyond."""
    here: Placed = state.slots["shard_model"]
    if here.handle.counted is not None:
        norm = here.handle.counted.norm(state)
        if limit is not None:
            _scale(state, plain.shrink(norm, limit))
        return norm
    slices, kept = whole.parted(plain.gradients(state))
    square = plain.total(slices).square().to(here.env.device)
    comm.sum_scalars(here.env, square)
    if here.handle.copies > 1:
        square = square / here.handle.copies
    if kept:
        square = square + plain.total(kept).square()
    norm = square.sqrt()
    if limit is not None:
        _scale(state, plain.shrink(norm, limit))
    return norm


@contextmanager
def quiet(state: State) -> Generator[None]:
    """No reduction for the forward and backward passes inside."""
    model: Any = state.model
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
