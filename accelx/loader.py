"""Batches by arithmetic: a frozen record of how they are read, and what reads them."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from accelx import accept, fetch, prefetch
from accelx.comm_wire import exchange, grouped
from accelx.cut import pieces
from accelx.data import plan, stream
from accelx.data.counted import odd
from accelx.data.lengths import whole
from accelx.data.mix import Mixture
from accelx.data.orders import Order
from accelx.data.span import span
from accelx.data.stream import Stream
from accelx.data.walks import Walk
from accelx.errors import DataError
from accelx.permutation import check_seed, key
from accelx.records import Env, Transform, code
from accelx.rows import Rows, Waited, leading, stamp


def _sized(_: object, __: object, dataset: Any) -> None:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(
            "a dataset must have a length and items by index (__len__, __getitem__), "
            f"got {type(dataset).__name__}; give a map-style dataset, or a torch "
            "IterableDataset for what comes one after another"
        )


def _brief(dataset: Any) -> str:
    return f"<{type(dataset).__name__} of {len(dataset)}>"


@attrs.frozen(repr=False)
class Loader:
    """Batches by arithmetic: what the batch at step k holds depends on k alone.

    Its length is that of one epoch in batches, the same on each rank. Step k lies in
    epoch k // length, unless a sampler gives epochs of several lengths.
    """

    dataset: Any = attrs.field(validator=_sized, eq=id, repr=False)
    # rows over all ranks; None where a batch sampler says
    batch_size: int | None = attrs.field(validator=attrs.validators.optional(whole(1)))
    shuffle: bool = attrs.field(default=False, kw_only=True)
    seed: int = attrs.field(default=0, kw_only=True)  # of the order
    salt: int | None = attrs.field(default=None, kw_only=True)  # a generator's seed
    # in place of `shuffle`: what a sampler asks for, by arithmetic or walked
    order: Order | None = attrs.field(default=None, kw_only=True)
    walk: Walk | None = attrs.field(default=None, kw_only=True)
    batched: bool = attrs.field(default=False, kw_only=True)  # an item is a batch
    drop_last: bool = attrs.field(default=False, kw_only=True)  # no short batch
    # every batch has the same shape on each rank, filled up with rows of no weight
    static_shapes: bool = attrs.field(default=False, kw_only=True)
    collate: fetch.Collate = attrs.field(default=default_collate, kw_only=True)
    rank: int = attrs.field(default=0, validator=whole(0), kw_only=True)
    world: int = attrs.field(default=1, validator=whole(1), kw_only=True)
    device: str = attrs.field(default="cpu", kw_only=True)  # where batches arrive
    # with a process group: ranks then compare what they read
    env: Env | None = attrs.field(default=None, kw_only=True)
    # The rest is handed to torch's workers.
    num_workers: int = attrs.field(default=0, validator=whole(0), kw_only=True)
    timeout: float = attrs.field(default=0, kw_only=True)  # seconds
    worker_init_fn: fetch.Init = attrs.field(default=None, kw_only=True)
    multiprocessing_context: Any = attrs.field(default=None, kw_only=True)
    prefetch_factor: int | None = attrs.field(default=None, kw_only=True)
    persistent_workers: bool = attrs.field(default=False, kw_only=True)
    pin_memory: bool = attrs.field(default=False, kw_only=True)  # CUDA always has it

    def __attrs_post_init__(self) -> None:
        check_seed(self.seed)
        if self.rank >= self.world:
            raise DataError(
                f"rank must be below world, got rank {self.rank} of {self.world}; "
                "count ranks from 0"
            )
        if self.static_shapes and (self.batched or self.walk is not None):
            came = "items that are batches" if self.batched else "a sampler's batches"
            raise DataError(
                f"static_shapes wants batches of one known size, got {came}; "
                "write batch_size=, or leave static_shapes out"
            )

    def with_static_shapes(self) -> Loader:
        """The same, each batch of one shape on every rank."""
        return attrs.evolve(self, static_shapes=True)

    def __repr__(self) -> str:
        return code(f"Loader({_brief(self.dataset)}, ", self).replace(", (", ", ", 1)

    def __len__(self) -> int:
        return plan.length(self)


def as_loader(source: Any, **fields: Any) -> Loader | Stream:
    """A Loader from a torch DataLoader, a Loader, or a dataset and `batch_size=`.

    `fields` are those of Loader: with a dataset any of them, otherwise `seed`, `rank`,
    `world`, `device` and `env`, since the rest is said by the source already. What has
    no items by index becomes a Stream. Raises DataError for what cannot be cut exactly.
    """
    if stream.streams(source):
        return stream.as_stream(source, **fields)
    if not isinstance(source, (DataLoader, Loader)):
        cut = isinstance(getattr(source, "loader", None), (Loader, Stream))
        if cut or isinstance(source, Transform):
            raise DataError(
                f"wanted a DataLoader, got {_brief(source)}; write "
                "ax.feed(tx, DataLoader(...)) with the DataLoader itself, which "
                "shard_loader in tx then cuts over the ranks"
            )
        if "batch_size" not in fields:
            raise DataError(
                f"a loader needs a batch size, got the {_kind(source)} alone; write "
                f"{_wrapped(source)}"
            )
        return Loader(source, **fields)
    twice = fields.keys() - {"seed", "rank", "world", "device", "env"}
    if twice:
        raise DataError(
            f"{', '.join(sorted(twice))} must be said once, got it beside a "
            f"{type(source).__name__} that says it too; write it there"
        )
    if isinstance(source, Loader):
        return attrs.evolve(source, **fields)
    return Loader(source.dataset, **accept.settings_of(source), **fields)


def _kind(source: Any) -> str:
    return f"{'dataset ' * hasattr(source, '__getitem__')}{type(source).__name__}"


def _wrapped(source: Any) -> str:
    """The DataLoader over `source`, by what can be seen of it."""
    if not hasattr(source, "__getitem__"):
        return "DataLoader(dataset, batch_size=...) over a Dataset or IterableDataset"
    whole = " (batch_size=None if each item is a batch)" * isinstance(source, list)
    return f"DataLoader(dataset, batch_size=...){whole}"


def guarantee(loader: Loader | Stream) -> str:
    """How the batch of a step is reached: "exact", "same-ranks" or "replay".

    "exact": by arithmetic, in O(1). "same-ranks": by a state that was saved, on as many
    ranks. "replay": by reading again what comes before it; of a sampler of the user's
    own that is its indices and no item.
    """
    if isinstance(loader, Stream):
        return stream.guarantee_of(loader)
    return "exact" if loader.walk is None else "replay"


def rows_at(loader: Loader, step: int) -> list[int]:
    """The dataset indices of the whole batch at `step`, in order."""
    whole = attrs.evolve(loader, rank=0, world=1, static_shapes=False)
    return local_indices(whole, step)


def local_indices(loader: Loader, step: int) -> list[int]:
    """The dataset indices that this rank reads at `step`.

    Of a batch of m rows, rank r of w gets rows (m r) // w up to (m (r + 1)) // w; ranks
    in order hold the batch in order. A rank with no rows reads the batch's first row.
    """
    return _at(loader, step)[0]


def rows_here(loader: Loader, step: int) -> Rows:
    """How many rows of the batch at `step` are this rank's, and all ranks'."""
    return _at(loader, step)[1]


def _at(loader: Loader, step: int) -> tuple[list[int], Rows]:
    _spans(loader, step, step + 1)
    marked = deque[Rows]()
    found = next(plan.indices(loader, step, step + 1, Tensor.tolist, marked))
    return found, marked[0] if marked else next(plan.marks(loader, step, None))


def batches(
    loader: Loader | Stream,
    start: int = 0,
    stop: int | None = None,
    memory: stream.Reading | None = None,
) -> Iterator[Any]:
    """This rank's batches from step `start` up to `stop`, collated, on its device.

    Without `stop` they end with the epoch in which `start` falls; with it they go on
    through as many epochs as it takes, by the same workers. Each carries its `Rows`. A
    batch is read in O(1) from anywhere; the global random state is left alone.
    Effects: worker processes, which end with the iterator; one small collective, where
    the loader has an Env of several ranks. Law L10. An error of the dataset is noted
    with item, worker, step and rank. `memory` is what a State keeps of streams. Raises
    DataError.
    """
    if isinstance(loader, Stream):
        return stream.read(loader, start, stop, memory)
    start, stop = _spans(loader, start, stop)
    if loader.num_workers and start < stop:
        passing = attrs.evolve(loader, persistent_workers=False)
        return by_workers(passing, *pool(passing, start), start, stop)
    ways = loader.dataset, loader.collate, loader.batched, loader.walk is not None
    unpack, read = fetch.fetcher(*ways)
    marked = deque[Rows]()
    lists = plan.indices(loader, start, stop, unpack, marked)
    return _delivered(loader, map(read, lists), start, stop, marked)


def pool(loader: Loader, start: int) -> tuple[DataLoader[Any], fetch.Spans]:
    """Workers for `loader`, not yet started, and the span that they will go over."""
    seeds = torch.Generator()  # of the workers' own random states
    seeds.manual_seed(key(loader.seed, loader.rank, start) >> 1)
    return fetch.pool(
        loader.dataset,
        loader.collate,
        loader.worker_init_fn,
        loader.batched,
        generator=seeds,
        num_workers=loader.num_workers,
        timeout=loader.timeout,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        pin_memory=torch.device(loader.device).type == "cuda",
    )


def by_workers(
    loader: Loader,
    workers: DataLoader[Any],
    spans: fetch.Spans,
    start: int,
    stop: int,
) -> Iterator[Any]:
    """The batches of steps `start` to `stop`, read by `workers`."""
    marked = deque[Rows]()
    spans.lists = lambda: plan.indices(loader, start, stop, Tensor.tolist, marked)
    return _delivered(loader, fetch.read(workers), start, stop, marked)


def _spans(loader: Loader, start: int, stop: int | None) -> tuple[int, int]:
    """The steps to start and to stop at, after checking them."""
    start, stop = span(start, stop)
    if stop is None:
        return start, plan.end_of(loader, start)
    endless = loader.walk is not None and not loader.walk.told  # it may be
    if stop > start and not endless and not len(loader):
        raise DataError(
            f"steps {start} to {stop} need batches, got none from "
            f"{len(loader.dataset)} items at batch_size={loader.batch_size}, "
            f"drop_last={loader.drop_last}; give a dataset with items, or a smaller "
            "batch_size"
        )
    # a run that is beyond `stop` already has no step to make
    return start, max(start, stop)


def _delivered(
    loader: Loader, found: Iterator[Any], start: int, stop: int, marked: deque[Rows]
) -> Iterator[Any]:
    """`found`, moved and marked, with step and rank noted on what it raises."""
    step, waited = start, Waited()
    # collating by torch's own rule keeps each row, and looking takes 1 us
    looked = not loader.batched and fetch.keeps_rows(loader.collate)
    if loader.batched:
        found = (_part(loader, whole, marked) for whole in found)
    marks = plan.marks(loader, start, waited)
    if varies(loader):
        marks = (attrs.evolve(one, waited=waited) for one in iter(marked.popleft, None))
    try:
        _compare(loader, start, stop)
        began = perf_counter()
        for batch in prefetch.on_device(found, loader.device):
            waited.seconds += perf_counter() - began
            record = next(marks)
            looked = looked or odd(batch, record, step)
            yield stamp(batch, record)
            step += 1
            began = perf_counter()
        if step != stop:
            raise DataError(
                f"batches of steps {start} to {stop} were wanted, but reading ended "
                f"before step {step}; look for a StopIteration, such as of next(...), "
                "in the dataset, the sampler or collate_fn"
            )
    except Exception as error:
        where = f"rank {loader.rank} of {loader.world}"
        error.add_note(f"accelx: while getting the batch of step {step} on {where}")
        raise


def _part(loader: Loader, whole: Any, marked: deque[Rows]) -> Any:
    """This rank's rows of an item that is a batch."""
    m = leading(whole)
    if loader.world == 1 or m is None or not m:
        if loader.world > 1:
            raise DataError(
                f"batch_size=None on {loader.world} ranks wants items that are batches "
                f"with rows to divide, got {type(whole).__name__} without a row; write "
                "batch_size=1, or more"
            )
        marked.append(Rows(m or 1, m or 1))
        return whole
    low, high = plan.share(loader, m)
    marked.append(Rows(high - low, m))
    first, some = (low, high - low) if low < high else (0, 1)
    return pieces(whole, "", [first, some, m - first - some])[1]


