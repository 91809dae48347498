"""What one step of a stream gives to this rank, and what all ranks know of it."""

from __future__ import annotations

from typing import Any

import attrs

from accelx.comm_wire import grouped
from accelx.data.stream_record import Spot, Stream
from accelx.data.stream_wire import told
from accelx.errors import DataError


@attrs.frozen(eq=False)
class Share:
    """This rank's part of a global batch: at least one row, also where none is its own.

    None where nobody asked for it.
    """

    part: Any  # a list of rows, or a piece of a whole batch
    counts: tuple[int, ...]  # real rows of each rank
    spot: Spot  # behind this batch

    @property
    def total(self) -> int:
        """Real rows over all ranks."""
        return sum(self.counts)


def agree(stream: Stream, readers: int, spot: Spot, start: int, stop: Any) -> None:
    """Refuse, on all ranks alike, ranks that would not read the same stream.

    A collective, once for a reading: without it they would wait for one another.
    """
    if stream.world == 1:
        return
    assert stream.env is not None
    said = told(
        stream.env,
        f"{type(stream.source).__name__} by {readers} readers, batch_size="
        f"{stream.batch_size}, drop_last={stream.drop_last}, steps {start} to {stop} "
        f"from step {spot.step} of epoch {spot.epoch}",
    )
    if len(set(said)) > 1:
        each = "; ".join(f"{what} on {who}" for what, who in grouped(said).items())
        raise DataError(
            f"feed wants the same stream on each rank, got {each}; make the dataset, "
            "its number of shards, the loader's settings and start the same"
        )


def fail(stream: Stream, step: int, failure: Exception | None) -> None:
    """All ranks raise: the one that could not read its own error, the others of it."""
    if stream.world == 1:
        assert failure is not None
        raise failure
    assert stream.env is not None
    texts = told(stream.env, "" if failure is None else described(failure))
    if failure is not None:
        raise failure
    rank = next(i for i, text in enumerate(texts) if text)
    raise elsewhere(stream, rank, step, texts[rank])


def described(failure: Exception) -> str:
    """The error as other ranks are told of it."""
    notes = getattr(failure, "__notes__", [])
    return "\n".join([f"{type(failure).__name__}: {failure}", *notes])


def elsewhere(stream: Stream, rank: int, step: int, text: str) -> DataError:
    """What a rank raises for the one that could not read."""
    return DataError(
        f"a stream wants each rank that reads it to give rows, but rank {rank} of "
        f"{stream.world} failed while getting the batch of step {step}: {text}\nMend "
        "the dataset; this rank has nothing wrong with it"
    )
