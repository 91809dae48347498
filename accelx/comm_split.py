"""Which items of a collection are this rank's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from accelx.env_part import rows_env
from accelx.errors import DataError

if TYPE_CHECKING:
    from accelx.records import Env

_REMEDY = "pass a list, a tuple, a dict of these, a tensor or a map-style Dataset"


def split(env: Env, items: Any, pad: bool = False) -> Any:
    """This rank's part of `items`, in order; `items` itself is untouched.

    `items` is a list, tuple, tensor (along dim 0), dict of these with equal lengths, or
    map-style Dataset (gives a Subset). Of m items rank r of w gets those from
    `m * r // w` up to `m * (r + 1) // w`, as of a batch of `feed`: what is drawn for a
    whole batch lies beside its rows. With `pad` all get as many, by repeating a rank's
    last item, or the last of all where it has none. No communication: every rank must
    bring the same items.
    Raises DataError for other types and for dicts of unequal lengths.
    """
    env = rows_env(env)
    taken = share(_length(items), env.world, env.rank, pad)
    return _take(items, taken)


def share(count: int, world: int, rank: int, pad: bool = False) -> list[int]:
    """The indices of `count` items that are rank `rank`'s."""
    own = list(range(count * rank // world, count * (rank + 1) // world))
    if pad and len(own) < -(-count // world):
        own.append(own[-1] if own else count - 1)
    return own


def _length(items: Any) -> int:
    if isinstance(items, dict):
        return _common_length(cast("dict[Any, Any]", items))
    kind = _kind(items)
    if kind is None:
        raise DataError(
            f"split wants items in order, got {type(items).__name__}; {_REMEDY}"
        )
    return len(items)


def _common_length(items: dict[Any, Any]) -> int:
    lengths = {key: _length(value) for key, value in items.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"split wants a dict whose values are equally long, got lengths {lengths}; "
            "cut them to one length first"
        )
    return next(iter(lengths.values()), 0)


def _take(items: Any, indices: list[int]) -> Any:
    if isinstance(items, dict):
        pairs = cast("dict[Any, Any]", items).items()
        return {key: _take(value, indices) for key, value in pairs}
    take = _kind(items)
    assert take is not None, "the length was asked first"
    return take(items, indices)


def _kind(items: Any) -> Callable[[Any, list[int]], Any] | None:
    """How items of this type are taken by index; None where they are not."""
    import torch
    from torch.utils.data import Dataset, IterableDataset, Subset

    if type(items) in (list, tuple):
        return lambda whole, indices: type(whole)(whole[i] for i in indices)
    if isinstance(items, torch.Tensor) and items.dim():
        return lambda whole, indices: whole[indices]
    if isinstance(items, Dataset) and not isinstance(items, IterableDataset):
        return Subset
    return None
