"""Streams in one process: rows, steps, epochs, and what stands in between."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import random

import attrs
import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import accelx as ax
from accelx.data import stream_wire
from accelx.data.stream import (
    Reading,
    Stream,
    as_stream,
    guarantee_of,
    read,
    streams,
)
from accelx.data.stream_epochs import StreamEpochs
from accelx.data.stream_parts import part_of, readers_of
from accelx.data.stream_record import Spot
from accelx.data.stream_rows import reader
from accelx.errors import DataError
from accelx.loader import as_loader
from accelx.rows import Rows, rows_of
from tests.streaming import (
    Batches,
    Buffered,
    Counting,
    Drawing,
    Failing,
    Parted,
    Plain,
    batch_of,
    ids,
)

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


def loader_of(dataset, size=4, **settings):
    """A torch DataLoader over it."""
    return DataLoader(dataset, batch_size=size, collate_fn=batch_of, **settings)


def hub(n=23, shards=4):
    """A streamed Arrow table."""
    table = datasets.Dataset.from_dict({"i": list(range(n))})
    return table.to_iterable_dataset(num_shards=shards)


def over(stream, world):
    """The stream as the first of `world` ranks knows it."""
    return attrs.evolve(stream, world=world, env=ax.Env(0, world, 0, world))


@settings(max_examples=60)
@given(
    st.integers(0, 23),
    st.integers(1, 7),
    st.booleans(),
    st.integers(0, 12),
    st.integers(0, 9),
)
def test_steps_are_those_of_torchs_loader_through_all_epochs(
    n, size, drop, start, more
):
    """From any step to any other, whatever the sizes; each epoch is told to it."""
    source = loader_of(Plain(n), size, drop_last=drop)
    epoch = [ids(batch) for batch in source]
    found = read(as_stream(source), start, start + more)
    if not more or not epoch:
        if more:
            with pytest.raises(
                ax.DataError, match="needs a batch, got none in epoch 0"
            ):
                list(found)
        return
    steps = [(k // len(epoch) * 1000, epoch[k % len(epoch)]) for k in range(24)]
    wanted = [[base + i for i in rows] for base, rows in steps[start : start + more]]
    assert [ids(batch) for batch in found] == wanted


def test_without_stop_it_ends_with_the_epoch_of_start():
    """And an epoch of nothing is none."""
    stream = as_stream(loader_of(Plain(10)))
    assert [ids(b) for b in read(stream, 1)] == [[4, 5, 6, 7], [8, 9]]
    assert [ids(b)[0] for b in read(stream, 3)] == [1000, 1004, 1008]
    assert list(read(as_stream(loader_of(Plain(0))))) == []
    with pytest.raises(ax.DataError, match="count steps from 0"):
        read(stream, -1)


def test_rows_are_marked():
    """All rows of one process are real."""
    marks = [rows_of(b) for b in read(as_stream(loader_of(Plain(10))))]
    assert marks == [Rows(4, 4), Rows(4, 4), Rows(2, 2)]


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: loader_of(Plain(5)), True),
        (hub, True),
        (lambda: StatefulDataLoader(TensorDataset(torch.arange(4))), True),
        (lambda: DataLoader(Plain(5), batch_size=None), True),
        (lambda: Batches([2]), True),
        (lambda: Parted([1, 2]), True),
        (lambda: DataLoader(TensorDataset(torch.arange(4))), False),
        (lambda: [1, 2], False),
        (lambda: torch.nn.Linear(1, 1), False),
    ],
)
def test_what_is_a_stream(make, wanted):
    """What has no items by index, and what iterates in its own way."""
    assert streams(make()) == wanted


def test_a_subclass_that_iterates_in_its_own_way_is_read_by_that():
    """Its batches are taken whole, as it gives them."""

    class Twice(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                yield {"i": batch["i"] * 2}

    source = Twice(Plain(5), batch_size=2, collate_fn=batch_of)
    found = [b["i"].tolist() for b in read(as_stream(source))]
    assert found == [[0, 2], [4, 6], [8]]


def test_what_cannot_be_read_as_asked_is_refused():
    """With what to write instead."""
    with pytest.raises(ax.DataError, match="needs a batch size"):
        as_stream(Plain(3))
    with pytest.raises(ax.DataError, match="drop_last must be said once"):
        as_stream(loader_of(Plain(3)), drop_last=True)
    with pytest.raises(ax.DataError, match="drop in_order="):
        as_stream(loader_of(Plain(3), in_order=False, num_workers=1))
    with pytest.raises(ax.DataError, match="batch_size=1 or more"):
        as_stream(Plain(3), batch_size=0)
    with pytest.raises(ax.DataError, match="wants the Env"):
        as_stream(Plain(3), batch_size=2, world=2)
    loaded = StatefulDataLoader(Counting(3), batch_size=1)
    loaded.load_state_dict({"_anything": 1})
    with pytest.raises(ax.DataError, match="start=state"):
        as_stream(loaded)
    cut = split_dataset_by_node(hub(), 0, 2)
    with pytest.raises(ax.DataError, match="has cut before"):
        readers_of(over(as_stream(cut, batch_size=2), 2))


def test_a_loader_that_was_divided_before_is_refused():
    """Of it rank 0 would read its own part only, and that would pass for the whole."""
    data = list(range(9))
    cut = DistributedSampler(data, num_replicas=2, rank=0)
    with pytest.raises(ax.DataError, match="num_replicas=2, which cuts it before"):
        as_stream(StatefulDataLoader(data, 2, sampler=cut))
    part = Plain(9)
    part.num_processes = 4
    with pytest.raises(ax.DataError, match="Plain with num_processes=4"):
        as_stream(loader_of(part))


def test_a_record_prints_and_compares():
    """By its settings; two of one source are equal."""
    source = Plain(3)
    one = as_stream(source, batch_size=2, drop_last=True)
    assert repr(one) == "Stream(<Plain>, 2, drop_last=True)"
    assert one == as_stream(one) != as_stream(source, batch_size=3)


ROWS = st.lists(
    st.one_of(
        st.text(),
        st.integers(),
        st.sampled_from(
            [torch.float32, torch.bfloat16, torch.bool, torch.complex64]
        ).map(lambda dtype: torch.ones(2, 3).to(dtype)),
        st.just(torch.tensor(3)),
        st.just(torch.empty(0, 2)),
    )
)


@given(ROWS)
def test_what_crosses_the_wire_comes_as_it_was(rows):
    """Texts, numbers and tensors of any dtype and shape."""
    back = stream_wire.unpacked(stream_wire.packed({"rows": rows}))["rows"]
    for got, sent in zip(back, rows, strict=True):
        assert type(got) is type(sent)
        if isinstance(sent, torch.Tensor):
            assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
            assert torch.equal(got, sent)
        else:
            assert got == sent


def test_a_row_takes_its_own_bytes_alone():
    """torch's own pickle, the control, takes the whole tensor that it is a view of."""
    whole = torch.randn(1000, 100)
    ours = stream_wire.packed([whole[3]]).numel()
    assert 400 <= ours < 800
    assert len(pickle.dumps([whole[3]])) > 400_000
    parts = [stream_wire.packed(whole[a : a + 250]).numel() for a in (0, 250, 500, 750)]
    assert sum(parts[1:]) < 0.76 * stream_wire.packed(whole).numel()


