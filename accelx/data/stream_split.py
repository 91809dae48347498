"""A stream that is divided: each rank reads its own part, and none the whole.

Of a batch, rank i of the n that still have rows takes what Loader would give to rank i
of n. Where a part ends, the others fill the batch up, so that batches keep their size
until all rows are gone; where there are none left anywhere, all ranks end together.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

import attrs

from accelx.data.stream_record import Spot, Stream
from accelx.data.stream_rows import Reader, reader
from accelx.data.stream_share import Share, fail
from accelx.data.stream_wire import FAILED, counted, spread


def shares(stream: Stream, spot: Spot, skip: int, tracked: bool) -> Generator[Share]:
    """The rest of an epoch from `spot`, step by step; the first `skip` without rows.

    A collective at each step: every rank must ask equally often. Raises on all ranks
    where one cannot read.
    """
    rows = _opened(stream, spot, tracked)
    with closing(rows):
        turn = _Turn(stream, rows, list(spot.live or range(stream.world)))
        while (share := turn.next(spot, skip > 0)) is not None:
            yield share
            spot, skip = share.spot, skip - 1


def _opened(stream: Stream, spot: Spot, tracked: bool) -> Reader:
    """This rank's reader, once all ranks have one."""
    made: Reader | None = None
    failure = None
    try:
        made = reader(stream, spot, stream.rank, stream.world, tracked)
    except Exception as error:  # told to all ranks, each of which raises
        failure = error
    if min(counted(stream.env, FAILED if failure else 0)) == FAILED:
        if made is not None:
            made.close()
        fail(stream, spot.step, failure)
    assert made is not None
    return made


@attrs.define(eq=False)
class _Turn:
    """One epoch, as far as this rank and all of them have come."""

    stream: Stream
    rows: Reader
    live: list[int]  # ranks that may have rows left
    last: Any = None  # a row to stand where this rank has none
    stocked: set[int] = attrs.field(factory=set)  # ranks that have one

    def next(self, spot: Spot, skipped: bool) -> Share | None:
        """The next share; None at the end of the epoch."""
        mine, counts = self._gathered(spot.step)
        total, size = sum(counts), self.stream.batch_size
        assert size is not None
        if not total or (self.stream.drop_last and total < size):
            return None
        used, state = self.rows.where() if self.rows.tracked else (0, None)
        after = Spot(
            spot.epoch, spot.first, spot.step + 1, tuple(self.live), used, state
        )
        return Share(self._filled(mine, counts, skipped), tuple(counts), after)

    def _gathered(self, step: int) -> tuple[list[Any], list[int]]:
        """This rank's rows of the next batch, and how many each rank has of it."""
        stream, size = self.stream, self.stream.batch_size
        assert size is not None
        mine: list[Any] = []
        counts = [0] * stream.world
        while self.live and (missing := size - sum(counts)):
            n = len(self.live)
            asked = {r: stream.share(missing, i, n) for i, r in enumerate(self.live)}
            found, failure = self._read(asked.get(stream.rank, 0))
            given = counted(stream.env, FAILED if failure else len(found))
            if min(given) == FAILED:
                fail(stream, step, failure)
            mine += found
            counts = [a + b for a, b in zip(counts, given, strict=True)]
            self.live = [r for r in self.live if given[r] == asked[r]]
        return mine, counts

    def _read(self, count: int) -> tuple[list[Any], Exception | None]:
        try:
            return self.rows.take(count), None
        except Exception as error:  # told to all ranks, each of which raises
            return [], error

    def _filled(self, mine: list[Any], counts: list[int], skipped: bool) -> Any:
        """The rows; for a rank without any a copy of its last one, or of another's."""
        having = [rank for rank, count in enumerate(counts) if count]
        self.stocked.update(having)
        if mine:
            self.last = mine[-1]
        if skipped:
            return None
        if len(self.stocked) < self.stream.world:
            assert self.stream.env is not None
            row = spread(self.stream.env, having[0], mine[0] if mine else None)
            if self.stream.rank not in self.stocked:
                self.last = row
            self.stocked = set(range(self.stream.world))
        return mine or [self.last]
