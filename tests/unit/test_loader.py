"""Loaders: what is taken, what is refused, how batches are read, and who cleans up."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import namedtuple
from itertools import islice

import attrs
import numpy
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data.distributed import DistributedSampler

import accelx as ax
from accelx import fetch
from accelx.errors import DataError, NeutralityWarning
from accelx.loader import (
    Loader,
    as_loader,
    batches,
    local_indices,
    rows_at,
    rows_here,
)
from accelx.loader_epochs import Epochs
from accelx.prefetch import ahead, on_device
from accelx.rows import Rows, rows_of
from tests.streaming import Plain

Pair = namedtuple("Pair", ["x", "y"])


class Squares(Dataset):
    """Items as dicts; item 13 is unlucky if asked to be."""

    def __init__(self, n, bad=None):
        self.n, self.bad = n, bad

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index == self.bad:
            raise KeyError("no such picture")
        return {"x": float(index**2), "pid": os.getpid()}


class Bulk(Squares):
    """A dataset that reads many items at once, and counts how often."""

    calls = 0

    def __getitems__(self, indices):
        self.calls += 1
        return [self[i] for i in indices]


def columns(n=20):
    """Columns of several types and shapes."""
    return TensorDataset(
        torch.randn(n, 3, 2),
        torch.arange(n),
        torch.rand(n) > 0.5,
        torch.randn(2, n).T.to(torch.bfloat16),
        torch.randn(n, 2, dtype=torch.complex64),
    )


def same(ours, theirs):
    """Bitwise the same tensors in the same containers."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        return all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ours.dtype == theirs.dtype
    assert ours.stride() == theirs.stride()
    return torch.equal(ours, theirs)


@pytest.mark.parametrize("dataset", [columns(), Squares(20), Bulk(20), list(range(20))])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_torch(dataset, num_workers):
    """Without shuffling, every batch is bit for bit what torch's DataLoader gives."""
    source = DataLoader(dataset, batch_size=6, num_workers=num_workers)
    theirs = list(DataLoader(dataset, batch_size=6))
    ours = list(batches(as_loader(source)))
    if isinstance(dataset, Squares):
        for batch in ours + theirs:
            del batch["pid"]
    assert len(ours) == len(theirs) == 4
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not same(ours[0], theirs[1])  # the control


@pytest.mark.parametrize(
    "odd",
    [
        torch.randn(8, 2, requires_grad=True),
        torch.nn.Parameter(torch.randn(8, 2)),
        torch.arange(8).to(torch.uint16),
        torch.randn(8, 3, 2, 2).to(memory_format=torch.channels_last),
        torch.randn(8, 2).expand(3, 8, 2).transpose(0, 1),
    ],
)
def test_unusual_columns_are_read_as_torch_reads_them(odd):
    """Whatever lies in a TensorDataset, the batch is that of torch's DataLoader."""
    dataset = TensorDataset(odd)
    (ours,), (theirs,) = batches(Loader(dataset, 8)), DataLoader(dataset, 8)
    assert same(ours, theirs)
    assert ours[0].requires_grad == theirs[0].requires_grad


def test_a_batch_owns_its_memory():
    """Changing a batch in place changes neither the dataset nor another batch."""
    dataset = TensorDataset(torch.zeros(8))
    first, second = batches(Loader(dataset, 4))
    first[0].add_(1)
    assert not dataset.tensors[0].any()
    assert not second[0].any()


