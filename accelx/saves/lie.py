"""How a tensor lies over ranks: which slices there are, and who holds each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import attrs
from torch import Tensor

from accelx import _torch
from accelx.errors import CheckpointError
from accelx.saves.boxes import Box, Ints, whole
from accelx.saves.dtypes import KINDS
from accelx.saves.flat import Flat, Held, boxes, pieces


@attrs.frozen
class Slice:
    """A slice of a tensor and the ranks that hold it, each of them all of it."""

    box: Box
    ranks: Ints


@attrs.frozen
class Lie:
    """How one tensor lies. `slices` is None where every rank holds it whole."""

    dtype: str  # torch's name
    shape: Ints  # of the whole
    slices: tuple[Slice, ...] | None = None


def lie(name: str, tensor: Held, memo: dict[Any, Any]) -> Lie:
    """How `tensor` lies. `memo` is the caller's, for the tensors of its states."""
    one: Any = tensor
    if isinstance(tensor, Flat):
        cuts = tensor.runs
    elif _torch.is_dtensor(tensor):
        cuts = id(one.device_mesh), one.placements
    else:
        cuts = None
    key = tensor.dtype, tensor.shape, cuts
    if key not in memo:
        if cuts is not None and not isinstance(tensor, Flat):
            memo["mesh", cuts[0]] = one.device_mesh  # no other may have its id
        dtype, shape = _named(name, tensor), tuple(tensor.shape)
        memo[key] = Lie(dtype, shape, _all(name, tensor, (shape, cuts), memo))
    return memo[key]


def _named(name: str, tensor: Held) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in KINDS:
        raise CheckpointError(
            f"{name} wants a dtype that a checkpoint has a form for, got "
            f"{tensor.dtype}; save the plain tensors that it is made of"
        )
    return dtype


def _all(
    name: str, tensor: Held, key: Any, memo: dict[Any, Any]
) -> tuple[Slice, ...] | None:
    """Every rank's slices; the same object for tensors that are cut alike."""
    if key[1] is None:
        return None
    if key not in memo:
        memo[key] = _runs(tensor) if isinstance(tensor, Flat) else _slices(name, tensor)
    return memo[key]


def _runs(tensor: Flat) -> tuple[Slice, ...]:
    return tuple(
        Slice(box, (rank,))
        for rank, run in enumerate(tensor.runs)
        for box in boxes(run, tensor.shape)
    )


def _slices(name: str, tensor: Any) -> tuple[Slice, ...]:
    if any(p.is_partial() for p in tensor.placements):
        raise CheckpointError(
            f"{name} wants to be whole or in slices, but its ranks hold parts of a sum "
            f"({tensor.placements}); reduce it first: tensor.redistribute(...)"
        )
    mesh = tensor.device_mesh.mesh
    held: dict[Box, list[int]] = {}
    for at in itertools.product(*map(range, mesh.shape)):
        box = box_at(tensor, at)
        if box is not None:
            held.setdefault(box, []).append(int(mesh[at]))
    ordered = sorted(held.items(), key=lambda item: item[0].lo)
    return tuple(Slice(box, tuple(ranks)) for box, ranks in ordered)


def box_at(tensor: Any, coordinate: Sequence[int]) -> Box | None:
    """What the rank at a coordinate of the mesh holds of a DTensor."""
    size, offset = _torch.local_box(
        tuple(tensor.shape),
        tuple(tensor.device_mesh.mesh.shape),
        list(coordinate),
        tensor.placements,
    )
    if 0 in size:
        return None
    return Box(offset, tuple(o + n for o, n in zip(offset, size, strict=True)))


def local_at(tensor: Held, box: Box) -> Tensor:
    """The memory of `box`, one of those that `lie` says this rank holds."""
    return dict(pieces(tensor))[box] if isinstance(tensor, Flat) else local_of(tensor)


def local_of(tensor: Tensor) -> Tensor:
    """The memory that this rank holds of `tensor`, without gradients."""
    return _torch.local_of(tensor) if _torch.is_dtensor(tensor) else tensor.detach()


def here(tensor: Held, memo: dict[Any, Any]) -> list[tuple[Box, Tensor]]:
    """Which boxes of `tensor` this rank holds, and the memory that each lies in.

    `memo` is the caller's, for tensors that lie alike.
    """
    if isinstance(tensor, Flat):
        return pieces(tensor)
    if not _torch.is_dtensor(tensor):
        box = whole(tensor.shape)
        return [] if 0 in tensor.shape else [(box, local_of(tensor))]
    one: Any = tensor
    key = (tuple(one.shape), id(one.device_mesh), one.placements, "here")
    if key not in memo:
        coordinate = one.device_mesh.get_coordinate()
        memo[key] = None if coordinate is None else box_at(one, coordinate)
    return [] if memo[key] is None else [(memo[key], local_of(one))]