@settings(max_examples=60)
@given(st.data(), st.sampled_from([0, 2]))
def test_a_reader_goes_on_from_where_it_says(data, kind):
    """Whatever it was asked for, in the middle of a chunk too."""
    source = Counting(23) if kind == 0 else hub()
    stream = as_stream(source, batch_size=5)
    rows = reader(stream, Spot(), 0, 1, tracked=True)
    whole = list(source)
    taken = []
    for count in data.draw(st.lists(st.integers(0, 7), max_size=6)):
        taken += rows.take(count)
    used, state = rows.where()
    again = reader(stream, Spot(used=used, state=state), 0, 1, tracked=False)
    assert taken == whole[: len(taken)]
    assert again.take(99) == rows.take(99) == whole[len(taken) :]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    "change",
    [
        lambda d: d,
        lambda d: d.map(lambda row: {"i": row["i"] + 1}),
        lambda d: d.filter(lambda row: row["i"] % 3),
        lambda d: d.shuffle(seed=1, buffer_size=5),
        lambda d: d.take(10),
        lambda d: d.skip(3),
    ],
)
def test_a_division_keeps_the_rows(change, world):
    """Over all readers they are those of the whole; what cannot be divided is not."""
    dataset = change(hub())
    readers = readers_of(over(as_stream(dataset, batch_size=2), world))
    found = [r["i"] for k in range(readers) for r in part_of(dataset, k, readers, 0)]
    assert sorted(found) == sorted(row["i"] for row in dataset)


def test_control_a_division_of_some_rows_takes_others():
    """Halves of `take(10)` hold 5 rows each of their own, which the whole has not."""
    some = hub().take(10)
    halves = [split_dataset_by_node(some, r, 2) for r in range(2)]
    found = [row["i"] for half in halves for row in half]
    assert sorted(found) != [row["i"] for row in some]


