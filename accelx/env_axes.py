"""How ranks are laid out as named axes: what users write, held against the world."""

from __future__ import annotations

import math
from collections.abc import Mapping

from accelx.records import Axis

Axes = str | Mapping[str, int] | tuple[Axis, ...]


def lay_out(axes: Axes | None, world: int) -> tuple[Axis, ...]:
    """The axes of `world` ranks from "replicate=2,shard=-1", a mapping or Axis records.

    One size may be -1: it takes the ranks that are left. None is one axis "data".
    Raises ValueError where the sizes do not multiply to `world`.
    """
    if axes is None:
        return (Axis("data", world),)
    pairs = _pairs(axes)
    names = [name for name, _ in pairs]
    if not names or len(set(names)) < len(names) or not all(names):
        raise ValueError(
            f"axes want at least one name, each once, got {axes!r}; "
            'write for example axes="replicate=2,shard=-1"'
        )
    return tuple(Axis(name, size) for name, size in _filled(pairs, world))


def _pairs(axes: Axes) -> list[tuple[str, int]]:
    if isinstance(axes, str):
        return [_pair(part) for part in axes.split(",")]
    if isinstance(axes, Mapping):
        return list(axes.items())
    return [(axis.name, axis.size) for axis in axes]


def _pair(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    try:
        return name.strip(), int(size)
    except ValueError:
        raise ValueError(
            f'an axis is written "name=size", got {text.strip()!r}; '
            'write for example axes="replicate=2,shard=-1"'
        ) from None


def _filled(pairs: list[tuple[str, int]], world: int) -> list[tuple[str, int]]:
    known = math.prod(size for _, size in pairs if size > 0)
    open_ = [name for name, size in pairs if size == -1]
    bad = any(size < 1 and size != -1 for _, size in pairs)
    left, rest = divmod(world, known)
    if bad or len(open_) > 1 or rest or (not open_ and left != 1):
        raise ValueError(_remedy(pairs, world))
    return [(name, left if size == -1 else size) for name, size in pairs]


def _remedy(pairs: list[tuple[str, int]], world: int) -> str:
    shown = " × ".join(f"{name}={size}" for name, size in pairs)  # noqa: RUF001
    last = pairs[-1][0]
    others = math.prod(max(size, 1) for _, size in pairs[:-1])
    fits = f"use {last}={world // others}, or " if world % others == 0 else "use "
    fill = f"{last}=-1 to fill" if world % others == 0 else "sizes that multiply to it"
    return f"world {world} does not split into axes {shown}; {fits}{fill}"
