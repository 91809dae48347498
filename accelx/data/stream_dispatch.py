"""A stream that cannot be divided: rank 0 reads, and sends each rank only its rows."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

from accelx.data.stream_cut import cut, rows_in
from accelx.data.stream_record import Spot, Stream
from accelx.data.stream_rows import Reader, reader
from accelx.data.stream_share import Share, described, elsewhere
from accelx.data.stream_wire import FAILED, deal, dealt, packed, spread, unpacked


def shares(stream: Stream, spot: Spot, skip: int, tracked: bool) -> Generator[Share]:
    """The rest of an epoch from `spot`, step by step; the first `skip` without rows.

    Global batches are the plain stream, cut by batch size, on any number of ranks. Of
    a batch, the (w - 1) / w that is not rank 0's crosses the wire. Raises on all ranks
    where rank 0 cannot read.
    """
    if stream.rank:
        yield from _received(stream, spot)
        return
    try:
        yield from _sent(stream, spot, skip, tracked)
    except _UnreadError as error:
        failure = error.args[0]
        if stream.world > 1:
            assert stream.env is not None
            deal(stream.env, FAILED, [None] * stream.world)
            spread(stream.env, 0, described(failure))
        raise failure from failure.__cause__


class _UnreadError(Exception):
    """What the source raised, as the other ranks must hear of it."""


def _received(stream: Stream, spot: Spot) -> Generator[Share]:
    env = stream.env
    assert env is not None
    while True:
        total, data = dealt(env)
        if total == FAILED:
            text = spread(env, 0, None)
            raise elsewhere(stream, 0, spot.step, text)
        if not total:
            return
        spot = _after(spot, 0, None)
        yield Share(
            None if data is None else unpacked(data), _counts(stream, total), spot
        )


def _sent(stream: Stream, spot: Spot, skip: int, tracked: bool) -> Generator[Share]:
    try:
        rows = reader(stream, spot, 0, 1, tracked)
    except Exception as error:
        raise _UnreadError(error) from error
    with closing(rows):
        while True:
            total, mine, others = _next(stream, rows, skip > 0)
            if stream.world > 1:
                assert stream.env is not None
                deal(stream.env, total, [None, *others])
            if not total:
                return
            where = rows.where() if tracked else (0, None)
            spot, skip = _after(spot, *where), skip - 1
            yield Share(mine, _counts(stream, total), spot)


def _after(spot: Spot, used: int, state: Any) -> Spot:
    return Spot(spot.epoch, spot.first, spot.step + 1, None, used, state)


def _counts(stream: Stream, total: int) -> tuple[int, ...]:
    world = stream.world
    return tuple(stream.share(total, rank, world) for rank in range(world))


def _next(stream: Stream, rows: Reader, skipped: bool) -> tuple[int, Any, list[Any]]:
    """Rows of the next batch, 0 at the end; rank 0's part; the others', packed."""
    nothing: list[Any] = [None] * (stream.world - 1)
    size = stream.batch_size
    try:
        found = rows.take(1 if size is None else size)
        if not found or (size is not None and stream.drop_last and len(found) < size):
            return 0, None, nothing
        total = len(found) if size is not None else rows_in(found[0], stream.world)
        if skipped:
            return total, None, nothing
        counts = _counts(stream, total)
        whole = size is None
        parts = cut(found[0], counts) if whole else _cut_rows(found, counts)
        return total, parts[0], [packed(part) for part in parts[1:]]
    except Exception as error:
        raise _UnreadError(error) from error


def _cut_rows(found: list[Any], counts: tuple[int, ...]) -> list[Any]:
    """Each rank's rows; for a rank without any the first of the batch."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [found[e - n : e] or found[:1] for n, e in zip(counts, ends, strict=True)]