def test_who_reads():
    """Each rank where there are shards enough, else rank 0."""
    counts = [readers_of(over(as_stream(hub(), batch_size=2), w)) for w in (2, 3, 4, 5)]
    assert counts == [2, 3, 4, 1]
    assert readers_of(over(as_stream(Parted([3]), batch_size=2), 3)) == 3
    assert readers_of(over(as_stream(Plain(3), batch_size=2), 3)) == 1
    assert readers_of(over(as_stream(Batches([2])), 3)) == 1


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (loader_of(Plain(3)), "replay"),
        (loader_of(Counting(3)), "same-ranks"),
        (loader_of(Counting(3), num_workers=2), "same-ranks"),
        (loader_of(hub()), "same-ranks"),
        (loader_of(hub().shuffle(seed=0, buffer_size=3)), "replay"),
        (Batches([2]), "same-ranks"),
        (DataLoader(Plain(3), batch_size=None), "replay"),
    ],
)
def test_the_guarantee(source, wanted):
    """A state that holds all is gone on from; a buffer of rows is in none."""
    assert guarantee_of(as_stream(source)) == wanted


def test_control_the_state_of_a_shuffle_buffer_loses_rows():
    """Why it does not count as one: the rows in the buffer are gone."""
    whole = hub().shuffle(seed=0, buffer_size=6)
    first = iter(whole)
    before = [next(first)["i"] for _ in range(9)]
    again = hub().shuffle(seed=0, buffer_size=6)
    again.load_state_dict(whole.state_dict())
    assert sorted(before + [row["i"] for row in again]) != list(range(23))
    stream = as_stream(whole, batch_size=4, collate=batch_of)
    memory = Reading(ax.Env())
    found = [ids(b) for b in read(stream, 0, 2, memory)]
    found += [ids(b) for b in read(stream, 2, None, memory)]
    assert sorted(i for rows in found for i in rows) == list(range(23))


def test_the_programs_own_random_numbers_stay():
    """A source draws by seed and epoch; the global generators are left as they are.

    The control: another seed is another order.
    """
    stream = as_stream(loader_of(Drawing(12), 3))
    before = random.getstate(), torch.get_rng_state()
    whole = [ids(b) for b in read(stream, 0, 8)]
    assert before[0] == random.getstate()
    assert torch.equal(before[1], torch.get_rng_state())
    random.seed(99)
    assert [ids(b) for b in read(stream, 5, 8)] == whole[5:]
    other = attrs.evolve(stream, seed=1)
    assert [ids(b) for b in read(other, 0, 4)] != whole[:4]


def resumed(stream, memory, start, stop):
    """Go on from a copy of `memory` that went through its plain data."""
    other = Reading(ax.Env())
    other.load_state_dict(copy.deepcopy(memory.state_dict()))
    return [ids(b) for b in read(stream, start, stop, other)]


@pytest.mark.parametrize(
    ("make", "workers"),
    [(lambda: Counting(11), 0), (hub, 0), (lambda: Plain(11), 0), (hub, 2)],
)
def test_memory_goes_on_at_each_step(make, workers):
    """Also at the end of an epoch, where the next one begins; in place and restored."""
    stream = as_stream(loader_of(make(), num_workers=workers))
    whole = [ids(b) for b in read(stream, 0, 9)]
    for stop in (2, 3, 6, 7) if not workers else (6,):
        memory = Reading(ax.Env())
        assert [ids(b) for b in read(stream, 0, stop, memory)] == whole[:stop]
        assert resumed(stream, memory, stop, 9) == whole[stop:]
        assert [ids(b) for b in read(stream, stop, 9, memory)] == whole[stop:]


def test_a_state_stays_what_it_was_at_its_step():
    """Though the source goes on to change what it named, before a save and after it."""
    stream, memory = as_stream(loader_of(Buffered(23), 3)), Reading(ax.Env())
    whole = [ids(b) for b in read(stream, 0, 7)]
    list(read(stream, 0, 4, memory))
    for start in (2, 3, 2, 4):
        forked = copy.deepcopy(memory)
        assert [ids(b) for b in read(stream, start, 7, forked)] == whole[start:]
    assert resumed(stream, memory, 3, 7) == whole[3:]


def test_items_that_collate_fn_leaves_out_are_told():
    """As of indexed data: ranks would weigh rows wrongly."""
    stream = as_stream(
        Plain(9), batch_size=4, collate=lambda rows: torch.tensor(rows[:3])
    )
    with pytest.warns(ax.NeutralityWarning, match=r"4 items were read .* step 0"):
        assert [len(batch) for batch in read(stream)] == [3, 3, 1]


def test_a_state_is_used_and_not_only_read_past():
    """What lies before is not read again; without a state, the control, it is."""
    reads = []

    class Watched(Counting):
        def __iter__(self):
            for i in super().__iter__():
                reads.append(i)
                yield i

    class Stateless(Watched):
        state_dict = load_state_dict = None

    for kind, wanted in ((Watched, [8, 9, 10]), (Stateless, list(range(11)))):
        stream, memory = as_stream(loader_of(kind(11))), Reading(ax.Env())
        list(read(stream, 0, 2, memory))
        reads.clear()
        assert resumed(stream, memory, 2, 3) == [[8, 9, 10]]
        assert reads == wanted


