"""A process keeps the blocks that it is in the middle of, and no lock of another."""

from __future__ import annotations

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st

from accelx.data import files_cache
from accelx.data.blocks import locate
from accelx.data.files import from_files
from accelx.data.files_cache import Cache
from accelx.data.formats import runs
from tests.unit.data import written
from tests.unit.data.written import rows_of


@attrs.frozen(eq=False)
class Numbered:
    """A block that knows its number."""

    number: int
    nbytes: int
    rows: int = 1

    def take(self, rows):
        return [{"number": self.number} for _ in rows]


CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("part"), st.integers(0, 12)),
        st.tuples(st.just("took"), st.integers(1, 6)),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(CALLS, st.integers(1, 60))
def test_what_is_kept_is_what_a_list_would_keep(calls, most):
    """Against a plain list of (block, when it was used): the oldest go first."""
    model, clock, largest, reads = [], 0, 0, 0
    cache = Cache()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "IDLE_ROWS": 9,
            "IDLE": 2,
            "BLOCKS": 4,
            "BYTES": most,
        }.items():
            patch.setattr(files_cache, name, value)
        for call, value in calls:
            missed = call == "part" and value not in [n for n, _ in model]
            if call == "part":
                found = cache.part(
                    value, lambda value=value: Numbered(value, value * 5)
                )
                assert found.number == value
                model = [(n, t) for n, t in model if n != value] + [(value, clock)]
                reads += missed
            else:
                cache.took(value)
                clock, largest = clock + value, max(largest, value)
            if call == "took" or missed:
                while len(model) > 1 and (
                    len(model) > 4
                    or sum(n * 5 for n, _ in model) > most
                    or clock - model[0][1] > max(9, 2 * largest)
                ):
                    model.pop(0)
            assert list(cache._parts) == [n for n, _ in model]
            assert cache._nbytes == sum(n * 5 for n, _ in model)
            assert cache.reads == reads
            assert cache.missing(list(range(13))) == sorted(
                set(range(13)) - {n for n, _ in model}
            )


def test_a_load_that_fails_leaves_nothing():
    """The next call loads again."""
    cache = Cache()

    def fail():
        raise OSError("no")

    for _ in range(2):
        with pytest.raises(OSError, match="no"):
            cache.part(1, fail)
    assert cache.missing([1]) == [1]
    assert cache.part(1, lambda: Numbered(1, 1)).number == 1


def test_a_copy_by_pickle_is_empty():
    """A worker that is spawned starts from nothing."""
    cache = Cache()
    cache.part(1, lambda: Numbered(1, 1))
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.reads, copy.missing([1])) == (0, [1])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A dataset of some hundred blocks."""
    monkeypatch.setattr(runs, "RUN", 300)
    (tmp_path / "a.jsonl").write_bytes(written.jsonl(rows_of(0, 1000)))
    return from_files(tmp_path / "a.jsonl")


def in_child(work):
    """Fork, do `work` in the child, and return its exit status; 0 is success."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_fork_does_not_wait_for_a_lock_of_its_parent(files):
    """A thread of the parent holds the lock while it forks, and never lets go there.

    The control: the parent's own lock is held indeed, so that it would wait.
    """
    assert files[0]["i"] == 0
    holding, go = threading.Event(), threading.Event()

    def hold():
        with files._cache._lock:
            holding.set()
            go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    try:
        assert not files._cache._lock.acquire(timeout=0.05)
        assert in_child(lambda: files[5]["i"] == 5 and files._cache.reads == 1) == 0
    finally:
        go.set()
        thread.join()
    assert files[7]["i"] == 7


def test_a_fork_counts_for_itself(files):
    """What a child reads is neither counted nor kept in its parent."""
    before = [files[i]["i"] for i in range(0, 1000, 100)]
    reads = files._cache.reads
    assert len(before) == reads == 10

    def work():
        found = [row["i"] for row in files.__getitems__(list(range(1000)))]
        return found == list(range(1000)) and files._cache.reads > 100

    assert in_child(work) == 0
    assert files._cache.reads == reads


def test_threads_share_a_dataset(files):
    """Eight at once get the rows that one gets."""

    def work(start):
        order = [(start + 7 * i) % 1000 for i in range(1000)]
        return [row["i"] for row in map(files.__getitem__, order)] == order

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    cache = files._cache
    assert cache._nbytes == sum(part.nbytes for part, _ in cache._parts.values())


def test_few_blocks_are_met_in_one_round_of_turns(tmp_path, monkeypatch):
    """About one for each lane and turn in twelve batches; a permutation meets all."""
    monkeypatch.setattr(runs, "RUN", 300)
    (tmp_path / "b.jsonl").write_bytes(written.jsonl(rows_of(0, 9600)))
    files = from_files(tmp_path / "b.jsonl")
    assert len(files._blocks.rows) > 1000
    order = files.order_at(
        torch.arange(9600), shuffle=True, seed=0, epoch=0, batch_size=32
    )
    met = [
        len(set(locate(files._blocks, some[: 12 * 32])[0].tolist()))
        for some in (order, torch.randperm(9600))
    ]
    assert met[0] <= 96 * 2  # each goes through 4 rows, of blocks of about 5
    assert met[1] > 96 * 3
