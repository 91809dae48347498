"""Batches of a stream: every row once, over all ranks, to an end that all agree on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

from accelx import prefetch
from accelx.data import stream_dispatch, stream_split
from accelx.data.collate import quick
from accelx.data.counted import odd
from accelx.data.span import span
from accelx.data.stream_accept import as_stream, streams
from accelx.data.stream_asks import warn_of_parts
from accelx.data.stream_parts import readers_of, remembers
from accelx.data.stream_record import Spot, Stream
from accelx.data.stream_share import Share, agree
from accelx.data.stream_state import Reading
from accelx.errors import DataError
from accelx.fetch import keeps_rows
from accelx.rows import Rows, stamp

__all__ = ["Reading", "Stream", "as_stream", "guarantee_of", "read", "streams"]

Check = Callable[[Share], None]


def read(
    stream: Stream,
    start: int = 0,
    stop: int | None = None,
    memory: Reading | None = None,
) -> Iterator[Any]:
    """This rank's batches from step `start` up to `stop`, collated, on its device.

    Without `stop` they end with the epoch in which `start` falls; with it they go on
    through as many epochs as it takes. Each carries its `Rows`. `memory` is what a
    State keeps of streams: from it a source with a state goes on at once; others, and
    all without it, are read again from the start, and what lies before is dropped.
    Effects: worker processes, which end with the iterator; collectives at each step, on
    the CPU, so that all ranks must ask equally often. Raises DataError.
    """
    start, stop = span(start, stop)
    if stop is not None and stop <= start:
        return iter(())
    spot = Spot() if memory is None else memory.spot(stream, start)
    return _delivered(stream, _shares(stream, spot, start, stop, memory), start)


def read_epoch(stream: Stream, epoch: int, check: Check) -> Iterator[Any]:
    """This rank's batches of one epoch; `check` sees each before it is handed out."""
    found = _shares(stream, Spot(epoch), 0, None, None)
    return _delivered(stream, _checked(found, check), 0)


def guarantee_of(stream: Stream) -> str:
    """How a run goes on: "same-ranks" from a state, "replay" by reading again.

    A state of what is read by rank 0 alone serves any number of ranks.
    """
    return "same-ranks" if remembers(stream) else "replay"


def _shares(
    stream: Stream, spot: Spot, start: int, stop: int | None, memory: Reading | None
) -> Generator[Share]:
    """Steps `start` to `stop`, from the spot on through the epochs."""
    # a part of one rank alone is the whole: what is not divided is read by rank 0
    readers = readers_of(stream)
    many = readers == stream.world and stream.batch_size is not None
    shares = stream_split.shares if many else stream_dispatch.shares
    agree(stream, readers, spot, start, stop)
    warn_of_parts(stream, readers)
    while True:
        came = spot
        rest = shares(stream, spot, start - spot.step, memory is not None)
        with closing(rest):
            for share in rest:
                came = share.spot
                if came.step <= start:
                    continue
                if memory is not None:
                    memory.keep(stream, came)
                yield share
                if came.step == stop:
                    return
        if stop is None and came.step > start:
            return
        if came.step == spot.first:
            if stop is None and came.step == start:
                return  # an epoch of nothing
            raise _nothing(stream, came, start)
        spot = Spot(spot.epoch + 1, came.step, came.step)


def _nothing(stream: Stream, spot: Spot, start: int) -> DataError:
    return DataError(
        f"step {max(start, spot.step)} needs a batch, got none in epoch {spot.epoch} "
        f"of {stream!r}; give it rows, or a batch_size that fills with drop_last=True"
    )


def _checked(found: Generator[Share], check: Check) -> Generator[Share]:
    with closing(found):
        for share in found:
            check(share)
            yield share


def _delivered(stream: Stream, found: Generator[Share], start: int) -> Iterator[Any]:
    """Collated, moved and marked, with step and rank noted on what is raised."""
    step, marks, collate = start, deque[Rows](), quick(stream.collate)
    looked = stream.batch_size is None or keeps_rows(stream.collate)

    def collated() -> Iterator[Any]:
        for share in found:
            marks.append(Rows(share.counts[stream.rank], share.total))
            whole = stream.batch_size is None
            yield share.part if whole else collate(share.part)

    try:
        with closing(found):
            for batch in prefetch.on_device(collated(), stream.device):
                record = marks.popleft()
                looked = looked or odd(batch, record, step)
                yield stamp(batch, record)
                step += 1
    except Exception as error:
        where = f"rank {stream.rank} of {stream.world}"
        error.add_note(f"accelx: while getting the batch of step {step} on {where}")
        raise
