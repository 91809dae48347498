"""How the items of one batch are read: by one tensor operation, here, or by workers."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, get_worker_info

from accelx import _torch
from accelx.data.collate import collated, quick
from accelx.data.parcel import Parcels
from accelx.data.plan import Asked, Unpack, listeners
from accelx.errors import DataError

Collate = Callable[[list[Any]], Any]
Init = Callable[[int], Any] | None  # what each worker runs first, with its number
Fetch = Callable[[Any], Any]  # indices of one batch -> the batch


def fetcher(
    dataset: Any, collate: Collate, batched: bool = False
) -> tuple[Unpack, Fetch]:
    """How to unpack a block of indices, and how to read the batch at one of its rows.

    Tensors in a TensorDataset are indexed whole, which gives the bits that stacking
    their rows gives, 10 times sooner; other items are read one by one, or by the
    dataset's own `__getitems__`, as torch's DataLoader reads them. With `batched` an
    item is a batch by itself.
    """
    collate = first(collate) if batched else quick(collate)
    if type(dataset) is TensorDataset and collate is collated:
        columns = dataset.tensors
        if all(_plain(c) for c in columns):
            if all(c.device.type == "cpu" for c in columns):
                return Tensor.unbind, lambda at: [
                    c.index_select(0, at) for c in columns
                ]
            return Tensor.unbind, lambda at: [
                c.index_select(0, at.to(c.device)) for c in columns
            ]
    if listeners(dataset):
        dataset = Noted(dataset)
        return Tensor.tolist, lambda at: collate(dataset.__getitems__(at))
    return Tensor.tolist, lambda at: collate(items(dataset, at))


def first(collate: Collate) -> Collate:
    """What makes a batch of a list with one item: for items that are batches."""
    return functools.partial(_only, collate)


def _only(collate: Collate, found: list[Any]) -> Any:
    return collate(found[0])


def items(dataset: Any, indices: list[int]) -> list[Any]:
    """The items at `indices`; what the dataset raises is noted with the index."""
    many = getattr(dataset, "__getitems__", None)
    if many:
        try:
            found = many(indices)
        except Exception as error:
            error.add_note(f"accelx: while reading the items {indices}{_worker()}")
            raise
        if hasattr(found, "__len__") and len(found) != len(indices):
            raise DataError(
                f"__getitems__ of {type(dataset).__name__} wants to give an item for "
                f"each of {len(indices)} indices, got {len(found)} for {indices}; "
                "leave out items by a Subset or a sampler, which all ranks know of"
            )
        return found
    found, index = list[Any](), None
    try:
        for index in indices:
            found.append(dataset[index])
    except Exception as error:
        error.add_note(f"accelx: while reading item {index}{_worker()}")
        raise
    return found


def _worker() -> str:
    info = get_worker_info()
    return "" if info is None else f" in worker {info.id} of {info.num_workers}"


# What index_select takes on every device; it has no kernels for the wider unsigned
# integers, nor for quantized tensors.
PLAIN = frozenset(
    (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.complex64, torch.complex128),
    )
)


def _plain(column: Tensor) -> bool:
    strided = type(column) is Tensor and column.layout is torch.strided
    return strided and column.dtype in PLAIN and not column.requires_grad


@attrs.define(eq=False)
class Noted:
    """A dataset that is told the epoch, and notes the index where it raises."""

    dataset: Any
    epoch: int | None = None  # that it was told last

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if isinstance(indices, Asked):
            # in this process another reader may have told it another epoch since
            if indices.epoch != self.epoch or get_worker_info() is None:
                for one in listeners(self.dataset):
                    one.set_epoch(indices.epoch)
            self.epoch = indices.epoch
        return items(self.dataset, indices)

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
    dataset: Any, collate: Collate, init: Init, **settings: Any
) -> tuple[DataLoader[Any], Spans]:
    """A torch DataLoader with workers, and the span its next iterator goes over."""
    spans = Spans()
    workers: DataLoader[Any] = DataLoader(
        Noted(dataset),  # pyright: ignore[reportArgumentType]
        batch_sampler=spans,
        collate_fn=Parcels(quick(collate), ahead(**settings)),
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
