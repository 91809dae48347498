"""Ranks that train by themselves, and a second optimizer over what they agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from accelx.passes.with_local_sgd import check_every, rules, slot_of, unreduced
from accelx.records import Env, Out, Pass, Transform, code

if TYPE_CHECKING:
    from torch import Tensor

    from accelx.engines.apart import Apart

NAME = "with_diloco"


@attrs.frozen(repr=False)
class WithDiloco:
    """Spec of with_diloco."""

    env: Env
    every: int
    outer: Callable[[Any], Any]

    def __repr__(self) -> str:
        return code(NAME, self)


def with_diloco(env: Env, every: int, outer: Callable[[Any], Any]) -> Transform:
    """Reduce no gradients; an outer optimizer steps each `every` updates.

    Each rank trains from common weights by its own (inner) optimizer. After `every`
    updates the outer one steps on the common weights, whose gradient is the mean over
    ranks of how far they went (common - own), and all ranks go on from there. `outer`
    is a function of a list of parameters to an optimizer, such as
    `lambda p: SGD(p, 0.7, momentum=0.9, nesterov=True)`, which Douillard et al. 2023
    (arXiv:2311.08105) found best; with SGD(p, 1.0) it is `with_local_sgd`.

    Memory: the common weights and the outer optimizer's state, on each rank. Both are
    saved; the inner optimizers' state is each rank's own and saved as such. All else is
    as with `with_local_sgd`: wants shard_model(env, "ddp"), what is sent between, where
    saving is refused, and `state = with_diloco(env, every, outer)(state)`, which makes
    the outer step now and spends the state. Not neutral. Raises ValueError for
    every < 1, TypeError for an outer that is no function of parameters to an optimizer.
    Effects: collectives.
    """
    check_every(NAME, env, every)
    if not callable(outer) or hasattr(outer, "param_groups"):
        raise TypeError(_WANTED.format(f"{type(outer).__name__} {outer!r:.60}"))
    spec = WithDiloco(env, every, outer)
    one = Pass(
        NAME,
        spec,
        start=lambda state, tx: _start(spec, state, tx),
        backward=unreduced,
        before=_begun,
        after=lambda state, out: _after(spec, state, out),
        alone=lambda state: _now(spec, state),
        rules=rules(NAME, "with_local_sgd"),
    )
    return Transform((one,))


_WANTED = (
    "with_diloco wants a function of parameters to an optimizer, got {}; write "
    "with_diloco(env, 50, lambda p: SGD(p, 0.7, momentum=0.9, nesterov=True))"
)


@attrs.define(eq=False)
class Outer:
    """The slot: the weights that ranks agreed on last, and what moves them.

    Opened by the first update, so that a run starts from what was loaded.
    """

    apart: Apart
    make: Callable[[Any], Any]
    names: tuple[str, ...]
    common: dict[str, Tensor] = attrs.field(factory=dict)  # of the names, or empty
    optimizer: Any = None  # over them

    def open(self, weights: dict[str, Tensor]) -> None:
        """Agree on `weights`, which are copied, and make the outer optimizer."""
        from torch import nn

        self.common = {n: nn.Parameter(weights[n].detach().clone()) for n in self.names}
        self.optimizer = self.make(list(self.common.values()))
        if not hasattr(self.optimizer, "param_groups"):
            kind = type(self.optimizer).__name__
            raise TypeError(_WANTED.format(f"one that gives {kind}"))

    def state_dict(self) -> dict[str, Any]:
        """What is saved. Raises CheckpointError where weights differ over ranks."""
        outer = None if self.optimizer is None else self.optimizer.state_dict()
        common = {n: w.detach() for n, w in self.common.items()}
        return {**self.apart.state_dict(), "common": common, "outer": outer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.apart.load_state_dict(state)
        self.common, self.optimizer = {}, None
        if state["outer"] is not None:
            self.open(state["common"])
            self.optimizer.load_state_dict(state["outer"])


def _start(spec: WithDiloco, state: Any, tx: Transform) -> Any:
    from accelx.engines import apart
    from accelx.state import with_slot

    state = apart.part(state, tx, NAME, spec.env, spec.every)
    own = apart.Apart(NAME, spec.env, spec.every, state.optimizers)
    names = tuple(name for name, _ in state.trained)
    return with_slot(state, NAME, Outer(own, spec.outer, names))


def _begun(state: Any, out: Out) -> tuple[Any, Out]:
    slot: Outer = state.slots[NAME]
    if slot.optimizer is None:
        slot.open(dict(state.trained))
    return state, out


def _after(spec: WithDiloco, state: Any, out: Out) -> tuple[Any, Out]:
    slot: Outer = state.slots[NAME]
    slot.apart.since += 1
    if state.step % spec.every == 0:
        _agree(state)
    return state, out


def _agree(state: Any) -> None:
    """One step of the outer optimizer, and its weights into the model."""
    import torch

    from accelx.engines import apart

    slot: Outer = state.slots[NAME]
    apart.agree(state, slot.apart.env)
    with torch.no_grad():
        for name, p in state.trained:
            slot.common[name].grad = slot.common[name].detach() - p.detach()
        slot.optimizer.step()
        for name, p in state.trained:
            p.copy_(slot.common[name])
            slot.common[name].grad = None
    slot.apart.since = 0


def _now(spec: WithDiloco, state: Any) -> Any:
    from accelx.state import check_state, spend

    check_state(NAME, state)
    if slot_of(NAME, state).apart.since:
        _agree(state)
    after = attrs.evolve(state)
    spend(state, NAME)
    return after
