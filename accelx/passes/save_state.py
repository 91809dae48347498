"""When a run is saved, where to, and how much of what was saved stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from accelx.match import Selector
from accelx.records import Env, Out, Pass, Rules, Transform, check_env, code

if TYPE_CHECKING:
    from accelx.saves.retain import Retain


@attrs.frozen(repr=False)
class SaveState:
    """Spec of save_state."""

    env: Env
    url: str
    every: int | None = None
    keep: Any = None
    wait: bool = True
    select: Any = None

    def __repr__(self) -> str:
        return code("save_state", self)


def save_state(
    env: Env,
    url: str,
    every: int | None = None,
    keep: int | Retain | None = None,
    *,
    wait: bool = True,
    select: Selector | None = None,
) -> Transform:
    """Save the run under `url` after each `every`-th update, into a folder of its own.

    `url` is a path or any fsspec URL, such as "s3://bucket/run"; credentials are
    fsspec's to know. A checkpoint is whole once its last object, the commit, is there:
    a save that is cut off at any point leaves the ones before as they were. Each rank
    writes its slices, and what several hold is written once.

    keep: how many of the newest stay, or `retain(...)`; without it all. Removal comes
    after the newer commit has been read back. wait: False returns once the state is
    copied to host memory (one copy of this rank's slices, reused) and writes in a
    thread; at most one save is under way, a failure is raised by a later step, and the
    process waits at its end. select: "trainable" leaves out frozen weights, which are
    referred to by fingerprint and checked at load; or a glob, or (name, tensor) -> bool
    that takes at least the trained ones.

    Alone, `save_state(env, url)(state)` saves now and returns the checkpoint's URL; the
    state is not spent. Neutral (L4). Raises CheckpointError on every rank if one fails,
    and for a state that holds what is neither a tensor nor plain data. Effects: writes
    to the store, collectives.
    """
    check_env("save_state", env)
    _numbers(every=every, keep=keep)
    spec = SaveState(env, str(url), every, keep, wait, select)

    why = "each would save the same steps; write one, or save by hand to a second place"
    one = Pass(
        "save_state",
        spec,
        start=lambda state, tx: _open(spec, state),
        done=_saving(spec),
        alone=lambda state: _now(spec, state),
        rules=Rules(once=True, why=why),
        neutral=True,
    )
    return Transform((one,))


def _numbers(**given: Any) -> None:
    for name, value in given.items():
        number = type(value) is int and value > 0
        if not (number or value is None or (name == "keep" and callable(value))):
            raise ValueError(
                f"save_state({name}=...) wants a whole number of at least 1, got "
                f"{value!r}; write {name}=1 or more"
            )


def _open(spec: SaveState, state: Any) -> Any:
    from accelx.saves.contents import model_tensors
    from accelx.saves.saver import check_select
    from accelx.state import with_slot

    _due(spec)
    model_tensors(state.model)  # raises for a state_dict that could not be loaded
    check_select(state, spec.select)
    return with_slot(state, "save_state", _saver(spec))


def _now(spec: SaveState, state: Any) -> str:
    from accelx.state import check_state

    check_state("save_state", state)
    return _saver(spec, state.slots.get("save_state")).save(state, {}, wait=True)


def _due(spec: SaveState) -> int:
    if spec.every is None:
        raise ValueError(
            f"save_state in a chain wants to know how often, got {spec!r}; write "
            "save_state(env, url, every=500)"
        )
    return spec.every


def _saver(spec: SaveState, like: Any = None) -> Any:
    from accelx.saves.retain import Retain
    from accelx.saves.saver import Saver, anchored

    keep = Retain(spec.keep) if isinstance(spec.keep, int) else spec.keep
    made = Saver(spec.env, anchored(spec.url), keep, spec.wait, spec.select)
    if like is not None:
        made.background = like.background
    return made


def _saving(spec: SaveState) -> Callable[[Any, Out | None], tuple[Any, Out | None]]:
    def done(state: Any, out: Out | None) -> tuple[Any, Out | None]:
        saver = state.slots["save_state"]
        saver.background.check()
        if out is not None and out.stepped and state.step % _due(spec) == 0:
            from accelx.saves.saver import metrics_of

            saver.save(state, metrics_of(out), spec.wait)
        return state, out

    return done
