"""How the items of one batch are read: by one tensor operation, here, or by workers."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, get_worker_info

from accelx import _torch
from accelx.data.collate import collated, quick
from accelx.data.columns import gathered, reads_columns, rows
from accelx.data.parcel import Parcels
from accelx.data.plan import Asked, Unpack, listeners
from accelx.data.tensors import indexed, plain, reads_tensors, under
from accelx.errors import DataError

Collate = Callable[[list[Any]], Any]
Init = Callable[[int], Any] | None  # what each worker runs first, with its number
Fetch = Callable[[Any], Any]  # indices of one batch -> the batch
Read = Callable[[Any, list[int]], Any]  # a dataset, indices -> what is collated


def fetcher(
    dataset: Any, collate: Collate, batched: bool = False, walked: bool = False
) -> tuple[Unpack, Fetch]:
    """How to unpack a block of indices, and how to read the batch at one of its rows.

    Tensors in a TensorDataset are indexed whole, and columns of a `datasets.Dataset`
    are not cut into rows, both under Subsets too; other items are read one by one, or
    by the dataset's own `__getitems__`, as torch's DataLoader reads them. With
    `batched` an item is a batch by itself; a sampler that is `walked` may give keys.
    """
    collate = first(collate) if batched else quick(collate)
    if type(dataset) is TensorDataset and collate is collated and not walked:
        columns = dataset.tensors
        if all(map(plain, columns)):
            if all(c.device.type == "cpu" for c in columns):
                return Tensor.unbind, lambda at: [
                    c.index_select(0, at) for c in columns
                ]
            return Tensor.unbind, lambda at: [
                c.index_select(0, at.to(c.device)) for c in columns
            ]
    read, collate = (each, collate) if batched else _ways(dataset, collate)
    if listeners(dataset):
        dataset = Noted(dataset, read)
        return Tensor.tolist, lambda at: collate(dataset.__getitems__(at))
    return Tensor.tolist, lambda at: collate(read(dataset, at))


def _ways(dataset: Any, collate: Collate) -> tuple[Read, Collate]:
    """How the dataset is read, and what makes a batch of what was read."""
    if collate is collated and reads_tensors(dataset):
        return _indexed, _as_it_is
    if collate is collated and reads_columns(under(dataset)):
        return _gathered, _as_it_is
    return items, collate


def keeps_rows(collate: Collate) -> bool:
    """Whether the batch that it makes is known to have a row for each item."""
    return quick(collate) is collated


def _as_it_is(batch: Any) -> Any:
    return batch


def _indexed(dataset: Any, indices: list[int]) -> Any:
    """The batch at `indices` of a TensorDataset, or of a Subset of one."""
    batch = indexed(dataset, indices)
    return collated(items(dataset, indices)) if batch is None else batch


def _gathered(dataset: Any, indices: list[int]) -> Any:
    """The batch at `indices` of a dataset that reads columns, or of a Subset of one."""
    columns = _at_once(dataset.__getitem__, indices)
    batch = gathered(columns, len(indices))
    if batch is None:
        return collated(_one_each(dataset, rows(columns), indices))
    return batch


def first(collate: Collate) -> Collate:
    """What makes a batch of a list with one item: for items that are batches."""
    return functools.partial(_only, collate)


def _only(collate: Collate, found: list[Any]) -> Any:
    return collate(found[0])


def items(dataset: Any, indices: list[int]) -> list[Any]:
    """The items at `indices`; what the dataset raises is noted with the index."""
    many = getattr(dataset, "__getitems__", None)
    if many:
        return _one_each(dataset, _at_once(many, indices), indices)
    return each(dataset, indices)


def each(dataset: Any, indices: list[int]) -> list[Any]:
    """The items at `indices` one by one: so torch reads those that are batches."""
    found, index = list[Any](), None
    try:
        for index in indices:
            found.append(dataset[index])
    except Exception as error:
        error.add_note(f"accelx: while reading item {index}{_worker()}")
        raise
    return found


def _at_once(many: Callable[[list[int]], Any], indices: list[int]) -> Any:
    """`many(indices)`; what it raises is noted with the indices."""
    try:
        return many(indices)
    except Exception as error:
        error.add_note(f"accelx: while reading the items {indices}{_worker()}")
        raise


def _one_each(dataset: Any, found: Any, indices: list[int]) -> Any:
    """`found`, an item for each index."""
    if hasattr(found, "__len__") and len(found) != len(indices):
        raise DataError(
            f"__getitems__ of {type(dataset).__name__} wants to give an item for "
            f"each of {len(indices)} indices, got {len(found)} for {indices}; "
            "leave out items by a Subset or a sampler, which all ranks know of"
        )
    return found


def _worker() -> str:
    info = get_worker_info()
    return "" if info is None else f" in worker {info.id} of {info.num_workers}"


@attrs.define(eq=False)
class Noted:
    """A dataset that is told the epoch, and notes the index where it raises."""

    dataset: Any
    read: Read = items
    epoch: int | None = None  # that it was told last

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if isinstance(indices, Asked):
            # in this process another reader may have told it another epoch since
            if indices.epoch != self.epoch or get_worker_info() is None:
                for one in listeners(self.dataset):
                    one.set_epoch(indices.epoch)
            self.epoch = indices.epoch
        return self.read(self.dataset, indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


@attrs.frozen(eq=False)
class Began:
    """Shows a new worker the user's own dataset, then runs the user's function.

    A signal that the program answers, such as SIGTERM with `on_preempt`, often goes to
    the whole process group. A worker lets the first one be, or the program would be
    missing batches before it could answer.
    """

    user: Init
    answered: tuple[signal.Signals, ...] = ()

    def __call__(self, worker: int) -> None:
        """Begin as worker number `worker`."""
        info: Any = get_worker_info()
        # Its own __setattr__ refuses; users change `get_worker_info().dataset` here.
        object.__setattr__(info, "dataset", info.dataset.dataset)
        for number in self.answered:
            signal.signal(number, _once)
        if self.user is not None:
            self.user(worker)


def _once(number: int, frame: Any) -> None:
    """Let a signal be; the next of its kind ends the process."""
    signal.signal(number, signal.SIG_DFL)


def answered() -> tuple[signal.Signals, ...]:
    """Signals that end a process by default, and that this program answers itself."""
    each = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    return tuple(one for one in each if callable(signal.getsignal(one)))


@attrs.define(eq=False)
class Spans:
    """The batch sampler of the workers: index lists of the span that is set."""

    lists: Callable[[], Iterable[list[int]]] = tuple

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.lists())


def pool(
    dataset: Any, collate: Collate, init: Init, batched: bool, **settings: Any
) -> tuple[DataLoader[Any], Spans]:
    """A torch DataLoader with workers, and the span its next iterator goes over."""
    spans = Spans()
    ways = (each, first(collate)) if batched else _ways(dataset, quick(collate))
    read, collate = ways
    workers: DataLoader[Any] = DataLoader(
        Noted(dataset, read),  # pyright: ignore[reportArgumentType]
        batch_sampler=spans,
        collate_fn=Parcels(collate, ahead(**settings)),
        worker_init_fn=Began(init, answered()),
        **settings,
    )
    return workers, spans


def ahead(num_workers: int, prefetch_factor: int | None, **settings: Any) -> int:
    """Batches that torch lets workers make ahead of the program."""
    return max(1, num_workers) * (2 if prefetch_factor is None else prefetch_factor)


def read(workers: DataLoader[Any]) -> Iterator[Any]:
    """The batches of the span that is set; workers not told to persist end with it."""
    iterator = iter(workers)
    try:
        yield from iterator
    finally:
        if not workers.persistent_workers:
            _torch.end_workers(iterator)
