"""What a stream's own code says of who reads it is told, where rows would go wrong."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

import accelx as ax
from accelx.data.stream import as_stream, read
from accelx.data.stream_asks import warn_of_parts
from accelx.errors import NeutralityWarning
from tests.streaming import Counting, Parted, Plain


class ByRank(IterableDataset):
    """Gives each rank a part, as programs over torch's own loader must."""

    def __iter__(self):
        rank = torch.distributed.get_rank()
        return (i for i in range(8) if i % torch.distributed.get_world_size() == rank)


class ByNode(IterableDataset):
    """The same by a function that it holds in a list."""

    def __init__(self):
        def split_by_node(urls):
            return urls

        self.pipeline = [split_by_node]

    def __iter__(self):
        return iter(range(8))


class Around(IterableDataset):
    """Reads another dataset."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return iter(self.dataset)


class Undivided(IterableDataset):
    """Reads everything in each worker."""

    def __iter__(self):
        return iter(range(6))


def mine():
    """Which of how many workers this is."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


class Helped(IterableDataset):
    """Asks which worker it is by a function beside it."""

    def __iter__(self):
        first, step = mine()
        return iter(range(first, 6, step))


class Decorated(Undivided):
    """The same in a property whose function is decorated."""

    @property
    @functools.wraps(mine)
    def mine(self):
        return (0, 1)


def said(source, world=1, workers=0, **settings):
    """The warnings of one stream."""
    env = ax.Env(world=world, local_world=world)
    place = {"world": world, "env": env} if world > 1 else {}
    more = {"num_workers": workers, **settings, **place}
    stream = as_stream(source, batch_size=4, **more)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_parts(stream, 1)
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("make", [ByRank, ByNode, lambda: Around(ByRank())])
def test_a_stream_that_divides_itself_by_rank_is_told(make):
    """Read by rank 0 it would lose the others' rows; alone there are none."""
    (text,) = said(make(), world=2)
    assert "rank 0 alone, for all 2 ranks" in text
    assert "split_by_" in text
    assert not said(make())


def test_rows_that_come_from_each_worker_are_told():
    """They do come twice, as torch has it, and the warning says so."""
    stream = as_stream(Undivided(), batch_size=4, num_workers=2)
    with pytest.warns(NeutralityWarning, match="2 workers read Undivided"):
        rows = [i for batch in read(stream) for i in batch.tolist()]
    assert sorted(rows) == sorted([*range(6), *range(6)])
    assert said(Around(Undivided()), workers=3)


def test_control_others_are_left_in_peace():
    """What divides itself by worker, in whatever way; one worker; parts by rank."""
    for make in (lambda: Plain(6), Helped, lambda: Around(Helped()), ByRank):
        assert not said(make(), workers=1)
    for make in (lambda: Plain(6), Helped, lambda: Around(Helped()), Decorated):
        assert not said(make(), world=2, workers=2)
    assert not said(Undivided(), workers=2, worker_init_fn=print)
    assert not said(Parted([2, 3]), workers=2)
    assert not said(Counting(5), world=2)
