"""A loader for a loop of the user's own, whose loss knows of no weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from accelx import fetch
from accelx.data import plan
from accelx.errors import DataError
from accelx.loader import Loader, batches, by_workers, pool, varies
from accelx.rows import rows_of


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
        if loader.static_shapes and not ragged:
            raise DataError(
                "a loop with a loss of its own takes padding for rows, got "
                "static_shapes=True; write ragged=True as well, and weigh rows by "
                "ax.row_weights(batch)"
            )
        for m in _sizes(loader):
            _check_rows(loader, m, ragged)
        self.loader = loader
        self.epoch = epoch
        self._ragged = ragged
        self._workers: tuple[DataLoader[Any], fetch.Spans] | None = None
        self._busy = False

    @property
    def dataset(self) -> Any:
        """The dataset that was given."""
        return self.loader.dataset

    @property
    def batch_size(self) -> int | None:
        """Rows of a whole batch, over all ranks; None where a batch sampler says."""
        return self.loader.batch_size

    def __len__(self) -> int:
        return plan.length(self.loader, self.epoch)

    def __iter__(self) -> Iterator[Any]:
        start, count = plan.start_of(self.loader, self.epoch), len(self)
        self.epoch += 1
        keep = self.loader.persistent_workers and count
        stop = start + count
        found = self._kept(start, stop) if keep else batches(self.loader, start, stop)
        return map(self._checked, found) if varies(self.loader) else found

    def _checked(self, batch: Any) -> Any:
        """A batch whose size is known only now."""
        marked = rows_of(batch)
        assert marked is not None, "batches are marked"
        _check_rows(self.loader, marked.total, self._ragged)
        return batch

    def _kept(self, start: int, stop: int) -> Iterator[Any]:
        """One epoch by workers that live as long as this object."""
        if self._busy:  # a second iterator beside the first has workers of its own
            yield from batches(self.loader, start, stop)
            return
        if self._workers is None:
            self._workers = pool(self.loader, start)
        self._busy = True
        try:
            yield from by_workers(self.loader, *self._workers, start, stop)
        finally:
            self._busy = False


def _sizes(loader: Loader) -> list[int]:
    """The distinct numbers of rows that batches of an epoch have, where known."""
    if varies(loader) or not len(loader):
        return []
    return sorted({plan.total(loader, i) for i in (0, len(loader) - 1)})


def _check_rows(loader: Loader, m: int, ragged: bool) -> None:
    w, n, size = loader.world, len(loader.dataset), loader.batch_size
    if m % w == 0 or (ragged and m >= w) or loader.static_shapes:
        return
    short = size is not None and m < size and not loader.batched
    what = "the last batch" if short else "each batch" if size else "a batch"
    came = f"{what} has {m} rows for {w} ranks ({n} items, batch_size={size})"
    use = "drop_last=True, or " if short else ""
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