def _compare(loader: Loader, start: int, stop: int) -> None:
    """Refuse ranks that would read from different data or in different orders."""
    env = loader.env
    if env is None or env.world == 1:
        return
    whole = attrs.evolve(loader, rank=0, world=1, static_shapes=False)
    looked = 1 if loader.walk is None else 64  # steps; a sampler may be a rank's own
    last = min(stop, start + looked)  # a rank that reads nothing says so as well
    some = plan.indices(whole, start, last, Tensor.tolist, deque())
    first = key(*(_number(index) for batch in some for index in batch))
    size = (
        f"{len(loader.dataset)} items, batch_size={loader.batch_size}, "
        f"drop_last={loader.drop_last}"
    )
    size += _content(loader.dataset)
    told = f"steps {start} to {stop} of {size}, order {first:016x}"
    said = exchange(env, "feed", told)
    if len(set(said)) > 1:
        each = "; ".join(f"{what} on {who}" for what, who in grouped(said).items())
        raise DataError(
            "feed wants the same data in the same order on each rank, which then reads "
            f"its rows, got {each}; make dataset, sampler, seed and start the same"
        )


def _number(index: Any) -> int:
    """An index, or a number that a key has on each rank."""
    return index if isinstance(index, int) else zlib.crc32(repr(index).encode())


def _content(dataset: Any) -> str:
    """What can be told of a dataset's content: its files, a mixture's sources."""
    said = ""
    for one in (dataset, *plan.inside(dataset)):
        content = getattr(one, "content", None)
        said += f", content {content:016x}" if isinstance(content, int) else ""
        if isinstance(one, Mixture):
            each = [f"{n!r} of {len(s)}{_content(s)}" for n, s in one.sources.items()]
            said += f", sources {' and '.join(each)}"
    return said


def varies(loader: Loader) -> bool:
    """Whether the rows of a batch are known only when it comes."""
    return loader.batched or loader.walk is not None
