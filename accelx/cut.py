"""How a batch is cut into microbatches, and their reports put together."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any

import attrs
import torch
from torch import Tensor

from accelx import tree
from accelx.errors import DataError, LossError
from accelx.records import Mean, Out
from accelx.rows import Rows, leading, look, stamp
from accelx.state import State

Args = tuple[Any, ...]


def rows_in(args: Args, ranks: int) -> Rows:
    """How many real rows `args` holds here, and over `ranks`; total 0 where unknown."""
    marked, here = look(args)
    return unmarked(here, ranks) if marked is None else marked


@lru_cache(maxsize=64)  # they are few, and one takes 0.7 us
def unmarked(here: int | None, ranks: int) -> Rows:
    """The rows of a batch without a mark, whose tensors have `here` of them."""
    here = 1 if here is None else here
    return Rows(here, here if ranks == 1 else 0)


def cut(args: Args, n: int, ranks: int) -> list[Args]:
    """`args` as `n` groups of rows, the longer ones first, marked with their rows.

    A group without rows holds one row marked as no row: on several ranks it takes part
    in their collectives; on one it is left out. A batch that is padded to one shape is
    cut into groups of one shape, each with its own count of real rows.
    """
    rows = rows_in(args, ranks)
    length = leading(*args)
    if length is None:
        raise DataError(
            f"accumulate({n}) wants a batch with rows to cut, got no tensor with a "
            "dimension; give step the batch as an argument, or leave accumulate out"
        )
    if rows.padded:
        return _cut_padded(args, n, rows, length)
    if not rows.rows:
        none = attrs.evolve(rows, cut=n > 1)
        return [stamp(one, none) for one in pieces(args, "", [1] * n, repeat=True)]
    if rows.rows != length:
        raise DataError(
            f"the batch says that it has {rows.rows} rows here, but its tensors have "
            f"{length}; do not add or drop rows after ax.feed"
        )
    base, longer = divmod(length, n)
    sizes = [base + (i < longer) for i in range(n)]
    full = [size for size in sizes if size]
    parts = [
        stamp(one, Rows(size, rows.total, cut=n > 1))
        for one, size in zip(pieces(args, "", full), full, strict=True)
    ]
    if ranks > 1 and len(full) < n:
        none = Rows(0, rows.total, cut=True)
        extra = pieces(args, "", [1] * length)[:1] * (n - len(full))
        parts += [stamp(pieces(one, "", [1])[0], none) for one in extra]
    return parts


def _cut_padded(args: Args, n: int, rows: Rows, length: int) -> list[Args]:
    size, rest = divmod(length, n)
    if rest or rows.rows > length:
        raise DataError(
            f"accumulate({n}) wants to cut batches of one shape into microbatches of "
            f"one shape, got {length} rows here, of which {rows.rows} are real; "
            + _dividing(length)
        )
    parts = pieces(args, "", [size] * n)
    real = [min(max(rows.rows - i * size, 0), size) for i in range(n)]
    return [
        stamp(one, Rows(here, rows.total, padded=True, cut=n > 1))
        for one, here in zip(parts, real, strict=True)
    ]


def divisors(length: int) -> list[int]:
    """The numbers that divide `length`, the smallest first."""
    return [n for n in range(1, length + 1) if length % n == 0]


def _dividing(length: int) -> str:
    *others, last = map(str, divisors(length))
    which = f"{', '.join(others)} or {last}" if others else last
    return f"write accumulate(n) with n = {which}, and keep rows as ax.feed gave them"


def pieces(node: Any, path: str, sizes: list[int], repeat: bool = False) -> list[Any]:
    """`node` as a tree for each group of rows; written out, as each step does it."""
    if isinstance(node, Tensor):
        return _split_rows(node, path, sizes, repeat)
    kind = type(node)
    if kind is dict:
        items = [pieces(v, f"{path}[{k!r}]", sizes, repeat) for k, v in node.items()]
        return [
            dict(zip(node, values, strict=True)) for values in _across(items, sizes)
        ]
    if kind is tuple or (kind is list and not _per_row(node, sum(sizes))):
        items = [pieces(v, f"{path}[{i}]", sizes, repeat) for i, v in enumerate(node)]
        return [kind(values) for values in _across(items, sizes)]
    if kind is list:
        ends = accumulate(sizes)
        return [node[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    if isinstance(node, State) or not tree.children(node):
        return [node] * len(sizes)
    flat = tree.flatten(node, lambda inner: inner is not node)
    items = [pieces(v, path + key, sizes, repeat) for key, v in flat]
    return [
        tree.unflatten(node, values, lambda inner: inner is not node)
        for values in _across(items, sizes)
    ]


def _across(items: list[list[Any]], sizes: list[int]) -> list[tuple[Any, ...]]:
    """For each group its part of every item."""
    return list(zip(*items, strict=True)) if items else [()] * len(sizes)


def _split_rows(
    tensor: Tensor, path: str, sizes: list[int], repeat: bool
) -> list[Tensor]:
    if not tensor.dim():
        return [tensor.view_as(tensor) for _ in sizes]  # each takes its own mark
    length = 1 if repeat else sum(sizes)
    if tensor.size(0) != length:
        raise DataError(
            f"accumulate cuts {length} rows, but argument{path} has shape "
            f"{tuple(tensor.shape)}; expand it to {length} rows, make it 0-dim, or "
            "close over it in the loss"
        )
    return [tensor[:] for _ in sizes] if repeat else list(tensor.split(sizes))


def _per_row(node: list[Any], length: int) -> bool:
    """Whether `node` is a list of texts, numbers or the like, one for each row."""
    if len(node) != length:
        return False
    return not any(isinstance(leaf, Tensor) for leaf in tree.leaves(node))


def mean_of(out: Out) -> Mean:
    """The loss of a microbatch as total and weight."""
    if isinstance(out.loss, Mean):
        return out.loss
    if isinstance(out.weight, int) and out.weight == 0:
        return Mean(torch.zeros_like(torch.as_tensor(out.loss)), 0)
    return Mean(_wide(out.loss) * out.weight, out.weight)


def _wide(loss: Any) -> Any:
    """A half-precision loss in float32: times its rows it would overflow."""
    half = isinstance(loss, Tensor) and loss.dtype in (torch.float16, torch.bfloat16)
    return loss.float() if half else loss


def add(outs: list[Out]) -> Out:
    """One report for all microbatches; stays a plain mean over rows if they were."""
    if len(outs) == 1:
        return outs[0]
    weights = [out.weight for out in outs]
    aux = None
    if outs[0].aux is not None:
        aux = add_aux([out.aux for out in outs], weights)
    if any(isinstance(out.loss, Mean) for out in outs):
        means = [mean_of(out) for out in outs]
        total = torch.stack([torch.as_tensor(m.total) for m in means]).sum()
        weight = sum(weights[1:], start=weights[0])
        return attrs.evolve(outs[0], loss=Mean(total, weight), weight=weight, aux=aux)
    real = [out for out in outs if out.weight] or outs[:1]  # not a placeholder's nan
    losses = torch.stack([_wide(torch.as_tensor(out.loss)) for out in real])
    each = [out.weight for out in real]
    rows = torch.tensor(each, dtype=losses.dtype, device=losses.device)
    count = sum(weights)
    return Out(losses.dot(rows).div(count or 1), count, aux=aux)


def add_aux(parts: list[Any], weights: list[Any]) -> Any:
    """Means add, tensors with rows are joined; nothing else has a sum."""
    flat = [tree.flatten(part, _is_mean) for part in parts]
    values = [
        _joined(path, [f[i][1] for f in flat], weights)
        for i, (path, _) in enumerate(flat[0])
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
        f"aux{path} of the loss is a {type(first).__name__} for each microbatch, which "
        "does not add up to one for the batch; return ax.Mean(total, weight), or a "
        "tensor with one row a sample"
    )


def _nothing(weight: Any) -> bool:
    return isinstance(weight, int) and weight == 0


def _is_mean(node: Any) -> bool:
    return isinstance(node, Mean)