def test_an_empty_memory_holds_nothing():
    """So that runs without streams are saved as before; two streams are kept apart."""
    memory = Reading(ax.Env())
    assert memory.empty
    assert memory.state_dict() == {}
    one, two = as_stream(loader_of(Counting(9))), as_stream(loader_of(Counting(9), 2))
    pairs = zip(read(one, 0, 2, memory), read(two, 0, 2, memory), strict=True)
    assert [(ids(a), ids(b)) for a, b in pairs][1] == ([4, 5, 6, 7], [2, 3])
    assert not memory.empty
    assert len(memory.state_dict()["streams"]) == 2
    forked = copy.deepcopy(memory)
    assert [ids(b) for b in read(one, 2, 3, forked)] == [[8]]
    assert [ids(b) for b in read(two, 2, 3, forked)] == [[4, 5]]


def test_other_workers_are_refused():
    """The order of a stream goes by their number."""
    source = hub()
    memory = Reading(ax.Env())
    list(read(as_stream(loader_of(source, num_workers=2)), 0, 2, memory))
    with pytest.raises(ax.DataError, match="write num_workers=2"):
        read(as_stream(loader_of(source)), 2, None, memory)


def test_two_streams_of_one_dataset_do_not_move_each_other():
    """Each goes on by a state of its own."""
    source = hub()
    stream = as_stream(source, batch_size=5, collate=batch_of)
    memory = Reading(ax.Env())
    one, two = read(stream, 0, 2, memory), read(stream)
    found = [ids(next(one)), ids(next(two)), ids(next(one)), ids(next(two))]
    assert found == [[0, 1, 2, 3, 4]] * 2 + [[5, 6, 7, 8, 9]] * 2
    assert resumed(stream, memory, 2, 3) == [[10, 11, 12, 13, 14]]


def test_a_break_ends_the_workers():
    """No process is left of a stream that was not read to its end."""
    for batch in read(as_stream(loader_of(hub(), num_workers=2))):
        assert len(multiprocessing.active_children()) == 2
        assert ids(batch)
        break
    assert not multiprocessing.active_children()


def test_an_error_says_where():
    """Its type is kept; step and rank are noted, and the worker said."""
    stream = as_stream(loader_of(Failing(20, 9)))
    with pytest.raises(LookupError, match="item 9 is not there") as caught:
        list(read(stream))
    assert "batch of step 2 on rank 0 of 1" in caught.value.__notes__[0]
    with pytest.raises(LookupError, match="worker process 1") as caught:
        list(read(as_stream(loader_of(Failing(20, 9), num_workers=2))))
    assert "on rank 0 of 1" in caught.value.__notes__[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_is_an_error():
    """And no hang."""
    stream = as_stream(loader_of(Failing(20, 9, kill=True), num_workers=2))
    with pytest.raises(
        RuntimeError, match=r"killed by signal|exited unexpectedly"
    ) as caught:
        list(read(stream))
    assert "accelx: while getting the batch" in caught.value.__notes__[0]


def test_an_epoch_each_time_for_a_loop_of_your_own():
    """In a process alone every batch is even."""
    mine = ax.shard_loader(ax.Env())(loader_of(Plain(5)))
    assert isinstance(mine, StreamEpochs)
    assert mine.batch_size == 4
    assert [ids(b) for b in mine] == [[0, 1, 2, 3], [4]]
    assert [ids(b) for b in mine] == [[1000, 1001, 1002, 1003], [1004]]
    mine.epoch = 0
    assert ids(next(iter(mine))) == [0, 1, 2, 3]


def test_feed_takes_streams():
    """Through the transform that cuts them; a Stream is itself taken."""
    tx = ax.shard_loader(ax.Env())
    assert [ids(b) for b in ax.feed(tx, loader_of(Plain(5)))] == [[0, 1, 2, 3], [4]]
    made = as_stream(loader_of(Plain(5)))
    assert isinstance(made, Stream)
    assert [ids(b) for b in ax.feed(tx, made, 1, 2)] == [[4]]


def test_a_device_of_its_own_for_pinned_memory_is_refused():
    """Of a stream as of a map-style dataset; without it both are taken."""
    for dataset in (Plain(4), range(4)):
        source = DataLoader(dataset, 2)
        assert as_loader(source)
        source.pin_memory_device = "cuda:1"
        with pytest.raises(DataError, match="pin_memory_device='cuda:1'; drop"):
            as_loader(source)
