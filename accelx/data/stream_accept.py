"""What is a stream, and what a torch DataLoader over one asks for."""

from __future__ import annotations

from typing import Any

import attrs
from torch.utils.data import DataLoader, IterableDataset

from accelx.accept import check_settings, workers_of
from accelx.data.stream_parts import has_state
from accelx.data.stream_record import Stream
from accelx.errors import DataError

_PLACING = {"seed", "rank", "world", "device", "env"}


def streams(source: Any) -> bool:
    """Whether items come one after another, and not by index.

    A DataLoader over an IterableDataset, or one that iterates in its own way; an
    iterable dataset; an iterable of batches with a state_dict.
    """
    if isinstance(source, DataLoader):
        own = type(source).__iter__ is not DataLoader.__iter__
        return own or isinstance(source.dataset, IterableDataset)
    if isinstance(source, (Stream, IterableDataset)):
        return True
    indexed = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if isinstance(source, type) or indexed or not hasattr(source, "__iter__"):
        return False
    return has_state(source) or hasattr(source, "split_by_rank")


def as_stream(source: Any, **fields: Any) -> Stream:
    """A Stream from what `streams` takes.

    `fields` are those of Stream: with a dataset of rows any of them, `batch_size=`
    among them, otherwise `seed`, `rank`, `world`, `device` and `env`. Raises DataError.
    """
    if isinstance(source, DataLoader):
        _once(source, fields)
        _check_settings(source)
        return Stream(**_settings_of(source), **fields)
    if isinstance(source, Stream):
        _once(source, fields)
        return attrs.evolve(source, **fields)
    if isinstance(source, IterableDataset) or hasattr(source, "split_by_rank"):
        if "batch_size" not in fields:
            raise DataError(
                f"a stream of rows needs a batch size, got {type(source).__name__} "
                "alone; write DataLoader(dataset, batch_size=...)"
            )
        return Stream(source, **fields)
    _once(source, fields)
    return Stream(source, None, **fields)


def _once(source: Any, fields: dict[str, Any]) -> None:
    twice = fields.keys() - _PLACING
    if twice:
        raise DataError(
            f"{', '.join(sorted(twice))} must be said once, got it beside a "
            f"{type(source).__name__} that says it too; write it there"
        )


def _settings_of(source: DataLoader[Any]) -> dict[str, Any]:
    known = type(source).__iter__.__module__.partition(".")[0] in ("torch", "torchdata")
    rows = known and isinstance(source.dataset, IterableDataset)
    if not rows or source.batch_size is None:
        return {"source": source, "batch_size": None}
    return {
        "source": source.dataset,
        "batch_size": source.batch_size,
        "drop_last": source.drop_last,
        **workers_of(source),
    }


def _check_settings(source: DataLoader[Any]) -> None:
    check_settings(source)
    _check_undivided(source)
    if getattr(source, "next_iter_state", None) is not None:
        raise DataError(
            "feed goes on from where the state says, got a StatefulDataLoader with a "
            "state of its own loaded; save and load with ax.save_state and "
            "ax.load_state, and write ax.feed(tx, loader, start=state)"
        )


def _check_undivided(source: DataLoader[Any]) -> None:
    """Refuse what gives each rank its part already: rank 0's would be taken for all."""
    batches: Any = source.batch_sampler
    inside = (source.sampler, batches, getattr(batches, "sampler", None))
    for one in (*inside, source.dataset):
        for name in ("num_replicas", "num_processes"):
            if hasattr(one, name):
                raise DataError(
                    "shard_loader wants the whole stream, and gives each rank its "
                    f"part, got {type(one).__name__} with {name}="
                    f"{getattr(one, name)}, which cuts it before; give the loader the "
                    "data as it was"
                )
