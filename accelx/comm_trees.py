"""What becomes of each leaf when ranks gather, reduce, broadcast or pad a tree."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

from accelx.comm_ring import ring
from accelx.comm_wire import (
    Spec,
    dist,
    exchange,
    gather_bytes,
    group,
    grouped,
    is_tensor,
    pack,
    shown,
    spec_of,
    unpack,
    wire_device,
)
from accelx.env_part import rows_env
from accelx.errors import CollectiveError
from accelx.records import Mean
from accelx.tree import flatten, leaves, map_leaves, unflatten

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from accelx.records import Env

OPS = ("mean", "sum", "max", "min")
Told = dict[str, Any]  # what a rank tells of its tree: path -> Spec, or the leaf itself


def gather(env: Env, tree: Any) -> Any:
    """Every rank's leaves, in rank order, on every rank.

    Tensors are concatenated on dim 0; ranks may differ in that dim alone. A tensor of
    shape () counts as (1,), so it becomes (world,). Any other leaf becomes a list of
    the ranks' values. Lists are trees: one of strings gives a list of lists. One
    process gets the same types. Results are new. Tensors that are part of a graph stay
    so: backward, in which every rank takes part, adds up what ranks say of each row.
    Raises CollectiveError on every rank if the trees do not match.
    """
    env = rows_env(env)
    here = _told(tree)
    ranks = exchange(env, "gather", here, _rows_key)
    _agree("gather", ranks, _rows_key)
    paths = list(ranks[0])
    tensors = [path for path in paths if isinstance(here[path], Spec)]
    sizes = [sum(told[path].bytes for path in tensors) for told in ranks]
    own = dict(flatten(tree))
    buffer = pack(env, [own[path] for path in tensors], max(sizes))
    made: Told = {}
    if tensors:
        pieces = gather_bytes(env, buffer)
        parts = [
            unpack(env, piece, [told[path] for path in tensors])
            for piece, told in zip(pieces, ranks, strict=True)
        ]
        for path, part in zip(tensors, zip(*parts, strict=True), strict=True):
            made[path] = _stacked(part)
        _with_gradients(env, made, own, ranks)
    values = [made.get(p, [told[p] for told in ranks]) for p in here]
    return unflatten(tree, values)


def _with_gradients(env: Env, made: Told, own: Told, ranks: list[Told]) -> None:
    """Put into `made` again, with gradients, what is part of a graph."""
    paths = [path for path in made if any(told[path].grad for told in ranks)]
    if not paths:
        return
    _all_or_none(paths, ranks)
    from accelx.comm_grad import carried  # it loads torch

    starts = [
        sum(
            told[path].shape[0] if told[path].shape else 1 for told in ranks[: env.rank]
        )
        for path in paths
    ]

    def add(grad: Tensor) -> Tensor:
        flat = _flat(env, grad, _wire_dtype(spec_of(grad), "sum"))
        (total,) = _all_reduce(env, [flat], "SUM")
        return _restored(env, total, grad, "sum")

    whole = carried([made[p] for p in paths], starts, add, [own[p] for p in paths])
    made.update(zip(paths, whole, strict=True))


def _all_or_none(paths: list[str], ranks: list[Told]) -> None:
    """Refuse what is part of a graph on some ranks alone: backward would wait."""
    for path in paths:
        texts = ["in a graph" if told[path].grad else "in none" for told in ranks]
        if len(who := grouped(texts)) > 1:
            says = ", ".join(f"{text} on {those}" for text, those in who.items())
            raise CollectiveError(
                f"gather wants gradients for tree{path} on every rank or on none, but "
                f"it is {says}; detach() it where no gradient is wanted"
            )


def _stacked(parts: tuple[Tensor, ...]) -> Tensor:
    import torch

    return torch.cat([part if part.dim() else part.reshape(1) for part in parts])


def reduce(env: Env, tree: Any, op: str = "mean") -> Any:
    """Each leaf's mean, sum, max or min over the ranks; the tree itself is untouched.

    Tensors keep shape and dtype, but sums of integers and bools are exact int64 and
    means of them have the default float dtype; 16-bit floats are summed in float32.
    Numbers come back as numbers. A `Mean` adds up, whatever `op` is. Text and other
    leaves must be equal on all ranks and stay. Results carry no gradient.
    Raises CollectiveError on every rank if the trees do not match.
    """
    if op not in OPS:
        raise ValueError(
            f'reduce wants an op out of "mean", "sum", "max", "min", got {op!r}; '
            'write for example reduce(env, tree, "sum")'
        )
    env = rows_env(env)
    here = _told(tree)
    ranks = exchange(env, f'reduce(op="{op}")', here, _exact_key)
    _agree("reduce", ranks, _exact_key)
    own, ops = dict(flatten(tree)), _ops(tree, op)
    made: Told = {}
    jobs: dict[tuple[torch.dtype, str], list[str]] = {}
    for path in ranks[0]:
        if isinstance(here[path], Spec):
            key = _wire_dtype(here[path], ops[path]), _wire_op(ops[path])
            jobs.setdefault(key, []).append(path)
        else:
            made[path] = _reduced([told[path] for told in ranks], ops[path])
    for (dtype, wire_op), paths in jobs.items():
        flat = [_flat(env, own[path], dtype) for path in paths]
        sums = _all_reduce(env, flat, wire_op)
        for path, total in zip(paths, sums, strict=True):
            made[path] = _restored(env, total, own[path], ops[path])
    return unflatten(tree, [made[path] for path in here])


def _ops(tree: Any, op: str) -> dict[str, str]:
    """The op of each path: that of a Mean's two fields is always the sum."""
    ops: dict[str, str] = {}
    for path, leaf in flatten(tree, lambda node: isinstance(node, Mean)):
        inside = isinstance(leaf, Mean)
        for rest, _ in flatten(leaf):
            ops[path + rest] = "sum" if inside else op
    return ops


