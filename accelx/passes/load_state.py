"""Where a run goes on from: what was saved, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from accelx.match import Selector
from accelx.records import Env, Pass, Rules, Transform, check_env, code


@attrs.frozen(repr=False)
class LoadState:
    """Spec of load_state."""

    env: Env
    url: str
    missing: str = "error"
    rename: Any = None
    only: Any = None
    verify: str = "touched"
    fallback: bool = False

    def __repr__(self) -> str:
        return code("load_state", self)

    def fills(self, name: str) -> bool:
        """Whether the weight `name` gets its numbers here, or an error is raised."""
        from accelx.saves.load import takes

        return self.missing == "error" and takes(self.only, f"model.{name}")


def load_state(
    env: Env,
    url: str,
    missing: str = "error",
    *,
    rename: Any = None,
    only: Selector | tuple[Selector, ...] | None = None,
    verify: str = "touched",
    fallback: bool = False,
) -> Transform:
    """Start from the newest checkpoint under `url`, or from the one that `url` names.

    Restores weights, optimizers, slots, step, data position (`feed(start=state)`) and
    random streams: on the same ranks to the bit, on others to rounding (L5, L6). Each
    rank reads the bytes that it needs, straight into its slices. `state.slots
    ["load_state"]` says what was loaded.

    missing: "error", or "fresh" to start without a checkpoint where none is whole.
    rename: {name in the file: name here}, or a function of the former, for weights.
    only: globs over "model.NAME", "optim.I.groups", "optim.I.state", "slots.NAME",
    "step", "skipped", "random", or a function (name, None) -> bool; what it does not
    take stays as it is. verify: "touched" checks the digests of the bytes that are
    read, "full" those of all bytes first, "off" none. fallback: whether to take the
    checkpoint before a damaged one, with a warning.

    Alone, `load_state(env, url)(state)` gives the state back as it was saved and spends
    the one it was given; gradients that waited for `apply` are dropped.

    Raises CheckpointError with names where checkpoint and state do not fit, and
    DamagedError with file, tensor and bytes. Effects: reads the store, fills the model
    in place, collectives.
    """
    check_env("load_state", env)
    _choice("missing", missing, ("error", "fresh"))
    _choice("verify", verify, ("touched", "full", "off"))
    kept = tuple(only) if isinstance(only, list) else only
    spec = LoadState(env, str(url), missing, rename, kept, verify, fallback)

    def restore(state: Any, tx: Transform) -> Any:
        return _restored(spec, state)

    rules = Rules(once=True, why="a run starts from one checkpoint")
    one = Pass("load_state", spec, restore=restore, alone=_alone(spec), rules=rules)
    return Transform((one,))


def _restored(spec: LoadState, state: Any) -> Any:
    import torch

    from accelx.saves.choose import Wish, restored

    wish = Wish(spec.missing, spec.rename, spec.only, spec.verify, spec.fallback)
    # moments of weights that are trained must be as they are, wherever this is called
    with torch.inference_mode(any(p.is_inference() for p in state.model.parameters())):
        return restored(spec.env, state, spec.url, wish)


def _alone(spec: LoadState) -> Callable[[Any], Any]:
    def alone(state: Any) -> Any:
        from accelx.state import check_state, spend

        check_state("load_state", state)
        loaded = _restored(spec, state)
        if loaded.pending:  # gradients of the weights that were there
            loaded.model.zero_grad(set_to_none=True)
            loaded = attrs.evolve(loaded, pending=False)
        spend(state, "load_state")
        return loaded

    return alone


def _choice(name: str, got: str, choices: tuple[str, ...]) -> None:
    if got not in choices:
        raise ValueError(
            f"load_state({name}=...) wants one of {', '.join(map(repr, choices))}, got "
            f"{got!r}; write {name}={choices[0]!r}"
        )
