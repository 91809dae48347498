"""A stream for a loop of the user's own, whose loss knows of no weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelx.data.stream import read_epoch
from accelx.data.stream_record import Stream
from accelx.data.stream_share import Share
from accelx.errors import DataError


class StreamEpochs:
    """A stream for a loop of your own: each `iter` is the next epoch.

    Yields this rank's batches, of the user's own types. It has no length: the ranks
    agree on the end when they get there. `epoch` is the one that the next `iter` gives.
    A loss that is a mean over this rank's rows is exact only where all ranks have
    equally many, so that other batches are refused when they come, on all ranks;
    `ragged=True` takes them for loops that sum and count themselves, as long as no rank
    is without a row. Raises DataError.
    """

    def __init__(self, stream: Stream, *, ragged: bool = False, epoch: int = 0) -> None:
        self.loader = stream
        self.epoch = epoch
        self._ragged = ragged

    @property
    def batch_size(self) -> int | None:
        """Rows of a whole batch, over all ranks; None where the stream says."""
        return self.loader.batch_size

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch
        self.epoch += 1
        return read_epoch(self.loader, epoch, self._check)

    def _check(self, share: Share) -> None:
        """A batch as all ranks know it, so that all or none of them raise."""
        even = len(set(share.counts)) == 1
        if even or (self._ragged and min(share.counts)):
            return
        each = ", ".join(map(str, share.counts))
        came = f"a batch of {share.total} rows as {each} on {len(share.counts)} ranks"
        if self._ragged:
            raise DataError(
                "ragged=True wants a row for each rank in each batch, got: "
                f"{came}; write drop_last=True, or the whole pipeline with ax.feed and "
                "ax.step or ax.measure, which weigh rows"
            )
        raise DataError(
            "a loop with a loss of its own weighs ranks equally and wants equally many "
            f"rows on each, got: {came}; write drop_last=True where it is the last "
            "batch that is short, a batch_size that divides, ragged=True for a loop "
            "that sums and counts rows itself, or the whole pipeline with ax.step, "
            "which weighs rows"
        )