def test_the_global_random_state_is_left_alone():
    """The order draws from nothing that dropout or augmentation draws from."""
    before = torch.get_rng_state()
    for workers in (0, 2):
        list(batches(Loader(Squares(9), 2, shuffle=True, num_workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)
    list(DataLoader(Squares(9), 2, shuffle=True))  # the control
    assert not torch.equal(torch.get_rng_state(), before)


def test_many_items_are_read_by_one_call_where_the_dataset_can():
    """`__getitems__` is used once a batch, also through a Subset."""
    dataset = Bulk(20)
    list(batches(Loader(dataset, 5, shuffle=True)))
    list(batches(Loader(Subset(dataset, range(10)), 5)))
    assert dataset.calls == 6


@pytest.mark.parametrize("size", [1, 7, 4096])
@pytest.mark.parametrize("world", [1, 3])
def test_computing_many_steps_at_once_changes_none(size, world):
    """Indices streamed in blocks are those computed for one step alone."""
    dataset = TensorDataset(torch.arange(70_001))
    loader = Loader(dataset, size, shuffle=True, rank=world - 1, world=world)
    stop = len(loader) + 3
    streamed = [batch[0] for batch in batches(loader, 1, stop)]
    for step in {1, 2, 150, 1030, len(loader) - 1, len(loader), stop - 1}:
        if 1 <= step < stop:
            assert streamed[step - 1].tolist() == local_indices(loader, step)
    assert len(streamed) == stop - 1


def test_a_step_far_away_is_as_near_as_the_first():
    """Sample 10**9 of a shuffled dataset needs no samples before it."""
    loader = Loader(range(4 * 10**9), 32, shuffle=True)
    (batch,) = batches(loader, 31_250_000, 31_250_001)
    assert batch.tolist() == rows_at(loader, 31_250_000)
    assert len(set(batch.tolist())) == 32


def test_settings_of_a_dataloader_are_kept():
    """Size, order, tail, collate and worker settings come over; ranks are added."""
    source = DataLoader(
        Squares(9), 4, shuffle=True, drop_last=True, collate_fn=len, num_workers=2,
        timeout=30, worker_init_fn=print, multiprocessing_context="fork",
        prefetch_factor=3, persistent_workers=True,
    )  # fmt: skip
    loader = as_loader(source, seed=3, rank=1, world=2)
    expected = Loader(
        source.dataset, 4, shuffle=True, seed=3, drop_last=True, collate=len, rank=1,
        world=2, num_workers=2, timeout=30, worker_init_fn=print, prefetch_factor=3,
        multiprocessing_context=source.multiprocessing_context, persistent_workers=True,
    )  # fmt: skip
    assert loader == expected
    assert hash(loader) == hash(expected)
    assert as_loader(loader, rank=0) == attrs.evolve(loader, rank=0)
    assert loader != attrs.evolve(loader, dataset=Squares(9))


def test_a_loader_prints_as_the_call_that_makes_it():
    """The dataset is shown by its class and length, whatever it holds."""
    loader = Loader([1] * 1000, 4, shuffle=True)
    assert repr(loader) == "Loader(<list of 1000>, 4, shuffle=True)"


class Batches(BatchSampler):
    """A batch sampler of the user's own."""


D = Squares(9)
REFUSED = [
    (DataLoader(D, sampler=DistributedSampler(D, 2, 0)), "num_replicas=2"),
    (
        DataLoader(
            D, batch_sampler=BatchSampler(DistributedSampler(D, 2, 0), 2, False)
        ),
        "DistributedSampler with num_replicas=2",
    ),
    (DataLoader(D, sampler=WeightedRandomSampler([1.0, -1], 3)), r"got shape .*-1.0"),
    (DataLoader(D, sampler=WeightedRandomSampler([0.0, 0], 3)), "only zeros"),
    (
        DataLoader(D, sampler=WeightedRandomSampler([1, 0, 2], 3, False)),
        "num_samples=2",
    ),
    (DataLoader(D, in_order=False), "in_order=False.*drop"),
    (D, "Squares alone; write DataLoader"),
]


@pytest.mark.parametrize(("source", "words"), REFUSED)
def test_what_cannot_be_cut_exactly_is_refused(source, words):
    """The message names what came by its class, and what to write instead."""
    with pytest.raises(DataError, match=words):
        as_loader(source)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"batch_size": 2.0}, "got 2.0"),
        ({"batch_size": 4, "rank": 2, "world": 2}, "rank 2 of 2; count"),
        ({"batch_size": 4, "num_workers": -1}, "num_workers must be"),
        ({"batch_size": 4, "seed": "x"}, "seed must be an integer"),
    ],
)
def test_fields_out_of_range_are_refused(fields, words):
    """A loader that exists can be read."""
    with pytest.raises(DataError, match=words):
        as_loader(Squares(9), **fields)


def test_what_is_said_twice_or_has_no_length_is_refused():
    """Neither a second batch size nor a dataset without a length passes."""
    with pytest.raises(DataError, match=r"batch_size must be said once.*DataLoader"):
        as_loader(DataLoader(D), batch_size=4)
    with pytest.raises(DataError, match=r"have a length.*list_iterator"):
        as_loader(iter([1]), batch_size=4)


def test_spans_that_do_not_exist_are_refused():
    """Negative steps, and steps of a loader that has no batches."""
    with pytest.raises(DataError, match="start must be at least 0, got -1"):
        batches(Loader(D, 4), -1)
    with pytest.raises(DataError, match=r"steps 0 to 5 need batches.*9 items at batch"):
        batches(Loader(D, 10, drop_last=True), 0, 5)
    with pytest.raises(DataError, match="0 items"):
        rows_at(Loader([], 4), 0)


