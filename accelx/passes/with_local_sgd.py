"""Ranks that train by themselves, and take the mean of their weights now and then."""

from __future__ import annotations

from typing import Any

import attrs

from accelx.records import Env, Out, Pass, Rules, Transform, check_env, code

NAME = "with_local_sgd"


@attrs.frozen(repr=False)
class WithLocalSgd:
    """Spec of with_local_sgd."""

    env: Env
    every: int

    def __repr__(self) -> str:
        return code(NAME, self)


def with_local_sgd(env: Env, every: int) -> Transform:
    """Reduce no gradients; each `every` updates all take the mean of the weights.

    For slow links: between means ranks send only their losses for the report, and, with
    `clip` or fp16, whether their gradients are finite, so that all skip the same steps.
    Each rank's optimizer steps on its own rows, as if they were the batch, with weight
    by their number: at every=1 and SGD without momentum it is the run of ddp, to
    rounding. `Out.loss` is the mean over all ranks, each at its own weights; `Out.norm`
    this rank's own. Running statistics are averaged with the weights, the optimizers'
    state is each rank's own.

    Wants shard_model(env, "ddp"). To save is refused where ranks differ: save each
    `every` updates, or average first, `state = with_local_sgd(env, every)(state)`,
    which spends the state. Resumed on the same ranks, a run goes on to the bit; on
    others each has the mean of the optimizers' state. Not neutral. Raises ValueError
    for every < 1, PlacementError for slices. Effects: collectives. Stich 2019
    (arXiv:1805.09767); Lin et al. 2020 (arXiv:1808.07217).
    """
    check_every(NAME, env, every)
    spec = WithLocalSgd(env, every)
    one = Pass(
        NAME,
        spec,
        start=lambda state, tx: _start(spec, state, tx),
        backward=unreduced,
        after=lambda state, out: _after(spec, state, out),
        alone=lambda state: _now(spec, state),
        rules=rules(NAME, "with_diloco"),
    )
    return Transform((one,))


def check_every(name: str, env: Env, every: Any) -> None:
    """Refuse what is no Env, and what is no number of updates."""
    check_env(name, env)
    if type(every) is not int or every < 1:
        raise ValueError(
            f"{name}(env, every) wants a whole number of updates of at least 1, got "
            f"{every!r}; write {name}(env, every=8)"
        )


def rules(name: str, other: str) -> tuple[Rules, ...]:
    """Of a pass under which ranks train apart."""
    return (
        Rules(once=True, why="ranks agree in one rhythm"),
        Rules(excludes=(other,), why="both would average the weights; keep one"),
        Rules(
            excludes=("shard_tensors", "shard_experts"),
            why="ranks that train apart have a whole copy of the model each",
        ),
        Rules(
            excludes=("on_preempt",),
            why="it saves at any step, and between means each rank has other weights; "
            "save each `every` updates",
        ),
    )


def unreduced(grads: Any) -> Any:
    """The gradients of this rank alone."""

    def apart_grads(state: Any, *args: Any) -> tuple[Any, Any]:
        from accelx.engines import apart

        with apart.quiet(state):
            return grads(state, *args)

    return apart_grads


def _start(spec: WithLocalSgd, state: Any, tx: Transform) -> Any:
    from accelx.engines import apart
    from accelx.state import with_slot

    state = apart.part(state, tx, NAME, spec.env, spec.every)
    slot = apart.Apart(NAME, spec.env, spec.every, state.optimizers)
    return with_slot(state, NAME, slot)


def _after(spec: WithLocalSgd, state: Any, out: Out) -> tuple[Any, Out]:
    slot = state.slots[NAME]
    slot.since += 1
    if state.step % spec.every == 0:
        _agree(state)
    return state, out


def _agree(state: Any) -> None:
    from accelx.engines import apart

    slot: apart.Apart = state.slots[NAME]
    apart.agree(state, slot.env)
    slot.since = 0


def _now(spec: WithLocalSgd, state: Any) -> Any:
    from accelx.state import check_state, spend

    check_state(NAME, state)
    if slot_of(NAME, state).since:
        _agree(state)
    after = attrs.evolve(state)
    spend(state, NAME)
    return after


def slot_of(name: str, state: Any) -> Any:
    """The slot of a pass, or an error that says where it comes from."""
    from accelx.errors import PlacementError

    slot = state.slots.get(name)
    if slot is None:
        raise PlacementError(
            f"ax.{name}(...)(state) wants a state whose ranks train apart, but its "
            f"chain has no {name}; put it into the chain given to ax.init"
        )
    return slot
