"""Which tokens of a sequence each rank holds, and what a pass knows while it runs."""

from __future__ import annotations

import itertools
from typing import Any

import attrs
import torch
from torch import Tensor

from accelx import tree
from accelx.errors import DataError
from accelx.records import Env
from accelx.rows import rows_of, stamp
from accelx.state import State

Named = tuple[str | int, ...]


@attrs.frozen
class Layout:
    """A sequence in equal chunks over `world` ranks.

    `zigzag` gives rank r the chunks r and 2 * world - 1 - r, so that each rank has the
    same work where a token attends to those before it; else each has one chunk.
    """

    rank: int
    world: int
    zigzag: bool

    @property
    def parts(self) -> int:
        """In how many chunks a sequence is cut."""
        return self.world * (2 if self.zigzag else 1)

    def chunks(self, rank: int) -> tuple[int, ...]:
        """Which of them a rank holds, in its order."""
        return (rank, self.parts - 1 - rank) if self.zigzag else (rank,)

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor that has the whole sequence along `dim`."""
        size = tensor.size(dim) // self.parts
        own = [tensor.narrow(dim, c * size, size) for c in self.chunks(self.rank)]
        return torch.cat(own, dim) if len(own) > 1 else own[0]

    def whole(self, pieces: tuple[Tensor, ...], dim: int) -> Tensor:
        """The whole sequence, from every rank's part of it."""
        held = [self.chunks(rank) for rank in range(self.world)]
        cut = [p.chunk(len(own), dim) for p, own in zip(pieces, held, strict=True)]
        order = zip(itertools.chain(*held), itertools.chain(*cut), strict=True)
        return torch.cat([part for _, part in sorted(order, key=lambda x: x[0])], dim)

    def positions(self, length: int, device: Any) -> Tensor:
        """Where this rank's tokens stand in a sequence of `length`: (here,) int64."""
        return self.take(torch.arange(length, device=device), 0)


@attrs.define(eq=False)
class Site:
    """What one `shard_sequence` shares among the models and losses that it runs in."""

    env: Env  # of the ranks along the sequence
    layout: Layout
    mode: str
    dim: int
    here: int | None = None  # tokens of a row on this rank, while a step is under way
    attended: bool = False  # whether attention was exchanged in this loss
    staged: bool = False  # a rank has some layers alone: it is seen on shapes of all
    uneven: str | None = None  # why a mean in this loss is not that of all tokens

    def close(self) -> None:
        """The step is over: modules called from now on hold whole sequences."""
        self.here = None


def cut(site: Site, args: tuple[Any, ...], named: Named) -> tuple[Any, ...]:
    """`args` with this rank's tokens of each tensor that has the sequence.

    Those are `named`, by key or index, or else all whose size along the sequence's
    dimension is that of the first which has it. Row marks stay. Sets `site.here`.
    """
    flat = [(p, x) for p, x in tree.flatten(args, _kept) if isinstance(x, Tensor)]
    taken = _named(flat, named) if named else flat
    taken = [(p, x) for p, x in taken if x.dim() > site.dim]
    if not taken:
        raise DataError(
            f"shard_sequence wants a batch with tensors of tokens (rows, length), got "
            f"{', '.join(str(tuple(x.shape)) for _, x in flat) or 'no tensor'}; give "
            "step the batch as an argument, or name the dimension: dim=0"
        )
    length = taken[0][1].size(site.dim)
    odd = [(p, x) for p, x in taken if x.size(site.dim) != length]
    if named and odd:
        raise DataError(
            f"shard_sequence(tensors=...) wants tensors of one length along dim="
            f"{site.dim}, got {_shown([taken[0], odd[0]])}; leave out what is whole on "
            "every rank"
        )
    _divides(site.layout, length)
    site.here, site.uneven = length // site.layout.world, None
    ids = {id(x) for _, x in taken if x.size(site.dim) == length}
    marks = rows_of(*args)

    def one(leaf: Any) -> Any:
        return site.layout.take(leaf, site.dim) if id(leaf) in ids else leaf

    made = tree.map_leaves(one, args, _kept)
    return made if marks is None else stamp(made, marks)


def _kept(node: Any) -> bool:
    return isinstance(node, State)


def _named(flat: list[tuple[str, Tensor]], named: Named) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for name in named:
        ends = (f"[{name!r}]", f".{name}")
        mine = [(p, x) for p, x in flat if p.endswith(ends)]
        if not mine:
            raise DataError(
                f"shard_sequence(tensors=...) wants names of tensors in the batch, but "
                f"there is no {name!r} in {', '.join(p for p, _ in flat)}; write keys "
                'or indices, such as tensors=("input_ids", "labels") or tensors=(0, 1)'
            )
        found += mine
    return found


def _shown(pairs: list[tuple[str, Tensor]]) -> str:
    return " and ".join(f"{path} {tuple(x.shape)}" for path, x in pairs)


def _divides(layout: Layout, length: int) -> None:
    if length % layout.parts == 0 and length:
        return
    longer = (length // layout.parts + 1) * layout.parts
    raise DataError(
        f"shard_sequence cuts sequences in {layout.parts} equal chunks over "
        f"{layout.world} ranks, got a length of {length}; pad to {longer} where "
        "batches are made, with tokens of weight 0 in an ax.Mean (and masked as keys, "
        "where attention looks ahead)"
    )