@pytest.mark.parametrize("source", [DataLoader([0, 1, 2], 2), DataLoader(Plain(3), 2)])
def test_steps_are_whole_numbers(source):
    """What is none is refused before anything is read; numbers of arrays are taken."""
    for wrong in (2.0, "1", True, None, -1, [0]):
        with pytest.raises(DataError, match=r"start must be .*count steps from 0"):
            ax.feed(ax.identity, source, start=wrong)
        if wrong is not None:
            with pytest.raises(
                DataError, match=r"stop must be .* leave it out for one"
            ):
                ax.feed(ax.identity, source, stop=wrong)
    steps = torch.tensor(1), numpy.int32(1), 1
    found = [list(ax.feed(ax.identity, source, one, 2)) for one in steps]
    assert [[b.tolist() for b in each] for each in found] == [[[2]]] * 3


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_start_beyond_the_stop_gives_no_batch(num_workers):
    """A run that is further than it was asked to go has nothing to do; as range has."""
    loader = DataLoader(torch.arange(8), 4, num_workers=num_workers)
    assert list(ax.feed(ax.identity, loader, start=5, stop=2)) == []
    assert list(ax.feed(ax.shard_loader(ax.Env()), loader, start=2, stop=2)) == []
    assert len(list(ax.feed(ax.identity, loader, start=1, stop=2))) == 1


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_empty_dataset_has_no_batches(shuffle):
    """Its length is 0 and iterating it gives nothing."""
    loader = Loader([], 4, shuffle=shuffle, world=2)
    assert len(as_loader(DataLoader([], 4))) == 0
    assert len(loader) == 0
    assert list(batches(loader)) == []
    assert list(Epochs(loader)) == []
    assert list(batches(Loader(D, 4), 5, 5)) == []


def test_fewer_samples_than_ranks():
    """The one sample is on the last rank; the others hold it as a row of weight 0."""
    loaders = [Loader(columns(1), 4, rank=r, world=3) for r in range(3)]
    marks = [rows_of(next(batches(loader))) for loader in loaders]
    assert marks == [Rows(0, 1), Rows(0, 1), Rows(1, 1)]
    assert marks == [rows_here(loader, 0) for loader in loaders]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_dataset_raises_names_item_step_and_rank(num_workers):
    """The error keeps its type, and says where it came from."""
    loader = Loader(Squares(20, bad=13), 6, rank=1, world=2, num_workers=num_workers)
    found = batches(loader)
    next(found), next(found)
    loader = attrs.evolve(loader, rank=0)
    with pytest.raises(KeyError) as caught:
        list(batches(loader))
    said = str(caught.value) + " ".join(caught.value.__notes__)
    assert "no such picture" in said
    assert "while reading item 13" in said
    assert "step 2 on rank 0 of 2" in said
    assert ("item 13 in worker 0 of 2" in said) == (num_workers == 2)
    found.close()


def test_what_reading_many_items_raises_names_them():
    """Where the dataset reads a batch by itself, the note has the batch."""
    with pytest.raises(KeyError) as caught:
        list(batches(Loader(Bulk(9, bad=4), 3)))
    assert "the items [3, 4, 5]" in caught.value.__notes__[0]


def pids(found):
    """The processes that read the items of some batches."""
    return {int(pid) for batch in found for pid in batch["pid"]}


def test_workers_live_through_epochs_and_end_with_the_iterator():
    """Ten epochs are read by the same two processes, none of them this one."""
    loader = Loader(Squares(8), 2, num_workers=2)
    readers = pids(batches(loader, 3, 40))
    assert len(readers) == 2
    assert os.getpid() not in readers
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("persistent", [False, True])
def test_leaving_early_ends_the_workers(persistent):
    """After a break no process is left over, nor after an error in the loop."""
    loader = Loader(Squares(80), 2, num_workers=2, persistent_workers=persistent)
    found = batches(loader, 0, 1000)
    next(found)
    assert len(multiprocessing.active_children()) == 2
    found.close()
    assert not multiprocessing.active_children()


class Stuck(Squares):
    """Whose items come late."""

    def __getitem__(self, index):
        time.sleep(0.5)