def _wire_op(op: str) -> str:
    return "SUM" if op in ("sum", "mean") else op.upper()


def _wire_dtype(spec: Spec, op: str) -> torch.dtype:
    """The dtype that the sum is taken in; complex numbers travel as pairs."""
    import torch

    if spec.dtype.is_complex:
        if op in ("max", "min"):
            raise CollectiveError(
                f"reduce wants numbers in an order for {op!r}, got {spec.dtype}; "
                'write "sum" or "mean", or reduce its absolute value'
            )
        return torch.float64 if spec.dtype == torch.complex128 else torch.float32
    if not spec.dtype.is_floating_point:
        return torch.int64
    return torch.float64 if spec.dtype == torch.float64 else torch.float32


def _flat(env: Env, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    import torch

    tensor = tensor.detach().to(wire_device(env))
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.reshape(-1).to(dtype)


def _all_reduce(env: Env, flat: list[Tensor], op: str) -> tuple[Tensor, ...]:
    import torch

    buffer = torch.cat(flat)  # a copy, also of one
    if env.world > 1:
        ours = group(env, "reduce")
        with ring().begin(env, "reduce"):
            dist().all_reduce(buffer, op=getattr(dist().ReduceOp, op), group=ours)
    return buffer.split([part.numel() for part in flat])


def _restored(env: Env, total: Tensor, like: Tensor, op: str) -> Tensor:
    """The reduced values in the shape, dtype and place of `like`."""
    import torch

    if like.is_complex():
        total = torch.view_as_complex(total.reshape(*like.shape, 2))
    total = total.reshape(like.shape)
    if like.is_complex() or like.is_floating_point():
        total = total / env.world if op == "mean" else total
        return total.to(like.device, like.dtype, copy=True)
    if op == "mean":
        exact = total.to("cpu", torch.float64) / env.world
        return exact.to(like.device, torch.get_default_dtype())
    return total.to(like.device, torch.int64 if op == "sum" else like.dtype, copy=True)


def _reduced(values: list[Any], op: str) -> Any:
    """Python numbers, exactly; anything else is equal on all ranks."""
    if not _is_number(values[0]):
        return values[0]
    if op in ("max", "min"):
        return max(values) if op == "max" else min(values)
    total = sum(values)
    return total / len(values) if op == "mean" else total


def broadcast(env: Env, tree: Any, src: int = 0) -> Any:
    """The tree of rank `src` on every rank: its structure, tensors and other leaves.

    Other ranks may pass None: what they pass is not read. `src` gets its own tree back,
    the others new tensors of the same dtype and shape, on the CPU where they are there
    on `src` and else on `env.device`. Leaves that are no tensors travel by pickle.
    """
    if not 0 <= src < env.world:
        raise ValueError(
            f"broadcast wants src in 0 to {env.world - 1}, got {src}; write a rank"
        )
    mine = env.rank == src
    shape = map_leaves(lambda x: spec_of(x) if is_tensor(x) else x, tree)
    shape = exchange(env, f"broadcast(src={src})", shape if mine else None)[src]
    if env.world == 1:
        return tree
    specs = [leaf for leaf in leaves(shape, _is_spec) if _is_spec(leaf)]
    tensors = [leaf for leaf in leaves(tree) if is_tensor(leaf)] if mine else []
    if specs:
        buffer = pack(env, tensors, sum(spec.bytes for spec in specs))
        ours = group(env, "broadcast")
        with ring().begin(env, "broadcast"):
            dist().broadcast(buffer, group=ours, group_src=src)
        tensors = tensors if mine else unpack(env, buffer, specs)
    rest = iter(tensors)
    if mine:
        return tree
    return map_leaves(lambda x: next(rest) if _is_spec(x) else x, shape, _is_spec)


def pad(
    env: Env, tree: Any, dim: int = 0, value: float = 0, first: bool = False
) -> Any:
    """Tensors filled up with `value` to the longest `dim` of any rank.

    At the end, or in front with `first`. Tensors without that dim, and other leaves,
    stay as they are. Numbers of dims and dtypes must match over the ranks.
    """
    env = rows_env(env)
    here = _told(tree)
    ranks = exchange(env, f"pad(dim={dim})", here, _dims_key)
    _agree("pad", ranks, _dims_key)
    made: list[Any] = []
    for path, leaf in flatten(tree):
        specs = [told[path] for told in ranks]
        if isinstance(specs[0], Spec) and -leaf.dim() <= dim < leaf.dim():
            leaf = _padded(leaf, max(s.shape[dim] for s in specs), dim, value, first)
        made.append(leaf)
    return unflatten(tree, made)


def _padded(tensor: Tensor, size: int, dim: int, value: float, first: bool) -> Tensor:
    import torch

    shape = list(tensor.shape)
    shape[dim] = size - tensor.shape[dim]
    if not shape[dim]:
        return tensor
    filler = torch.full(shape, value, dtype=tensor.dtype, device=tensor.device)
    return torch.cat([filler, tensor] if first else [tensor, filler], dim)


def gather_objects(env: Env, obj: Any) -> list[Any]:
    """Every rank's object, by pickle, in rank order: a list of `env.world`."""
    return exchange(env, "gather_objects", obj)


def _told(tree: Any) -> Told:
    return {
        path: spec_of(leaf) if is_tensor(leaf) else leaf for path, leaf in flatten(tree)
    }


def _agree(name: str, ranks: list[Told], key: Callable[[Any], object]) -> None:
    """Raise, on every rank alike, at the first path where ranks differ by `key`."""
    paths = {path: None for told in ranks for path in told}
    for path in paths:
        kinds = [key(told[path]) if path in told else None for told in ranks]
        if any(kind != kinds[0] for kind in kinds):
            texts = [shown(told[path]) if path in told else "nothing" for told in ranks]
            says = ", ".join(f"{t} on {who}" for t, who in grouped(texts).items())
            raise CollectiveError(
                f"{name} wants the same tree on every rank, but tree{path} is {says}; "
                f"{_REMEDY[name]}"
            )


_REMEDY = {
    "gather": "bring equal dtypes and shapes beyond dim 0, or pad(env, tree) first",
    "reduce": "bring equal dtypes and shapes, or gather(env, tree) them",
    "pad": "bring equal dtypes and as many dims",
}


def _rows_key(told: Any) -> object:
    if isinstance(told, Spec):
        return told.dtype, len(told.shape), told.shape[1:]
    return "value"


def _exact_key(told: Any) -> object:
    if isinstance(told, Spec):
        return told.dtype, told.shape
    return "number" if _is_number(told) else pickle.dumps(told)


def _dims_key(told: Any) -> object:
    return (told.dtype, len(told.shape)) if isinstance(told, Spec) else "value"


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (bool, int, float, complex))


def _is_spec(node: Any) -> TypeGuard[Spec]:  # a record, and so else a container
    return isinstance(node, Spec)
