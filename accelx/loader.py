"""Which rows each rank reads at which step: arithmetic on dataset, seed and step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from accelx import accept, fetch, prefetch
from accelx.errors import DataError
from accelx.permutation import check_seed, key, permute
from accelx.records import Transform, code
from accelx.rows import Rows, stamp

BLOCK = 32768  # positions whose indices are computed at once, 256 KiB; the first 1024


def _whole(least: int) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    def check(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise DataError(
                f"{field.name} must be a whole number of at least {least}, got "
                f"{value!r}; write {field.name}={least} or more"
            )

    return check


def _sized(_: object, __: object, dataset: Any) -> None:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(
            "a dataset must have a length and items by index (__len__, __getitem__), "
            f"got {type(dataset).__name__}; give a map-style dataset, such as a list "
            "of what the stream holds"
        )


def _brief(dataset: Any) -> str:
    return f"<{type(dataset).__name__} of {len(dataset)}>"


@attrs.frozen(repr=False)
class Loader:
    """Batches by arithmetic: what the batch at step k holds depends on k alone.

    Its length is that of one epoch in batches, the same on each rank. Step k lies in
    epoch k // length.
    """

    dataset: Any = attrs.field(validator=_sized, eq=id, repr=False)
    batch_size: int = attrs.field(validator=_whole(1))  # rows over all ranks
    shuffle: bool = attrs.field(default=False, kw_only=True)
    seed: int = attrs.field(default=0, kw_only=True)  # of the order
    drop_last: bool = attrs.field(default=False, kw_only=True)  # no short batch
    collate: fetch.Collate = attrs.field(default=default_collate, kw_only=True)
    rank: int = attrs.field(default=0, validator=_whole(0), kw_only=True)
    world: int = attrs.field(default=1, validator=_whole(1), kw_only=True)
    device: str = attrs.field(default="cpu", kw_only=True)  # where batches arrive
    # The rest is handed to torch's workers.
    num_workers: int = attrs.field(default=0, validator=_whole(0), kw_only=True)
    timeout: float = attrs.field(default=0, kw_only=True)  # seconds
    worker_init_fn: fetch.Init = attrs.field(default=None, kw_only=True)
    multiprocessing_context: Any = attrs.field(default=None, kw_only=True)
    prefetch_factor: int | None = attrs.field(default=None, kw_only=True)
    persistent_workers: bool = attrs.field(default=False, kw_only=True)
    pin_memory: bool = attrs.field(default=False, kw_only=True)  # CUDA always has it

    def __attrs_post_init__(self) -> None:
        check_seed(self.seed)
        if self.rank >= self.world:
            raise DataError(
                f"rank must be below world, got rank {self.rank} of {self.world}; "
                "count ranks from 0"
            )

    def __repr__(self) -> str:
        return code(f"Loader({_brief(self.dataset)}, ", self).replace(", (", ", ", 1)

    def __len__(self) -> int:
        n = len(self.dataset)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)


def as_loader(source: Any, **fields: Any) -> Loader:
    """A Loader from a torch DataLoader, a Loader, or a dataset and `batch_size=`.

    `fields` are those of Loader: with a dataset any of them, otherwise `seed`, `rank`,
    `world` and `device`, since the rest is said by the source already. Raises DataError
    for what cannot be cut exactly.
    """
    if not isinstance(source, (DataLoader, Loader)):
        if isinstance(source, (Epochs, Transform)):
            raise DataError(
                f"wanted a DataLoader, got {_brief(source)}; write "
                "ax.feed(tx, DataLoader(...)) with the DataLoader itself, which "
                "shard_loader in tx then cuts over the ranks"
            )
        if "batch_size" not in fields:
            raise DataError(
                f"a loader needs a batch size, got the dataset {type(source).__name__} "
                "alone; write DataLoader(dataset, batch_size=...)"
            )
        return Loader(source, **fields)
    twice = fields.keys() - {"seed", "rank", "world", "device"}
    if twice:
        raise DataError(
            f"{', '.join(sorted(twice))} must be said once, got it beside a "
            f"{type(source).__name__} that says it too; write it there"
        )
    if isinstance(source, Loader):
        return attrs.evolve(source, **fields)
    return Loader(source.dataset, **accept.settings_of(source), **fields)


def rows_at(loader: Loader, step: int) -> list[int]:
    """The dataset indices of the whole batch at `step`, in order."""
    return local_indices(attrs.evolve(loader, rank=0, world=1), step)


def local_indices(loader: Loader, step: int) -> list[int]:
    """The dataset indices that this rank reads at `step`.

    Of a batch of m rows, rank r of w gets rows (m r) // w up to (m (r + 1)) // w; ranks
    in order hold the batch in order. A rank with no rows reads the batch's first row.
    """
    _spans(loader, step, step + 1)
    return next(_indices(loader, step, step + 1, Tensor.tolist))


def rows_here(loader: Loader, step: int) -> Rows:
    """How many rows of the batch at `step` are this rank's, and all ranks'."""
    return _rows(loader, _total(loader, step % len(loader)))


def batches(loader: Loader, start: int = 0, stop: int | None = None) -> Iterator[Any]:
    """This rank's batches from step `start` up to `stop`, collated, on its device.

    Without `stop` they end with the epoch in which `start` falls; with it they go on
    through as many epochs as it takes, by the same workers. Each carries its `Rows`. A
    batch is read in O(1) from anywhere; the global random state is left alone.
    Effects: worker processes, which end with the iterator. Law L10. An error of the
    dataset is noted with item, step and rank.
    """
    stop = _spans(loader, start, stop)
    if loader.num_workers and start < stop:
        passing = attrs.evolve(loader, persistent_workers=False)
        return _by_workers(passing, *_pool(passing, start), start, stop)
    unpack, read = fetch.fetcher(loader.dataset, loader.collate)
    found = (read(at) for at in _indices(loader, start, stop, unpack))
    return _delivered(loader, found, start, stop)


def _pool(loader: Loader, start: int) -> tuple[DataLoader[Any], fetch.Spans]:
    """Workers for `loader`, not yet started, and the span that they will go over."""
    seeds = torch.Generator()  # of the workers' own random states
    seeds.manual_seed(key(loader.seed, loader.rank, start) >> 1)
    return fetch.pool(
        loader.dataset,
        loader.collate,
        loader.worker_init_fn,
        generator=seeds,
        num_workers=loader.num_workers,
        timeout=loader.timeout,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        pin_memory=torch.device(loader.device).type == "cuda",
    )


def _by_workers(
    loader: Loader,
    workers: DataLoader[Any],
    spans: fetch.Spans,
    start: int,
    stop: int,
) -> Iterator[Any]:
    spans.lists = lambda: _indices(loader, start, stop, Tensor.tolist)
    return _delivered(loader, fetch.read(workers), start, stop)


def _spans(loader: Loader, start: int, stop: int | None) -> int:
    """The step to stop at, after checking the span."""
    if start < 0:
        raise DataError(f"start must be at least 0, got {start}; count steps from 0")
    length = len(loader)
    if stop is None:
        return (start // length + 1) * length if length else start
    if stop > start and not length:
        raise DataError(
            f"steps {start} to {stop} need batches, got none from "
            f"{len(loader.dataset)} items at batch_size={loader.batch_size}, "
            f"drop_last={loader.drop_last}; give a dataset with items, or a smaller "
            "batch_size"
        )
    return stop


def _total(loader: Loader, i: int) -> int:
    """Rows of the i-th batch of an epoch."""
    return min(loader.batch_size, len(loader.dataset) - i * loader.batch_size)


def _rows(loader: Loader, m: int) -> Rows:
    low, high = _share(loader, m)
    return Rows(high - low, m)


def _share(loader: Loader, m: int) -> tuple[int, int]:
    return m * loader.rank // loader.world, m * (loader.rank + 1) // loader.world


def _indices(
    loader: Loader, start: int, stop: int, unpack: fetch.Unpack
) -> Iterator[Any]:
    """What this rank reads at each step, computed for many steps at once."""
    length, full = len(loader), len(loader.dataset) // loader.batch_size
    step, positions = start, BLOCK // 32
    while step < stop:
        epoch, i = divmod(step, length)
        low, high = _share(loader, _total(loader, i))
        most = max(1, positions // max(1, high - low))
        count = min(most, full - i, stop - step) if i < full else 1
        yield from unpack(_block(loader, epoch, i, count))
        step += count
        positions = min(2 * positions, BLOCK)


def _block(loader: Loader, epoch: int, i: int, count: int) -> Tensor:
    """Indices of this rank in `count` batches of equal size: (count, rows) int64."""
    low, high = _share(loader, _total(loader, i))
    if low == high:
        low, high = 0, 1
    first = torch.arange(i, i + count).mul_(loader.batch_size)
    positions = first[:, None] + torch.arange(low, high)
    if not loader.shuffle:
        return positions
    return permute(len(loader.dataset), loader.seed, epoch, positions)


def _delivered(
    loader: Loader, found: Iterator[Any], start: int, stop: int
) -> Iterator[Any]:
    """`found`, moved and marked, with step and rank noted on what it raises."""
    step, length = start, len(loader)
    full = len(loader.dataset) // loader.batch_size  # batches of an epoch
    whole = _rows(loader, loader.batch_size)
    try:
        for batch in prefetch.on_device(found, loader.device):
            short = step % length >= full
            yield stamp(batch, rows_here(loader, step) if short else whole)
            step += 1
    except Exception as error:
        where = f"rank {loader.rank} of {loader.world}"
        error.add_note(f"accelx: while getting the batch of step {step} on {where}")
        raise


class Epochs:
    """A loader for a loop of your own: each `iter` is the next epoch.

    Yields this rank's batches, of the user's own types. `len` counts the batches of an
    epoch, the same on each rank. `epoch` is the one that the next `iter` gives; set it
    to resume. A loss that is a mean over this rank's rows is exact only where all ranks
    have equally many, so that other sizes are refused; `ragged=True` takes them for
    loops that sum and count themselves, as long as no rank is without a row. Raises
    DataError.
    """

    def __init__(self, loader: Loader, *, ragged: bool = False, epoch: int = 0) -> None:
        for m in _sizes(loader):
            _check_rows(loader, m, ragged)
        self.loader = loader
        self.epoch = epoch
        self._workers: tuple[DataLoader[Any], fetch.Spans] | None = None
        self._busy = False

    @property
    def dataset(self) -> Any:
        """The dataset that was given."""
        return self.loader.dataset

    @property
    def batch_size(self) -> int:
        """Rows of a whole batch, over all ranks."""
        return self.loader.batch_size

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        start = self.epoch * len(self)
        self.epoch += 1
        keep = self.loader.persistent_workers and len(self)
        return self._kept(start) if keep else batches(self.loader, start)

    def _kept(self, start: int) -> Iterator[Any]:
        """One epoch by workers that live as long as this object."""
        if self._busy:  # a second iterator beside the first has workers of its own
            yield from batches(self.loader, start)
            return
        if self._workers is None:
            self._workers = _pool(self.loader, start)
        self._busy = True
        try:
            stop = start + len(self)
            yield from _by_workers(self.loader, *self._workers, start, stop)
        finally:
            self._busy = False


def _sizes(loader: Loader) -> list[int]:
    """The distinct numbers of rows that batches of an epoch have."""
    return sorted({_total(loader, i) for i in (0, len(loader) - 1) if len(loader)})


def _check_rows(loader: Loader, m: int, ragged: bool) -> None:
    w, n, size = loader.world, len(loader.dataset), loader.batch_size
    if m % w == 0 or (ragged and m >= w):
        return
    what = "the last batch" if m < size else "each batch"
    came = f"{what} has {m} rows for {w} ranks ({n} items, batch_size={size})"
    use = "drop_last=True, or " if m < size else ""
    if ragged:
        raise DataError(
            f"ragged=True wants a row for each rank in each batch, got: {came}; write "
            f"{use}a batch_size that leaves at least {w} rows"
        )
    raise DataError(
        "a loop with a loss of its own weighs ranks equally and wants equally many "
        f"rows on each, got: {came}; write {use}a batch_size that divides, ragged=True "
        "for a loop that sums and counts rows itself, or the whole pipeline with "
        "accelx.step, which weighs rows"
    )
