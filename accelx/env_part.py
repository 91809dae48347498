"""The ranks that differ from this one along some axes alone, as an Env of their own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import attrs

from accelx.errors import PlacementError
from accelx.records import Axis, Env

MODEL = {
    "tensor": "shard_tensors",
    "sequence": "shard_sequence",
    "stage": "shard_stages",
}
"""Axes whose ranks get the same rows, and the pass that has them share the work."""
SAME = ("tensor", "stage")
"""Those of them whose ranks have one loss together; along others losses add up."""
INNER = ("expert", "tensor")
"""Axes of the nearest ranks, the nearest last."""


def along(env: Env, *names: str) -> Env:
    """The Env of the ranks that differ from this one along the axes `names` alone.

    Its `rank` and `world` count those ranks, outermost axis first; collectives with it
    run among them. `env` itself where `names` are all its axes. Pure. Raises
    PlacementError for an axis that `env` has not.
    """
    axes = env.axes or (Axis("data", env.world),)
    known = [axis.name for axis in axes]
    odd = [name for name in names if name not in known]
    if odd:
        raise PlacementError(
            f"along(env, {odd[0]!r}) wants an axis of this Env, which has "
            f"{', '.join(known)}; write env = ax.connect(axes="
            f'"{known[0]}=-1,{odd[0]}=2")'
        )
    if set(names) == set(known):
        return env
    at = coordinate(env.rank, axes)
    taken = [(axis, at[axis.name]) for axis in axes if axis.name in names]
    rank = 0
    for axis, index in taken:
        rank = rank * axis.size + index
    return attrs.evolve(
        env,
        rank=rank,
        world=math.prod(axis.size for axis, _ in taken),
        axes=tuple(axis for axis, _ in taken),
        whole=env.whole or axes,
    )


def innermost(name: str, env: Env, axis: str) -> None:
    """Refuse an Env where `axis`, of the pass `name`, is not the last of INNER. Pure.

    Behind the axis expert there may be tensor.
    """
    if env.world == 1:
        return
    along(env, axis)  # an axis of that name must be there
    sizes = {one.name: one.size for one in env.axes}
    last = [one for one in INNER[INNER.index(axis) :] if one in sizes]
    others = [one for one in sizes if one not in last]
    if list(sizes) == others + last:
        return
    shown = ",".join(f"{n}={sizes[n] if n in last else '...'}" for n in others + last)
    raise PlacementError(
        f"{name} wants the axis {axis} innermost, where ranks are nearest, got "
        f'({", ".join(sizes)}); write connect(axes="{shown}")'
    )


def coordinate(rank: int, axes: Sequence[Axis]) -> dict[str, int]:
    """Where a rank stands on each axis."""
    found: dict[str, int] = {}
    for axis in reversed(axes):
        rank, found[axis.name] = divmod(rank, axis.size)
    return found


def rows_env(env: Env) -> Env:
    """The ranks that get different rows of a batch, as an Env; `env` where all do."""
    return _without(env, tuple(MODEL))


def sums_env(env: Env) -> Env:
    """The ranks whose losses and gradients add up, as an Env; `env` where all do."""
    return _without(env, SAME)


def _without(env: Env, left: tuple[str, ...]) -> Env:
    names = [axis.name for axis in env.axes]
    kept = [name for name in names if name not in left]
    return env if len(kept) == len(names) else along(env, *kept)


def parts(whole: Sequence[Axis], names: Sequence[str]) -> list[list[int]]:
    """All ranks in groups that differ along `names` alone: each rank in one of them."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank, at in enumerate(itertools.product(*(range(a.size) for a in whole))):
        rest = [i for a, i in zip(whole, at, strict=True) if a.name not in names]
        found.setdefault(tuple(rest), []).append(rank)
    return list(found.values())
