"""Ranks that are about to do different things end with an error, and do not hang."""

from __future__ import annotations

from typing import Any

import attrs

from accelx.records import Env, Pass, Rules, Transform, check_env, code

NAME = "with_lockstep"


@attrs.frozen(repr=False)
class WithLockstep:
    """Spec of with_lockstep."""

    timeout: float | None = None

    def __repr__(self) -> str:
        return code(NAME, self)


def with_lockstep(timeout: float | None = None) -> Transform:
    """Before each step and each collective of ours, ranks compare what they will do.

    Compared are the operation, the line of the program that calls it, and what must
    agree of its tree: of a step its number, the loss function, and the batch's leaves
    with dtype and number of dims. From `ax.init` on this holds for `step`, `grads` and
    `apply`, and for each `gather`, `reduce`, `broadcast` and the like that the program
    calls between them. Where ranks differ, all of them raise CollectiveError at once
    with every side's line; where one has not come after `timeout` seconds, or has left,
    so do all others. By default the timeout is as long as a collective may take.

    For a loop of your own: `ax.with_lockstep()(env)`, on every rank. It cannot see
    what DistributedDataParallel or your own calls of torch.distributed send. Neutral
    (L4); for finding a fault: a small collective more each time. Effects: a process
    group of its own (gloo). Raises ValueError for a timeout that is not positive.
    """
    if timeout is not None and not 0 < timeout < float("inf"):
        raise ValueError(
            f"with_lockstep(timeout=...) wants seconds, more than 0, got {timeout!r}; "
            "write with_lockstep(timeout=60)"
        )
    one = Pass(
        NAME,
        WithLockstep(timeout),
        start=lambda state, tx: _start(timeout, state),
        alone=lambda env: _alone(timeout, env),
        rules=Rules(once=True, why="ranks compare once"),
        neutral=True,
    )
    return Transform((one,))


def _start(timeout: float | None, state: Any) -> Any:
    from accelx.comm_lockstep import enter

    placed = state.slots.get("shard_model")
    enter(Env() if placed is None else placed.env, timeout)
    return state


def _alone(timeout: float | None, env: Any) -> Any:
    from accelx.comm_lockstep import enter

    check_env(NAME, env)
    enter(env, timeout)
    return env
