"""Where streams stand, as the slot of a State: what a run goes on from.

After each batch it keeps the source's own state, for the last few steps: one that is
saved or gone on from knows its step. A split stream has one such state on each rank, so
a save gathers them: the slot is the same on all ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from accelx.comm_wire import exchange
from accelx.data.stream_parts import readers_of, remembers
from accelx.data.stream_record import Spot, Stream
from accelx.errors import DataError
from accelx.records import Env
from accelx.state import Occasional

RECENT = 4  # steps: on CUDA a batch is read ahead of the one that is handed out


@attrs.define(eq=False)
class _Place:
    """Where one stream stands, at the last few steps."""

    source: Any = None  # by which it is known again; None where it was loaded
    readers: int = 1
    workers: int = 0
    exact: bool = False  # whether the source's state says where it stands
    recent: dict[int, Spot] = attrs.field(factory=dict)  # this rank's, by step
    saved: dict[int, Any] = attrs.field(factory=dict)  # all readers', by step

    def __deepcopy__(self, memo: dict[int, Any]) -> _Place:
        return attrs.evolve(self, recent={**self.recent}, saved={**self.saved})


@attrs.define(eq=False)
class Reading(Occasional):
    """What shard_loader keeps of the streams that `feed(tx, loader, start=state)` read.

    Without any it holds nothing, and nothing is saved of it. Streams are told apart by
    their source, and after a restart by the order in which they are first read.
    """

    env: Env
    places: list[_Place] = attrs.field(factory=list)

    @property
    def empty(self) -> bool:
        """Whether no stream was read."""
        return not any(place.recent or place.saved for place in self.places)

    def spot(self, stream: Stream, start: int) -> Spot:
        """Where to go on from to give the batch at step `start`.

        A spot at `start` where the source has a state, else the begin of its epoch, or
        of the run, from where it is read again. Raises DataError where other ranks or
        workers would read other rows.
        """
        place = self._of(stream)
        here = place.recent.get(start) or _restored(place, start, stream)
        if here is not None:
            _check(place, stream, start)
            if place.exact and remembers(stream):
                return here
            return Spot(here.epoch, here.first, here.first)
        return self._before(place, start)

    def _before(self, place: _Place, start: int) -> Spot:
        """The begin of the latest known epoch that is not behind `start`."""
        known = [(spot.first, spot.epoch) for spot in place.recent.values()]
        known += [(one["first"], one["epoch"]) for one in place.saved.values()]
        first, epoch = max((one for one in known if one[0] <= start), default=(0, 0))
        return Spot(epoch, first, first)

    def keep(self, stream: Stream, spot: Spot) -> None:
        """Remember where the stream stands at `spot.step`."""
        place = self._of(stream)
        place.readers, place.workers = readers_of(stream), stream.num_workers
        place.exact = remembers(stream)
        place.recent.pop(spot.step, None)
        place.recent[spot.step] = spot
        while len(place.recent) > RECENT:
            del place.recent[next(iter(place.recent))]

    def _of(self, stream: Stream) -> _Place:
        for place in self.places:
            if place.source is stream.source:
                return place
        loaded = (place for place in self.places if place.source is None)
        place = next(loaded, None)
        if place is None:
            place = _Place()
            self.places.append(place)
        place.source = stream.source
        return place

    def state_dict(self) -> dict[str, Any]:
        """Plain data, the same on all ranks. A collective, where a stream was read."""
        if self.empty:
            return {}
        own = [_own(place) for place in self.places]
        ranks = exchange(self.env, "the place in a stream", own)
        each = zip(self.places, *ranks, strict=True)
        return {"streams": [_record(place, parts) for place, *parts in each]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` says, whatever was read before."""
        self.places = [
            _Place(
                None,
                one["readers"],
                one["workers"],
                one["exact"],
                saved={int(step): spot for step, spot in one["spots"].items()},
            )
            for one in state.get("streams", ())
        ]


def _own(place: _Place) -> dict[int, tuple[int, Any]]:
    return {k: (spot.used, _plain(spot.state)) for k, spot in place.recent.items()}


def _record(place: _Place, ranks: list[dict[int, tuple[int, Any]]]) -> dict[str, Any]:
    """One stream as it is saved."""
    spots = dict(place.saved)
    for step, spot in place.recent.items():
        spots[step] = {
            "epoch": spot.epoch,
            "first": spot.first,
            "live": None if spot.live is None else list(spot.live),
            "readers": [list(ranks[r][step]) for r in range(place.readers)],
        }
    kept = sorted(spots)[-RECENT:]
    return {
        "readers": place.readers,
        "workers": place.workers,
        "exact": place.exact,
        "spots": {step: spots[step] for step in kept},
    }


def _restored(place: _Place, start: int, stream: Stream) -> Spot | None:
    """This rank's spot of a checkpoint."""
    one = place.saved.get(start)
    if one is None:
        return None
    reader = stream.rank if stream.rank < len(one["readers"]) else 0
    used, state = one["readers"][reader]
    live = None if one["live"] is None else tuple(one["live"])
    return Spot(one["epoch"], one["first"], start, live, used, _unplain(state))


def _plain(state: Any) -> Any:
    """As one text where it is JSON: it may be nested deeper than a checkpoint takes."""
    try:
        text = json.dumps(state)
    except (TypeError, ValueError):
        return state
    return {"json": text} if json.loads(text) == state else state


def _unplain(state: Any) -> Any:
    only = isinstance(state, Mapping) and set(state) == {"json"}  # type: ignore[reportUnknownArgumentType]
    return json.loads(state["json"]) if only else state


def _check(place: _Place, stream: Stream, start: int) -> None:
    """Refuse to go on where rows would be read twice and others not at all."""
    readers = readers_of(stream)
    kind = "same-ranks" if place.exact else "replay"
    if readers != place.readers:
        raise DataError(
            f"this stream was read by {place.readers} ranks, each its own part, up to "
            f"step {start} (guarantee: {kind}), and wants as many to go on, got "
            f"{readers}; go on with {place.readers} ranks, or begin the stream anew "
            "with ax.feed(tx, loader), without start=state"
        )
    if stream.num_workers != place.workers:
        raise DataError(
            f"this stream was read by num_workers={place.workers} up to step {start} "
            f"(guarantee: {kind}), by which its order goes, got num_workers="
            f"{stream.num_workers}; write num_workers={place.workers}"
        )
