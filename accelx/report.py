"""What a batch holds, and how many samples a step makes of it, as a table."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import attrs
from torch import Tensor

from accelx import tree
from accelx.cut import rows_in
from accelx.records import Transform
from accelx.rows import leading
from accelx.transform import check_transform

_HEADS = ("leaf", "shape", "dtype", "device")


@attrs.frozen(repr=False)
class Described:
    """A batch under a transform: its leaves, and the rows of one step."""

    leaves: tuple[tuple[str, str, str, str], ...]  # path, shape, dtype, device
    length: int  # rows here, with those that only pad
    rows: int  # real rows here: the first have weight 1, the rest 0
    total: int  # real rows over all ranks; 0 where this rank cannot know
    ranks: int
    microbatches: int  # n of accumulate
    each: tuple[int, int]  # rows of a microbatch on a rank: the least and the most

    @property
    def line(self) -> str:
        """The step as a product: 8 ranks x 4 rows x 2 microbatches = 64 samples."""
        least, most = self.each
        rows = str(most) if least == most else f"{least} to {most}"
        cut = (
            f"{rows} row{'s' * (most != 1)} x {_many(self.microbatches, 'microbatch')}"
        )
        if not self.total:
            return f"{cut} here; the batch does not say what other ranks have"
        product = f"{_many(self.ranks, 'rank')} x {cut}"
        space = self.ranks * self.microbatches * most if least == most else self.total
        pads = f", {space - self.total} rows only pad" if space > self.total else ""
        return f"{product} = {_many(self.total, 'sample')} a step{pads}"

    def __repr__(self) -> str:
        table = (_HEADS, *self.leaves)
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        of = f" of {self.total}" if self.total else ""
        here = f"here {self.rows}{of} rows of weight 1"
        if self.length > self.rows:
            here += f", {self.length - self.rows} of weight 0 (padding)"
        return "\n".join([*lines, here, self.line])


def describe(tx: Transform, batch: Any) -> Described:
    """The first-batch report: what `batch` of `ax.feed(tx, loader)` holds here.

    Prints as a table: path, shape, dtype and device of each leaf, the rows here and
    their weights, and ranks x rows x microbatches = samples a step. Pure: asks no other
    rank. The rows of other ranks follow from the batch's mark.
    """
    check_transform("describe", tx)
    placed = tx.find("shard_loader") or tx.find("shard_model")
    ranks = 1 if placed is None else placed.env.world
    cutting = tx.find("accumulate")
    n = 1 if cutting is None else cutting.n
    marked, here = rows_in((batch,), ranks), leading(batch)
    length = marked.rows if here is None else here
    if marked.padded:
        shares = [length]
    elif marked.total:
        ends = [marked.total * r // ranks for r in range(ranks + 1)]
        shares = [high - low for low, high in pairwise(ends)]
    else:
        shares = [marked.rows]
    each = min(shares) // n, -(-max(shares) // n)
    leaves = tuple(_row(path, leaf) for path, leaf in tree.flatten(batch, _plain))
    return Described(leaves, length, marked.rows, marked.total, ranks, n, each)


def _row(path: str, leaf: Any) -> tuple[str, str, str, str]:
    if isinstance(leaf, Tensor):
        dtype = str(leaf.dtype).removeprefix("torch.")
        return path or "batch", str(tuple(leaf.shape)), dtype, str(leaf.device)
    if isinstance(leaf, list):
        kinds = sorted({type(one).__name__ for one in leaf})  # type: ignore[reportUnknownVariableType]
        kind = f"list of {', '.join(kinds)}"
        return path or "batch", f"({len(leaf)},)", kind, ""  # type: ignore[reportUnknownArgumentType]
    return path or "batch", "", type(leaf).__name__, ""


def _plain(node: Any) -> bool:
    """Whether `node` is a list of texts, numbers or the like: one leaf, not many."""
    if not isinstance(node, list):
        return False
    return not any(isinstance(one, Tensor) for one in tree.leaves(node))


def _many(count: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{count} {noun if count == 1 else plural}"
