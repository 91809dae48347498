"""One reader's rows, or whole batches, of one epoch, and where it stands in them."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader

from accelx import _torch, fetch
from accelx.data import stream_parts as parts
from accelx.data.lent import Lent
from accelx.data.parcel import Parcels
from accelx.data.stream_record import Spot, Stream
from accelx.data.stream_wire import packed, unpacked
from accelx.permutation import key

OVER = "over"  # in place of a state: a source that has ended may say anything
_STREAM = 105  # names what a stream draws apart from what orders draw for the same seed


@attrs.define(eq=False)
class _Chunks:
    """Rows as they come, a chunk at a time, and the source's state between chunks."""

    following: Callable[[], Any]  # raises StopIteration
    state: Callable[[], Any] | None
    close: Callable[[], None]
    drawn: Lent | None = None  # what the source draws by in this process

    def next(self) -> Any:
        """The next chunk. Raises StopIteration at the end of the epoch."""
        if self.drawn is None:
            return self.following()
        with self.drawn.lent():  # 0.3 ms, nearly all of it NumPy's
            found = self.following()
        if self.state is not None:
            self.drawn = None  # what it has begun with is in its state from now on
        return found


@attrs.define(eq=False)
class Reader:
    """Takes rows, of chunks of any size, and says from where the rest could be read."""

    chunks: _Chunks
    tracked: bool  # whether it is asked where it stands
    state: Any = None  # before the chunk that is held, or that comes next
    told: bool = False  # whether the source was asked for it since that chunk
    held: list[Any] = attrs.field(factory=list)
    used: int = 0

    def take(self, count: int) -> list[Any]:
        """The next rows; fewer than `count` only at the end of the epoch."""
        found: list[Any] = []
        while len(found) < count:
            if self.used == len(self.held) and not self._next():
                break
            part = self.held[self.used : self.used + count - len(found)]
            self.used += len(part)
            found += part
        return found

    def _next(self) -> bool:
        if self.tracked:
            self._ask()
        self.held, self.used = [], 0
        try:
            self.held = self.chunks.next()
        except StopIteration:
            return False
        self.told = False
        return True

    def _ask(self) -> None:
        if not self.told and self.chunks.state is not None:
            self.state = self.chunks.state()
        self.told = True

    def where(self) -> tuple[int, Any]:
        """(rows used of the chunk that comes next, the state before it)."""
        if self.used < len(self.held):
            return self.used, self.state
        self._ask()
        return 0, self.state

    def close(self) -> None:
        """End workers and generators."""
        self.chunks.close()


def reader(stream: Stream, spot: Spot, number: int, of: int, tracked: bool) -> Reader:
    """The `number`-th of `of` readers, from where `spot` says.

    Effects: worker processes.
    """
    behind = 0 if spot.state is None else spot.step
    start = key(_STREAM, stream.seed, number, spot.epoch, behind)
    drawn = Lent.of(start >> 1)
    if spot.state == OVER:
        chunks = _nothing()
    elif stream.batch_size is None:
        with drawn.lent():
            chunks = _batches(stream, spot, drawn)
    elif stream.num_workers:
        stateful = tracked and parts.remembers(stream)
        chunks = _by_workers(stream, spot, number, of, stateful)
    else:
        chunks = _here(stream, spot, number, of, drawn)
    made = Reader(chunks, tracked)
    made.take(spot.used)
    return made


def _here(stream: Stream, spot: Spot, number: int, of: int, drawn: Lent) -> _Chunks:
    part = parts.part_of(stream.source, number, of, spot.epoch)
    if spot.state is not None:
        part.load_state_dict(copy.deepcopy(spot.state))
    with drawn.lent():
        rows = iter(part)
    size = _size(stream, number, of)
    ended = False

    def following() -> list[Any]:
        nonlocal ended
        found = [] if ended else list(itertools.islice(rows, size))
        ended = len(found) < size
        if not found:
            raise StopIteration
        return found

    def state() -> Any:
        # what it tells may be what it goes on to change, such as a list of rows
        return OVER if ended else copy.deepcopy(part.state_dict())

    return _Chunks(
        following, state if parts.remembers(stream) else None, _closing(rows), drawn
    )


def _nothing() -> _Chunks:
    return _Chunks(iter(()).__next__, lambda: OVER, lambda: None)


def _size(stream: Stream, number: int, of: int) -> int:
    """Rows of a chunk: what this reader takes for one batch while all have rows."""
    assert stream.batch_size is not None
    return max(1, stream.share(stream.batch_size, number, of))


def _by_workers(
    stream: Stream, spot: Spot, number: int, of: int, stateful: bool
) -> _Chunks:
    place = stream.source, number, of, spot.epoch
    part = parts.StatefulPart(*place) if stateful else parts.Part(*place)
    seeds = torch.Generator()  # of the workers' own random states
    seeds.manual_seed(key(_STREAM, stream.seed, number, spot.epoch) >> 1)
    kind: Any = _stateful if stateful else DataLoader
    workers = kind(
        part,
        batch_size=_size(stream, number, of),
        collate_fn=Parcels(
            packed, fetch.ahead(stream.num_workers, stream.prefetch_factor)
        ),
        worker_init_fn=fetch.Began(stream.worker_init_fn, fetch.answered()),
        generator=seeds,
        num_workers=stream.num_workers,
        timeout=stream.timeout,
        multiprocessing_context=stream.multiprocessing_context,
        prefetch_factor=stream.prefetch_factor,
    )
    if spot.state is not None:
        workers.load_state_dict(spot.state)
    found = iter(workers)
    return _Chunks(
        lambda: unpacked(next(found)),
        workers.state_dict if stateful else None,
        _closing(found),
    )


def _stateful(*args: Any, **settings: Any) -> Any:
    """torchdata's loader, whose workers send their state with each batch."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    with warnings.catch_warnings():  # it calls what torch 2.13 has deprecated
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        return StatefulDataLoader(*args, **settings)


def _batches(stream: Stream, spot: Spot, drawn: Lent) -> _Chunks:
    """Each whole batch as a chunk of one."""
    source: Any = stream.source
    parts.tell(source, spot.epoch)
    if spot.state is not None:
        source.load_state_dict(copy.deepcopy(spot.state))
    found = iter(source)

    def state() -> Any:
        return copy.deepcopy(source.state_dict())

    told = state if parts.remembers(stream) else None
    return _Chunks(lambda: [next(found)], told, _closing(found), drawn)


def _closing(rows: Any) -> Callable[[], None]:
    """What ends a generator, or workers that are not to persist.

    Other iterators end with their last reference.
    """
    if hasattr(rows, "_shutdown_workers"):
        kept = getattr(rows, "_persistent_workers", False)
        return lambda: None if kept else _torch.end_workers(rows)
    return getattr(rows, "close", lambda: None)
