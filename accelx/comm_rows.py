"""The rows of a batch, from every rank: each sample once, in the dataset's order."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, is_grad_enabled

from accelx import tree
from accelx.comm_trees import gather, gather_objects
from accelx.comm_wire import exchange
from accelx.env_part import rows_env
from accelx.errors import DataError
from accelx.records import Env
from accelx.rows import leading, rows_of

T = TypeVar("T")


def gather_rows(env: Env, values: T, batch: Any) -> T:
    """What each rank computed for its rows of `batch`, as rows of the whole batch.

    `values` is a tree of tensors with one row a sample, and of lists with one entry a
    sample (texts, ragged tensors), as computed from a batch of `ax.feed`. A list of
    tensors that have all rows on every rank is a list of columns. Rows that only pad
    are left out, so every sample comes once, in order, on every rank. Gradients flow
    back to the rank of each row, as through `gather`. Raises DataError for a leaf with
    another number of rows, and for one with gradients of a microbatch, which is not the
    whole batch; CollectiveError for trees that differ over ranks.
    """
    marked, here = rows_of(batch), leading(batch)
    real = marked.rows if marked is not None else here
    if marked is not None and not marked.padded:
        here = max(1, marked.rows)  # its first tensor may be of other things than rows
    if real is None or here is None:
        raise DataError(
            f"gather_rows wants the batch that the values were computed from, got "
            f"{type(batch).__name__} without a tensor; give it what ax.feed yielded"
        )

    env = rows_env(env)
    found = _lists(env, values, here)

    def listed(node: Any) -> bool:
        return id(node) in found

    flat = tree.flatten(values, listed)
    if marked is not None and marked.cut:
        _check_no_gradients(flat)
    joined = [_joined(env, path, leaf, real, here) for path, leaf in flat]
    return tree.unflatten(values, joined, listed)


def _check_no_gradients(flat: list[tuple[str, Any]]) -> None:
    for path, leaf in flat:
        if isinstance(leaf, Tensor) and leaf.requires_grad and is_grad_enabled():
            raise DataError(
                "gather_rows wants the whole batch for a loss that compares its rows, "
                f"got values{path} of a microbatch, whose rows would not see the "
                "others; leave accumulate out (remat saves memory, too), or detach() "
                "what is only reported"
            )


def _lists(env: Env, values: Any, here: int) -> set[int]:
    """The lists with one entry a sample, by id: all ranks find the same.

    What a list is must not depend on how many rows this rank happens to have.
    """
    outer = tree.flatten(values, lambda node: isinstance(node, list))
    lists = [(path, node) for path, node in outer if isinstance(node, list)]
    if not lists:
        return set()
    own = {path: (len(node) == here, _columns(node, here)) for path, node in lists}
    every = exchange(env, "gather_rows", own)
    found = set[int]()
    for path, node in lists:
        told = [one.get(path, (False, False)) for one in every]
        if all(fits for fits, _ in told) and not all(columns for _, columns in told):
            found.add(id(node))
        elif all(columns for _, columns in told):
            found |= _lists(env, tuple(node), here)
    return found


def _columns(node: list[Any], here: int) -> bool:
    """Whether each tensor in a list has all rows."""
    inner = tree.leaves(node)
    return bool(inner) and all(
        isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.size(0) == here
        for leaf in inner
    )


def _joined(env: Env, path: str, leaf: Any, real: int, here: int) -> Any:
    if isinstance(leaf, list):
        parts = gather_objects(env, leaf[:real])  # type: ignore[reportUnknownArgumentType]
        return [row for part in parts for row in part]
    if isinstance(leaf, Tensor) and leaf.dim() and leaf.size(0) == here:
        return gather(env, leaf[:real])
    shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
    raise DataError(
        f"gather_rows wants {here} rows in values{path}, got {shape}; give one row or "
        "one list entry a sample, and use ax.reduce for a number of the whole batch"
    )