def test_a_worker_that_takes_too_long_is_an_error_and_ends():
    """After `timeout`, with torch's text, and step and rank in the notes."""
    loader = DataLoader(Stuck(8), 4, num_workers=1, timeout=0.2)
    with pytest.raises(RuntimeError, match=r"timed out after 0\.2 seconds") as caught:
        list(ax.feed(ax.shard_loader(ax.Env()), loader))
    assert "the batch of step 0 on rank 0" in caught.value.__notes__[-1]
    assert not multiprocessing.active_children()


def test_two_loaders_at_once_do_not_meet():
    """Evaluating in the middle of training disturbs neither."""
    train = Loader(Squares(8), 2, num_workers=1)
    seen, evaluated = [], []
    for batch, workers in zip(batches(train), (0, 1, 0, 1), strict=True):
        seen.append(batch["x"][0].item())
        other = Loader(Squares(6), 3, num_workers=workers)
        evaluated += [b["x"][0].item() for b in batches(other)]
    assert seen == [0, 4, 16, 36]
    assert evaluated == [0, 9] * 4
    assert not multiprocessing.active_children()


def remember(worker):
    """A worker_init_fn that changes the user's own dataset in its worker."""
    dataset = get_worker_info().dataset
    assert type(dataset) is Squares
    dataset.n = 1000 + worker
    dataset.bad = 5


def test_worker_init_fn_sees_the_users_own_dataset():
    """What it changes there is what the worker reads."""
    loader = Loader(Squares(8), 4, num_workers=1, worker_init_fn=remember)
    with pytest.raises(KeyError, match="no such picture"):
        list(batches(loader))
    assert loader.dataset.n == 8


def noise(items):
    """A collate_fn that draws from the worker's random state."""
    return torch.rand(len(items))


def test_workers_draw_differently_by_rank_and_epoch_and_the_same_again():
    """Worker seeds come from seed, rank and start."""
    loader = Loader(D, 9, collate=noise, num_workers=1)
    draws = [
        next(batches(attrs.evolve(loader, rank=r, world=2), step))
        for r, step in [(0, 0), (1, 0), (0, 1), (0, 0)]
    ]
    assert len({draw[0].item() for draw in draws}) == 3
    assert torch.equal(draws[0], draws[3])


def test_each_iter_of_epochs_is_the_next_epoch():
    """The loop of one's own sees what feeding through epochs sees, and can resume."""
    loader = Loader(TensorDataset(torch.arange(10)), 4, shuffle=True)
    epochs = Epochs(loader)
    assert len(epochs) == 3
    assert epochs.dataset is loader.dataset
    assert epochs.batch_size == 4
    ours = [batch[0].tolist() for _ in range(3) for batch in epochs]
    assert ours == [batch[0].tolist() for batch in batches(loader, 0, 9)]
    assert epochs.epoch == 3
    epochs.epoch = 1
    assert [batch[0].tolist() for batch in epochs] == ours[3:6]


def test_persistent_workers_stay_from_epoch_to_epoch():
    """Also after leaving early; a second iterator meanwhile has workers of its own."""
    loader = Loader(Squares(12), 2, num_workers=1, persistent_workers=True)
    epochs = Epochs(loader)
    first = pids(epochs)
    assert pids(islice(epochs, 2)) == first
    found = iter(epochs)
    next(found)
    assert not pids(epochs) & first
    assert len(list(found)) == 5
    assert pids(epochs) == first
    del epochs, found
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("n", "size", "world", "drop", "words"),
    [
        (32, 8, 3, False, "each batch has 8 rows for 3 ranks.*batch_size that divides"),
        (33, 8, 2, False, "the last batch has 1 rows for 2 ranks.*drop_last=True"),
        (5, 8, 2, False, "the last batch has 5 rows.*ragged=True.*accelx.step"),
        (32, 8, 4, False, None),
        (33, 8, 4, True, None),
        (36, 8, 4, False, None),
        (33, 8, 1, False, None),
    ],
)
def test_epochs_wants_equal_rows_or_says_what_to_do(n, size, world, drop, words):
    """A mean over this rank's rows is never skewed in silence."""
    loader = Loader(range(n), size, drop_last=drop, world=world)
    if words is None:
        assert len(list(Epochs(loader))) == len(loader)
        return
    with pytest.raises(DataError, match=words):
        Epochs(loader)


def test_ragged_epochs_want_a_row_on_each_rank():
    """A loop that sums and counts takes uneven rows, but no rows it cannot know."""
    assert len(Epochs(Loader(range(35), 8, world=3), ragged=True)) == 5
    with pytest.raises(DataError, match="the last batch has 2 rows for 3 ranks"):
        Epochs(Loader(range(34), 8, world=3), ragged=True)


