"""How an iterable dataset is divided between those who read it, and what it remembers.

A division keeps the rows: over all readers they are those of the whole, each once.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from accelx.data.stream_record import Stream
from accelx.errors import DataError

# What a datasets.IterableDataset is made of that gives the same rows when its shards
# are divided. Others do not: `take(10)` of two halves takes 5 of each.
_DIVISIBLE = (
    *("Examples", "ArrowExamples", "ShuffledDataSourcesExamples", "RebatchedArrow"),
    *("ShuffledDataSourcesArrowExamples", "SelectColumns", "Mapped", "Filtered"),
    *("Formatted", "Typed", "BufferShuffled", "InterleavedShards", "Repeat"),
    "VerticallyConcatenatedMultiSources",
)


def of_hub(dataset: Any) -> bool:
    """Whether this is a `datasets.IterableDataset`; imports nothing."""
    hub = sys.modules.get("datasets")
    return isinstance(dataset, getattr(hub, "IterableDataset", ()))


def readers_of(stream: Stream) -> int:
    """How many ranks read: each its own part, or rank 0 what cannot be divided."""
    source, world = stream.source, stream.world
    if stream.batch_size is None:
        return 1
    if of_hub(source):
        if vars(source).get("_distributed") is not None:
            raise DataError(
                "shard_loader wants the whole stream, and gives each rank its part, "
                "got a dataset that split_dataset_by_node has cut before; give it the "
                "dataset as it was"
            )
        return world if world > 1 and _shards_divide(source, world) else 1
    return world if hasattr(source, "split_by_rank") else 1


def _shards_divide(dataset: Any, world: int) -> bool:
    shards = dataset.num_shards
    if shards < world or (shards % world and not _by_shards()):
        return False
    names = [type(one).__name__.removesuffix("Iterable") for one in _stages(dataset)]
    return all(
        n in _DIVISIBLE or n.removesuffix("Examples") in _DIVISIBLE for n in names
    )


def _by_shards() -> dict[str, Any]:
    """The argument that keeps uneven numbers of shards apart, where datasets has it."""
    from datasets.distributed import split_dataset_by_node

    known = inspect.signature(split_dataset_by_node).parameters
    return {"strategy": "shards"} if "strategy" in known else {}


def _stages(dataset: Any) -> Iterator[Any]:
    todo = [vars(dataset).get("_ex_iterable")]
    while todo:
        one: Any = todo.pop()
        if one is not None:
            yield one
            todo += [getattr(one, "ex_iterable", None)]
            todo += list(getattr(one, "ex_iterables", ()))


def has_state(source: Any) -> bool:
    """Whether it has a state_dict that can be loaded."""
    names = ("state_dict", "load_state_dict")
    return all(callable(getattr(source, name, None)) for name in names)


def remembers(stream: Stream) -> bool:
    """Whether the state of what is read says where it stands, to the row."""
    source = stream.source
    if not has_state(source) or (of_hub(source) and not all(_exact(source))):
        return False
    if stream.batch_size is None or not stream.num_workers:
        return True
    return importlib.util.find_spec("torchdata") is not None


def _exact(dataset: Any) -> Iterator[bool]:
    """For each stage, whether its state holds all of it: a buffer is in none."""
    arrow = getattr(vars(dataset).get("_formatting"), "is_table", False)
    for one in _stages(dataset):
        name = type(one).__name__
        yield not name.startswith("BufferShuffled")
        yield not (arrow and getattr(one, "batched", False))


def tell(source: Any, epoch: int) -> None:
    """Say which epoch comes, to all that wants to know."""
    inner = [getattr(source, n, None) for n in ("sampler", "batch_sampler", "dataset")]
    for one in (source, *inner):
        listen = getattr(one, "set_epoch", None)
        if callable(listen):
            listen(epoch)


def part_of(dataset: Any, reader: int, readers: int, epoch: int) -> Any:
    """What one of the readers reads in `epoch`: an iterable of rows.

    A new object where it has a state or can be divided, so that two readings of one
    dataset do not move each other.
    """
    if of_hub(dataset):
        from datasets.distributed import split_dataset_by_node

        part = split_dataset_by_node(dataset, reader, readers, **_by_shards())
    elif hasattr(dataset, "split_by_rank"):
        tell(dataset, epoch)
        part = dataset.split_by_rank(reader, readers)
    else:
        part = _apart(dataset) if has_state(dataset) else dataset
    tell(part, epoch)
    return part


def _apart(dataset: Any) -> Any:
    """A copy whose lists and dicts are its own: it may fill them as it is read."""
    own = copy.copy(dataset)
    for name, value in list(getattr(own, "__dict__", {}).items()):
        object.__setattr__(own, name, _own(value))
    return own


def _own(value: Any, deep: int = 2) -> Any:
    """A container as a copy, and so containers in it, some levels down."""
    if not isinstance(value, (list, dict, deque, set, bytearray)):
        return value
    own: Any = copy.copy(value)  # type: ignore[reportUnknownVariableType]
    if deep and isinstance(own, dict):
        own.update((k, _own(one, deep - 1)) for k, one in value.items())  # type: ignore[reportUnknownVariableType]
    elif deep and isinstance(own, (list, deque)):
        for i, one in enumerate(value):  # type: ignore[reportUnknownArgumentType]
            own[i] = _own(one, deep - 1)
    return own


class Part(IterableDataset[Any]):
    """One reader's part, read in torch workers, each of which reads its own of it."""

    def __init__(self, dataset: Any, reader: int, readers: int, epoch: int) -> None:
        self.dataset = dataset
        self._place = reader, readers, epoch

    def __iter__(self) -> Iterator[Any]:
        return iter(self._opened())

    def _opened(self) -> Any:
        reader, readers, epoch = self._place
        info = get_worker_info()
        if info is not None and hasattr(self.dataset, "split_by_rank"):
            reader = reader * info.num_workers + info.id
            readers *= info.num_workers
        return part_of(self.dataset, reader, readers, epoch)


class StatefulPart(Part):
    """The same of a dataset with a state, as torchdata's loader wants it."""

    _part: Any = None
    _start: Any = None

    def __iter__(self) -> Iterator[Any]:
        self._part = self._opened()
        if self._start is not None:
            self._part.load_state_dict(self._start)
        return iter(self._part)

    def state_dict(self) -> Any:
        """The state of the part that is being read."""
        return self._start if self._part is None else self._part.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Start there when it is next iterated."""
        self._start = state
