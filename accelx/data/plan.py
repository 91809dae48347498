"""Which rows each rank reads at which step, and how many of a batch's rows are real."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelx.data.orders import Order, Own, Seeded
from accelx.data.walks import Walk, keyed
from accelx.errors import DataError
from accelx.permutation import key
from accelx.rows import Rows, Waited

if TYPE_CHECKING:
    from accelx.loader import Loader

BLOCK = 32768  # positions whose indices are computed at once, 256 KiB; first a quarter
Unpack = Callable[[Tensor], Iterable[Any]]  # (batches, rows) int64 -> indices of each


class Asked(list[int]):
    """Indices of one batch for a dataset that wants to know the epoch."""

    epoch: int = 0


def inside(dataset: Any) -> list[Any]:
    """The datasets that a Subset, a ConcatDataset or a wrapper of the user's reads."""
    found: Any = getattr(dataset, "dataset", None)
    many: Any = getattr(dataset, "datasets", ())
    many = list(many.values() if hasattr(many, "values") else many)
    direct = [one for one in (found, *many) if one is not None]
    return [*direct, *(deep for one in direct for deep in inside(one))]


def listeners(dataset: Any) -> list[Any]:
    """What wants to know the epoch: the dataset, or else those inside it."""
    if hasattr(dataset, "set_epoch"):
        return [dataset]
    each = {id(one): one for one in inside(dataset) if hasattr(one, "set_epoch")}
    return list(each.values())


def order_of(loader: Loader) -> Order:
    """The order by arithmetic: the sampler's, the dataset's own, or the seeded one."""
    if loader.order is not None:
        return loader.order
    n = len(loader.dataset)
    if hasattr(loader.dataset, "order_at"):
        assert loader.batch_size is not None, "only walks have none"
        return Own(loader.dataset, n, loader.shuffle, loader.batch_size)
    return Seeded(n, loader.shuffle)


def seed_of(loader: Loader) -> int:
    """The seed of the order: the loader's, with what a generator adds."""
    if loader.salt is None:
        return loader.seed
    return key(loader.seed, loader.salt) >> 1


def length(loader: Loader, epoch: int = 0) -> int:
    """Batches of an epoch."""
    if loader.walk is not None:
        return loader.walk.count(seed_of(loader), epoch)
    n, size = _counts(loader)
    return n // size if loader.drop_last else -(-n // size)


def start_of(loader: Loader, epoch: int) -> int:
    """The step at which `epoch` begins."""
    if loader.walk is not None and not loader.walk.constant:
        return sum(length(loader, earlier) for earlier in range(epoch))
    return epoch * length(loader)


def end_of(loader: Loader, step: int) -> int:
    """The step after the epoch that `step` lies in."""
    if loader.walk is not None:
        epoch, i = loader.walk.find(seed_of(loader), step)
        return step - i + length(loader, epoch)
    each = length(loader)
    return (step // each + 1) * each if each else step


def _counts(loader: Loader) -> tuple[int, int]:
    """Items of an epoch, and of a batch; both by arithmetic."""
    assert loader.batch_size is not None, "only walks have none"
    order = loader.order
    n = len(loader.dataset) if order is None else order.length
    return n, loader.batch_size


def total(loader: Loader, i: int) -> int:
    """Rows of the i-th batch of an epoch."""
    n, size = _counts(loader)
    return min(size, n - i * size)


def share(loader: Loader, m: int) -> tuple[int, int]:
    """Of a batch of m rows this rank's: from the first number up to the second."""
    return m * loader.rank // loader.world, m * (loader.rank + 1) // loader.world


def rows(loader: Loader, m: int, waited: Waited | None) -> Rows:
    """The mark of a batch of m rows."""
    low, high = share(loader, m)
    return Rows(high - low, m, loader.static_shapes, waited)


def marks(loader: Loader, start: int, waited: Waited | None) -> Iterator[Rows]:
    """The marks of the batches from step `start` on, by arithmetic."""
    n, size = _counts(loader)
    each, full = length(loader), n // size
    whole, short = (rows(loader, m, waited) for m in (size, n - full * size))
    for step in itertools.count(start):
        yield short if step % each >= full else whole


def indices(
    loader: Loader, start: int, stop: int, unpack: Unpack, marked: deque[Rows]
) -> Iterator[Any]:
    """What this rank reads at each step; a walk tells `marked` of each batch's rows."""
    if loader.walk is not None:
        return _walked(loader, loader.walk, start, stop, unpack, marked)
    return _computed(loader, start, stop, unpack)


def _walked(
    loader: Loader,
    walk: Walk,
    start: int,
    stop: int,
    unpack: Unpack,
    marked: deque[Rows],
) -> Iterator[Any]:
    n, told = len(loader.dataset), bool(listeners(loader.dataset))
    for epoch, batch in walk.batches(seed_of(loader), start, stop):
        named = keyed(batch)  # which of them there are, the dataset alone knows
        if not batch or (not named and (min(batch) < 0 or max(batch) >= n)):
            raise DataError(
                f"{walk.name} wants to give indices of {n} items, got "
                f"{batch[:5] or 'a batch without any'}; mend the sampler"
            )
        low, high = share(loader, len(batch))
        if not loader.batched:  # of an item that is a batch nobody knows yet
            marked.append(Rows(high - low, len(batch)))
        mine: Any = batch[low:high] or batch[:1]
        if not named:
            (mine,) = unpack(torch.tensor([mine]))
        yield _asked(mine, epoch) if told else mine


def _computed(loader: Loader, start: int, stop: int, unpack: Unpack) -> Iterator[Any]:
    """By arithmetic, for many steps at once."""
    order, told = order_of(loader), bool(listeners(loader.dataset))
    (n, size), each = _counts(loader), length(loader)
    full = n // size
    step, positions = start, BLOCK // 4
    while step < stop:
        epoch, i = divmod(step, each)
        low, high = share(loader, total(loader, i))
        most = max(1, positions // max(1, high - low))
        count = min(most, full - i, stop - step) if i < full else 1
        found = unpack(_block(loader, order, epoch, i, count))
        yield from (_asked(one, epoch) for one in found) if told else found
        step += count
        positions = BLOCK


def _asked(found: list[int], epoch: int) -> Asked:
    asked = Asked(found)
    asked.epoch = epoch
    return asked


def _block(loader: Loader, order: Order, epoch: int, i: int, count: int) -> Tensor:
    """Indices of this rank in `count` batches of equal size: (count, rows) int64."""
    low, high = share(loader, total(loader, i))
    here = torch.arange(low, high) if low < high else torch.zeros(1, dtype=torch.int64)
    if loader.static_shapes:
        most = -(-_counts(loader)[1] // loader.world)
        here = torch.cat([here, here[-1:].expand(most - len(here))])
    first = torch.arange(i, i + count).mul_(_counts(loader)[1])
    return order.at(seed_of(loader), epoch, first[:, None] + here)
