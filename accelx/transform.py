"""How transforms are made and put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from accelx import order
from accelx.records import Arrow, Loss, Out, Pass, Rules, Transform

identity: Transform = Transform()
"""The transform that does nothing: `chain(t, identity) == t` (L1)."""

ARROWS = (
    *("place", "start", "feed", "forward", "backward", "before", "after"),
    *("restore", "done"),
)


def chain(*transforms: Transform) -> Transform:
    """Put transforms one after the other and check their order.

    Each stage of the result runs the passes from left to right; `forward` and
    `backward` wrap, the left one inside. Associative (L2), also in what it refuses:
    rules are pairwise. Raises OrderError with the reason and a chain that works,
    TypeError if an argument is no Transform.
    """
    for i, one in enumerate(transforms):
        if not isinstance(one, Transform):  # type: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"chain wants transforms, got {_called(one)} as argument {i + 1}; "
                "call a factory such as accumulate(4), or wrap a function with "
                'transform("name", before=function)'
            )
    passes = tuple(p for one in transforms for p in one.passes)
    order.check(passes)
    return Transform(passes)


def check_transform(name: str, tx: object) -> None:
    """Refuse arguments in another order, before anything is done with them."""
    if not isinstance(tx, Transform):
        raise TypeError(
            f"ax.{name} wants a transform first, got {_called(tx)}; write "
            f"ax.{name}(tx, ...) with tx = ax.chain(...)"
        )


def _called(thing: object) -> str:
    name = getattr(thing, "__name__", None)
    return f"the function {name}" if callable(thing) and name else repr(thing)


@attrs.frozen(repr=False)
class Custom:
    """Spec of a pass that a user wrote; equal when name and functions are."""

    name: str
    arrows: tuple[tuple[str, Any], ...]
    rules: tuple[Rules, ...] = ()
    neutral: bool = False

    def __repr__(self) -> str:
        parts = [repr(self.name)]
        parts += [f"{k}={getattr(f, '__qualname__', repr(f))}" for k, f in self.arrows]
        parts += [f"rules={self.rules!r}"] if self.rules else []
        parts += ["neutral=True"] if self.neutral else []
        return f"transform({', '.join(parts)})"


def transform(
    name: str,
    *,
    place: Callable[[Any, Transform], Any] | None = None,
    start: Callable[[Any, Transform], Any] | None = None,
    feed: Callable[[Any], Any] | None = None,
    forward: Callable[[Loss], Loss] | None = None,
    backward: Callable[..., Any] | None = None,
    before: Arrow | None = None,
    after: Arrow | None = None,
    restore: Callable[[Any, Transform], Any] | None = None,
    done: Callable[[Any, Out | None], tuple[Any, Out | None]] | None = None,
    rules: Rules | tuple[Rules, ...] = (),
    neutral: bool = False,
) -> Transform:
    """Make a pass of your own out of functions; it takes part in everything.

    place, start: (State, Transform) -> State, once, before and after optimizers exist.
    feed: Loader -> Loader. forward: Loss -> Loss. backward: Grads -> Grads.
    before, after: (State, Out) -> (State, Out), around the update.
    restore: (State, Transform) -> State, once, after every pass has opened its slot.
    done: (State, Out) -> (State, Out) once the step is over, also a skipped one; after
    a batch of `measure` with None in place of the Out.
    A pass that remembers something keeps it in `state.slots[name]`. Claim `neutral`
    only for a pass that leaves the numbers of a run as they are (L4). Raises ValueError
    for a name that is no identifier, or no arrow at all.
    """
    every = (place, start, feed, forward, backward, before, after, restore, done)
    arrows: dict[str, Any] = dict(zip(ARROWS, every, strict=True))
    given = tuple((k, f) for k, f in arrows.items() if f is not None)
    if not name.isidentifier():
        raise ValueError(
            f"a pass is called by an identifier, got {name!r}; "
            f"write transform({''.join(c if c.isalnum() else '_' for c in name)!r}, "
            "...)"
        )
    if not given:
        raise ValueError(
            f"transform({name!r}) was given no function; write "
            f"transform({name!r}, before=function), or one of {', '.join(arrows)}"
        )
    one = Pass(name, None, rules=rules, neutral=neutral, **dict(given))
    spec = Custom(name, given, one.rules, neutral)
    return Transform((attrs.evolve(one, spec=spec),))