def test_batches_move_in_containers_of_their_own_types():
    """Tensors move, what has a `.to` moves itself, the rest stays."""
    packed = pack_sequence([torch.zeros(2)])
    batch = Pair({"x": torch.zeros(2), "name": "a"}, [packed, (torch.ones(1), 3)])
    (moved,) = on_device(iter([batch]), "meta")
    assert type(moved) is Pair
    assert moved.x["x"].is_meta
    assert moved.x["name"] == "a"
    assert type(moved.y[0]) is PackedSequence
    assert moved.y[0].data.is_meta
    assert not moved.y[0].batch_sizes.is_meta
    assert moved.y[1][1] == 3
    assert not batch.x["x"].is_meta


def test_marks_are_written_after_moving():
    """A copy on another device is a new tensor; it is marked all the same."""
    (batch,) = batches(Loader(columns(4), 4, device="meta"))
    assert batch[0].is_meta
    assert rows_of(batch) == Rows(4, 4)


def test_the_next_batch_is_loaded_before_one_is_given():
    """One ahead and no more; what fetching raises waits for its turn."""

    def source():
        yield from range(3)
        raise OSError("disk")

    events = []

    def load(i):
        events.append(f"load {i}")
        return i

    found = ahead(source(), load, lambda i: events.append(f"ready {i}"))
    for i in range(3):
        assert next(found) == i
        events.append(f"given {i}")
    with pytest.raises(OSError, match="disk"):
        next(found)
    assert events == [
        *("load 0", "ready 0", "load 1", "given 0", "ready 1", "load 2", "given 1"),
        *("ready 2", "given 2"),
    ]


def test_columns_of_a_tensordataset_are_not_read_one_by_one():
    """The quick way is taken where it is the same, and only there."""
    collate = Loader(D, 1).collate
    assert fetch.fetcher(columns(), collate)[0] is torch.Tensor.unbind
    assert fetch.fetcher(columns(), list)[0] is torch.Tensor.tolist
    assert fetch.fetcher(Subset(columns(), [1]), collate)[0] is torch.Tensor.tolist


def test_static_shapes_want_known_sizes_and_a_loop_that_weighs():
    """Refused for batches of unknown sizes, and for a loop that would count padding."""
    env = ax.Env()
    for source in (
        DataLoader(D, batch_sampler=[[1], [2, 3]]),
        DataLoader([[1, 2]], batch_size=None),
    ):
        with pytest.raises(DataError, match="batches of one known size"):
            next(ax.feed(ax.shard_loader(env, static_shapes=True), source))
    source = DataLoader(columns(5), 2)
    with pytest.raises(DataError, match="ragged=True as well"):
        ax.shard_loader(env, static_shapes=True)(source)
    weighing = ax.shard_loader(env, static_shapes=True, ragged=True)(source)
    assert [ax.row_weights(batch).tolist() for batch in weighing] == [
        *([1, 1], [1, 1], [1, 0]),
    ]


def test_the_time_waited_for_data_is_counted(monkeypatch):
    """What the dataset takes is there for the step, once; the loop's own is not."""
    clock = [0.0]
    monkeypatch.setattr("accelx.loader.perf_counter", lambda: clock[0])

    class Slow(Squares):
        def __getitem__(self, index):
            clock[0] += 1
            return torch.tensor(float(index))

    found = []
    for batch in batches(Loader(Slow(4), 2)):
        clock[0] += 10
        waited = rows_of(batch).waited
        found += [waited.take(), waited.take()]
    assert found == [2, 0, 2, 0]


def some(items):
    """A collate_fn that leaves out an item."""
    return torch.stack([torch.as_tensor(i) for i in items if i != 5])


def test_a_collate_that_leaves_items_out_is_pointed_out():
    """Once a feed: the mark says more rows than there are. Joined batches alike."""
    loader = as_loader(DataLoader(range(12), 4, collate_fn=some))
    with pytest.warns(NeutralityWarning, match=r"4 items .* step 1, .* has 3") as told:
        assert [len(batch) for batch in batches(loader)] == [4, 3, 4]
    assert len(told) == 1
    quiet = {"prior": torch.ones(3), "x": torch.ones(2)}
    loader = as_loader(DataLoader(range(4), 2, collate_fn=lambda items: quiet))
    assert len(list(batches(loader))) == 2  # the control: warnings are errors here
