"""How a batch is cut into microbatches, and their reports put together."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from accelx import tree
from accelx.errors import DataError, LossError
from accelx.records import Mean, Out
from accelx.rows import Rows, leading, rows_of, stamp
from accelx.state import State

Args = tuple[Any, ...]


def rows_in(args: Args, ranks: int) -> Rows:
    """How many real rows `args` holds here, and over `ranks`; total 0 where unknown."""
    marked = rows_of(*args)
    if marked is not None:
        return marked
    here = leading(*args)
    here = 1 if here is None else here
    return Rows(here, here if ranks == 1 else 0)


def cut(args: Args, n: int, ranks: int) -> list[Args]:
    """`args` as `n` groups of rows, the longer ones first, marked with their rows.

    A group without rows holds one row marked as no row: on several ranks it takes part in
    their collectives; on one it is left out.
    """
    rows = rows_in(args, ranks)
    length = leading(*args)
    if length is None:
        raise DataError(
            f"accumulate({n}) wants a batch with rows to cut, got no tensor with a "
            "dimension; give step the batch as an argument, or leave accumulate out"
        )
    if not rows.rows:
        return [stamp(_part(args, 0, 1, length), rows) for _ in range(n)]
    if rows.rows != length:
        raise DataError(
            f"the batch says that it has {rows.rows} rows here, but its tensors have "
            f"{length}; do not add or drop rows after ax.feed"
        )
    base, longer = divmod(length, n)
    parts, low = list[Args](), 0
    for i in range(n):
        size = base + (i < longer)
        if size or ranks > 1:
            part = _part(args, low, low + size, length) if size else _part(args, 0, 1, length)
            parts.append(stamp(part, Rows(size, rows.total)))
        low += size
    return parts


def _part(args: Args, low: int, high: int, length: int) -> Args:
    def one(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim():
            if leaf.size(0) != length:
                raise DataError(
                    f"accumulate cuts {length} rows, but argument{path} has shape "
                    f"{tuple(leaf.shape)}; expand it to {length} rows, make it 0-dim, or "
                    "close over it in the loss"
                )
            return leaf[low:high]
        if _per_row(leaf, length):
            return leaf[low:high]
        return leaf

    def is_leaf(node: Any) -> bool:
        return _per_row(node, length) or isinstance(node, State)

    flat = tree.flatten(args, is_leaf)
    return tree.unflatten(args, [one(path, leaf) for path, leaf in flat], is_leaf)


def _per_row(node: Any, length: int) -> bool:
    """Whether `node` is a list of texts, numbers or the like, one for each row."""
    if not isinstance(node, list) or len(node) != length:  # type: ignore[reportUnknownArgumentType]
        return False
    return not any(isinstance(leaf, Tensor) for leaf in tree.leaves(node))


def mean_of(out: Out) -> Mean:
    """The loss of a microbatch as total and weight."""
    if isinstance(out.loss, Mean):
        return out.loss
    if isinstance(out.weight, int) and out.weight == 0:
        return Mean(torch.zeros_like(out.loss), 0)  # type: ignore[reportArgumentType]
    return Mean(out.loss * out.weight, out.weight)


def add(outs: list[Out]) -> Out:
    """One report for all microbatches; stays a plain mean over rows if they were."""
    if len(outs) == 1:
        return outs[0]
    means = [mean_of(out) for out in outs]
    whole = Mean(
        torch.stack([torch.as_tensor(m.total) for m in means]).sum(),
        sum((m.weight for m in means[1:]), start=means[0].weight),
    )
    aux = add_aux([out.aux for out in outs], [out.weight for out in outs])
    if any(isinstance(out.loss, Mean) for out in outs):
        return attrs.evolve(outs[0], loss=whole, weight=whole.weight, aux=aux)
    return attrs.evolve(
        outs[0], loss=whole.total / max(1, whole.weight), weight=whole.weight, aux=aux
    )


def add_aux(parts: list[Any], weights: list[Any]) -> Any:
    """Means add, tensors with rows are joined; nothing else has a meaning over parts."""
    flat = [tree.flatten(part, _is_mean) for part in parts]
    values = [
        _joined(path, [f[i][1] for f in flat], weights) for i, (path, _) in enumerate(flat[0])
    ]
    return tree.unflatten(parts[0], values, _is_mean)


def _joined(path: str, leaves: list[Any], weights: list[Any]) -> Any:
    first = leaves[0]
    if isinstance(first, Mean):
        return Mean(
            torch.stack([torch.as_tensor(m.total) for m in leaves]).sum(),
            torch.stack([torch.as_tensor(m.weight) for m in leaves]).sum(),
        )
    if first is None:
        return None
    if isinstance(first, Tensor) and first.dim():
        real = [x for x, w in zip(leaves, weights, strict=True) if not _nothing(w)]
        return torch.cat(real or [first[:0]])
    raise LossError(
        f"aux{path} of the loss is a {type(first).__name__} for each microbatch, which does "
        "not add up to one for the batch; return ax.Mean(total, weight), or a tensor with "
        "one row a sample"
    )


def _nothing(weight: Any) -> bool:
    return isinstance(weight, int) and weight == 0


def _is_mean(node: Any) -> bool:
    return isinstance(node, Mean)
