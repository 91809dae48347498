"""How what ranks of a pipeline hold of one model is put together as the whole of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch

from accelx import comm
from accelx.env_part import parts
from accelx.errors import CheckpointError, PlacementError
from accelx.records import Env
from accelx.saves.boxes import Box, Ints, whole
from accelx.saves.contents import Contents
from accelx.saves.lie import Lie, Slice

if TYPE_CHECKING:
    from torch import nn

    from accelx.state import State


@attrs.frozen(eq=False)
class Absent:
    """What stands in a module for a weight or buffer that another stage holds."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Raise PlacementError: its numbers are not here."""
        given = [*args, *(kwargs or {}).values()]
        name = next(one.name for one in given if isinstance(one, cls))
        raise PlacementError(
            f"{name} is a weight of another stage, but forward uses it here by itself; "
            "let a module of each stage that uses it hold it as a parameter of its "
            "own, tied: head.weight = embed.weight"
        )

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError: there is a shape, and no numbers."""
        if name.startswith("__") or name in ("name", "shape", "dtype", "device"):
            raise AttributeError(name)  # of a copy that is being made
        raise AttributeError(
            f"{self.name} is a weight of another stage, of which there is no .{name} "
            "here; in a loss use what model(...) returns"
        )


def elsewhere(model: nn.Module) -> frozenset[str]:
    """Names of weights and buffers of this model that other stages hold."""
    found: set[str] = set()
    for where, module in model.named_modules(remove_duplicate=False):
        for leaf, thing in vars(module).items():
            if isinstance(thing, Absent):
                found.add(f"{where}.{leaf}".lstrip("."))
    return frozenset(found)


def ours(raw: Any, gone: frozenset[str]) -> Any:
    """Typed JSON without what is kept under the names `gone`."""
    if not gone or not isinstance(raw, dict):
        return raw
    return {k: ours(v, gone) for k, v in raw.items() if k not in gone}  # type: ignore[reportUnknownVariableType]


def stages_of(state: State) -> Any:
    """What ranks know of a pipeline that the model of `state` is cut into, or None."""
    placed = state.slots.get("shard_model")
    return None if placed is None else placed.stages


def check_selects(state: State, name: str, select: object) -> None:
    """Refuse to leave weights out where each rank knows of a part alone."""
    if select is not None and stages_of(state) is not None:
        raise CheckpointError(
            f"{name}(select=...) wants every rank to know all weights, but the model "
            f"is cut into stages; leave select out, got {select!r}"
        )


def merged(
    stages: Any, held: Contents, error: Exception | None
) -> tuple[Contents, Exception | None]:
    """The contents of the whole model: of other stages' tensors, how they lie.

    A collective of the ranks along the axis, also where one of them has an `error`.
    """
    told = (held.lies, held.aliases, held.values) if error is None else None
    each = comm.gather_objects(stages.env, told)
    if error is not None or any(one is None for one in each):
        return held, error
    columns = _ranks(stages.everyone)
    try:
        values = each[0][2]
        for one in each[1:]:
            values = _joined(values, one[2], "")
    except CheckpointError as odd:
        return held, odd
    aliases = {k: v for one in each for k, v in one[1].items()}
    lies = _lies([one[0] for one in each], columns)
    return attrs.evolve(held, values=values, aliases=aliases, lies=lies), None


def _ranks(everyone: Env) -> list[Ints]:
    """For each place along the axis the ranks that are there."""
    columns = parts(everyone.axes, ["stage"])
    return [tuple(sorted(ranks)) for ranks in zip(*columns, strict=True)]


def _lies(each: Sequence[Mapping[str, Lie]], ranks: list[Ints]) -> dict[str, Lie]:
    found: dict[str, list[tuple[Lie, Ints]]] = {}
    for lies, there in zip(each, ranks, strict=True):
        for name, one in lies.items():
            found.setdefault(name, []).append((one, there))
    return {name: _lie(those, len(each)) for name, those in found.items()}


def _lie(those: list[tuple[Lie, Ints]], count: int) -> Lie:
    first = those[0][0]
    if len(those) == count and all(one == first for one, _ in those):
        return first
    held: dict[Box, list[int]] = {}
    for one, ranks in those:
        box = whole(one.shape)
        full = () if 0 in one.shape else (Slice(box, ranks),)
        for piece in full if one.slices is None else one.slices:
            held.setdefault(piece.box, []).extend(piece.ranks)
    ordered = sorted(held.items(), key=lambda item: item[0].lo)
    slices = tuple(Slice(box, tuple(sorted(ranks))) for box, ranks in ordered)
    return attrs.evolve(first, slices=slices)


def _joined(one: Any, other: Any, path: str) -> Any:
    """Typed JSON of two stages as that of both."""
    if one == other:
        return one
    if isinstance(one, dict) and isinstance(other, dict):
        first: dict[str, Any] = one  # type: ignore[reportUnknownVariableType]
        second: dict[str, Any] = other  # type: ignore[reportUnknownVariableType]
        both: Iterable[str] = dict.fromkeys([*first, *second])
        return {k: _of_both(first, second, k, path) for k in both}
    if isinstance(one, list) and isinstance(other, list):
        pair: tuple[list[Any], list[Any]] = one, other
        if path.endswith(".params"):  # of an optimizer's group, by name
            return list(dict.fromkeys([*pair[0], *pair[1]]))
        if len(pair[0]) == len(pair[1]):
            each = enumerate(zip(*pair, strict=True))
            return [_joined(a, b, f"{path}.{i}") for i, (a, b) in each]
    raise CheckpointError(
        f"a checkpoint wants the same state on each stage, but they differ in "
        f"{path.lstrip('.')}: {str(one)[:60]} and {str(other)[:60]}; make it the same "
        "(ax.broadcast), or keep what is a rank's own out of the slots"
    )


def _of_both(one: dict[str, Any], other: dict[str, Any], key: str, path: str) -> Any:
    if key in one and key in other:
        return _joined(one[key], other[key], f"{path}.{key}")
    return one[key] if key in one else other[key]
