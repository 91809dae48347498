"""A run that is told to leave saves first, on all ranks at the same step."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

import attrs

from accelx.records import Env, Out, Pass, Rules, Transform, check_env, code

SIGNALS = ("SIGTERM", "SIGUSR1")


@attrs.frozen(repr=False)
class OnPreempt:
    """Spec of on_preempt."""

    env: Env
    url: str
    signals: tuple[str, ...] = SIGNALS
    grace: float | None = None

    def __repr__(self) -> str:
        return code("on_preempt", self)


def on_preempt(
    env: Env,
    url: str,
    signals: Sequence[str] = SIGNALS,
    grace: float | None = None,
) -> Transform:
    """When a signal comes to any rank, save under `url` on all ranks, and leave.

    Ranks agree once a boundary: the end of each step, and each batch of `measure`. A
    signal is acted on at the boundary after the one that it came before, at the same
    step everywhere; a save under way is waited for. Then every rank raises
    SystemExit(75), EX_TEMPFAIL: running the program again goes on from there, where the
    chain has `load_state(env, url, missing="fresh")`.

    grace: seconds from the signal after which a rank where no boundary came leaves
    without a save, with its stack on stderr and exit code 128 + signal; by default it
    is left to whoever sent the signal (`accelx.spawn --grace`). Every rank must call
    `measure`'s function equally often. Neutral (L4). Effects: handlers for `signals`,
    a process group of its own (gloo), a small collective a boundary.
    """
    check_env("on_preempt", env)
    names = (signals,) if isinstance(signals, str) else tuple(signals)
    for name in names:
        if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
            raise ValueError(
                f"on_preempt(signals=...) wants names of signals that can be caught, "
                f'got {name!r}; write signals=("SIGTERM", "SIGUSR1")'
            )
    if grace is not None and not 0 < grace < float("inf"):
        raise ValueError(
            f"on_preempt(grace=...) wants seconds, more than 0, got {grace!r}; write "
            "grace=60"
        )
    spec = OnPreempt(env, str(url), names, grace)
    why = "a signal is answered once"
    one = Pass(
        "on_preempt",
        spec,
        start=lambda state, tx: _open(spec, state),
        done=_boundary,
        rules=Rules(once=True, why=why),
        neutral=True,
    )
    return Transform((one,))


def _open(spec: OnPreempt, state: Any) -> Any:
    from accelx.comm_flag import Flag
    from accelx.saves.contents import model_tensors
    from accelx.saves.preempt import Preempt, listen
    from accelx.saves.saver import Saver, anchored
    from accelx.state import with_slot

    model_tensors(state.model)  # raises for a state_dict that could not be loaded
    saver = Saver(spec.env, anchored(spec.url))
    preempt = Preempt(spec.env, saver, Flag(spec.env), spec.grace)
    listen(preempt, spec.signals)
    return with_slot(state, "on_preempt", preempt)


def _boundary(state: Any, out: Out | None) -> tuple[Any, Out | None]:
    state.slots["on_preempt"].boundary(state, out)
    return state, out
