"""An average of the weights over steps, kept beside the weights that are trained."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from accelx.errors import CheckpointError, PlacementError
from accelx.records import Out, Pass, Rules, Transform, code

if TYPE_CHECKING:
    from torch import Tensor

Decay = float | Callable[[int], float]
APART = ("with_local_sgd", "with_diloco")  # ranks differ between their means


@attrs.frozen(repr=False)
class WithEma:
    """Spec of with_ema."""

    decay: Decay
    every: int = 1
    warmup: bool = False

    def __repr__(self) -> str:
        return code("with_ema", self)

    def at(self, taken: int) -> float:
        """What stays of the average when it was taken `taken` times before."""
        decay = self.decay(taken) if callable(self.decay) else self.decay
        return min(decay, (1 + taken) / (10 + taken)) if self.warmup else decay


def with_ema(decay: Decay, *, every: int = 1, warmup: bool = False) -> Transform:
    """Keep an exponential moving average of the trained weights in a slot.

    After each `every`-th update: average = decay * average + (1 - decay) * weights; the
    first time it is the weights themselves. `decay` is a number or a function of how
    many times the average was taken before, so of updates, never of ranks. warmup: at
    most (1 + n) / (10 + n) at time n, so that the start is soon forgotten.

    `with ax.averaged(state) as model:` evaluates the average. It lies as the weights
    do, slices under fsdp2, and is taken without communication; float32 where weights
    are of 16 bits, in which small steps would be lost, and in their dtype elsewhere.
    Frozen weights and buffers are the model's own. Saved, restored and forked with the
    state. Neutral: no number of the training run changes (L4). A skipped step moves it
    not. Raises ValueError for a decay outside 0 to 1. Polyak, Juditsky 1992.
    """
    _check(decay, every)
    spec = WithEma(decay, every, bool(warmup))
    why = "two averages would want the same slot; keep the decay that you mean"
    agreed = "the average is of weights that all ranks agree on"
    return Transform(
        (
            Pass(
                "with_ema",
                spec,
                start=lambda state, tx: _open(spec, state, tx),
                before=_untouched,
                after=lambda state, out: _take(state, out, spec),
                rules=(
                    Rules(once=True, why=why),
                    Rules(after=APART, why=agreed),
                ),
                neutral=True,
            ),
        )
    )


def _check(decay: Any, every: Any) -> None:
    number = isinstance(decay, int | float) and not isinstance(decay, bool)
    if not callable(decay) and not (number and 0 <= decay < 1):
        raise ValueError(
            "with_ema wants a decay from 0 up to, not with, 1, or a function of how "
            f"often the average was taken, got {decay!r}; write with_ema(0.999)"
        )
    if type(every) is not int or every < 1:
        raise ValueError(
            "with_ema(every=...) wants a whole number of updates of at least 1, got "
            f"{every!r}; write every=1 or more"
        )


@attrs.define(eq=False)
class Ema:
    """The slot: the average of each trained weight by name, and how often it was taken.

    Until it was taken once, the average is the weights themselves.
    """

    weights: dict[str, Tensor]
    taken: int = 0
    lent: bool = False  # whether the model holds the averages just now

    def state_dict(self) -> dict[str, Any]:
        """What is saved. Raises CheckpointError inside `averaged`."""
        if self.lent:
            raise CheckpointError(
                "a checkpoint wants the weights that are trained, but inside "
                "ax.averaged(state) the model holds their averages; save outside it"
            )
        return {"taken": self.taken, "weights": dict(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.taken = int(state["taken"])
        self.weights = {name: state["weights"][name] for name in self.weights}


def _open(spec: WithEma, state: Any, tx: Transform) -> Any:
    import torch

    from accelx.state import with_slot

    for apart in map(tx.find, APART):
        if apart is not None and apart.env.world > 1 and spec.every % apart.every:
            raise PlacementError(
                f"with_ema wants weights that all ranks agree on, as they do after "
                f"each {apart.every} updates, got {spec!r}; write "
                f"{attrs.evolve(spec, every=apart.every)!r}, or a multiple"
            )

    def blank(p: Tensor) -> Tensor:
        short = p.is_floating_point() and p.element_size() < 4
        return p.detach().to(torch.float32 if short else p.dtype, copy=True)

    return with_slot(state, "with_ema", Ema({n: blank(p) for n, p in state.trained}))


def _untouched(state: Any, out: Out) -> tuple[Any, Out]:
    if state.slots["with_ema"].lent:
        raise PlacementError(
            "ax.step wants the weights that are trained, but inside ax.averaged(state) "
            "the model holds their averages; step outside it"
        )
    return state, out


def _take(state: Any, out: Out, spec: WithEma) -> tuple[Any, Out]:
    if state.step % spec.every == 0:
        slot: Ema = state.slots["with_ema"]
        decay = spec.at(slot.taken) if slot.taken else 0.0
        if not 0 <= decay <= 1:
            raise ValueError(
                f"with_ema(decay) wants 0 to 1 from its function, got {decay!r} for "
                f"{slot.taken}; write a function such as lambda n: min(0.999, n / 100)"
            )
        _mix(state.trained, slot.weights, decay)
        slot.taken += 1
    return state, out


def _mix(trained: Any, averages: dict[str, Tensor], decay: float) -> None:
    """averages = decay * averages + (1 - decay) * weights, of this rank's slices."""
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    held: list[Tensor] = []
    now: list[Tensor] = []
    for name, p in trained:
        held.append(_local(averages[name]))
        now.append(_local(p))
        if now[-1].dtype != held[-1].dtype:
            now[-1] = now[-1].to(held[-1].dtype)
    if not held:
        return
    if decay:
        get_ema_multi_avg_fn(decay)(held, now, 0)
        return
    for average, weight in zip(held, now, strict=True):
        average.copy_(weight)  # to the bit, which lerp is not


def _local(tensor: Tensor) -> Tensor:
    from accelx import _torch

    if _torch.is_dtensor(tensor):
        return _torch.local_of(tensor)
    return tensor.detach()


@contextmanager
def swapped(state: Any) -> Generator[None]:
    """The averages in the model's weights, and exactly the old weights at the end.

    Holds a copy of this rank's trained weights meanwhile. No communication.
    """
    import torch

    slot = _slot(state)
    if not slot.taken or slot.lent:  # the weights themselves; or those it has already
        yield
        return
    _rest(state)
    torch.clear_autocast_cache()  # an autocast around keeps old weights
    weights = {name: _local(p) for name, p in state.trained}
    kept = {name: weight.clone() for name, weight in weights.items()}
    slot.lent = True
    try:
        for name, weight in weights.items():
            weight.copy_(_local(slot.weights[name]))
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(kept[name])
        torch.clear_autocast_cache()
        slot.lent = False
        _rest(state)


def _slot(state: Any) -> Ema:
    slot = state.slots.get("with_ema")
    if slot is None:
        raise PlacementError(
            "averaged weights were wanted, but the state was made by a chain without "
            "them; put ax.with_ema(0.999) into the chain given to ax.init"
        )
    return slot


def _rest(state: Any) -> None:
    placed = state.slots.get("shard_model")
    if placed is not None:
        placed.rest()
