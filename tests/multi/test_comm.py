"""Collectives over trees give on any number of ranks what Python gives on lists."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils.data import IterableDataset, Subset, TensorDataset

from accelx import comm
from accelx.comm_split import share
from accelx.errors import CollectiveError, DataError
from accelx.loader import as_loader, batches
from accelx.records import Env, Mean
from accelx.rows import rows_of
from accelx.testing import run

pytestmark = pytest.mark.multi

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128, torch.float8_e4m3fn),
]


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Data:
    values: Any


@attrs.frozen
class Record:
    values: Any


def rows(rank, dtype=torch.float32):
    """Rank r's own r + 1 rows."""
    return (torch.arange((rank + 1) * 3).reshape(-1, 3) + rank).to(dtype)


def same(a, b):
    """Equal dtype, shape and bytes."""
    a, b = a.contiguous(), b.contiguous()
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def caught(fn, *args, **kwargs):
    """The text of the error that a call raises."""
    try:
        fn(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


@pytest.mark.parametrize("world", [1, 3])
def test_gather_concatenates_in_rank_order(world):
    """Every dtype, uneven rows, scalars and plain values, in every container."""

    def fn(env):
        tree = {
            "all": [rows(env.rank, dtype) for dtype in DTYPES],
            "pair": Pair(torch.tensor(env.rank), f"rank {env.rank}"),
            "data": Data((env.rank, None)),
            "record": Record(torch.zeros(env.rank, 2).t().contiguous().t()),
        }
        return comm.gather(env, tree)

    for got in run(world)(fn)():
        for dtype, part in zip(DTYPES, got["all"], strict=True):
            whole = torch.cat([rows(r, torch.float64) for r in range(world)])
            assert same(part, whole.to(dtype))
            other = whole.flip(0).to(dtype)
            assert same(part, other) is (world == 1)  # another order of ranks
        ranks = list(range(world))
        assert got["pair"].x.tolist() == ranks
        assert got["pair"].y == [f"rank {r}" for r in ranks]
        assert got["data"] == Data((ranks, [None] * world))
        assert got["record"].values.shape == (sum(ranks), 2)


def test_gather_needs_no_tensor_and_no_equal_key_order():
    """Trees of plain values, and dicts filled in another order, are no mismatch."""

    def fn(env):
        keys = ["a", "b"] if env.rank else ["b", "a"]
        tree = {key: torch.tensor(ord(key) + env.rank) for key in keys}
        out = comm.gather(env, tree)
        return out["a"].tolist(), out["b"].tolist(), comm.gather(env, "x")

    assert run(2)(fn)() == [([97, 98], [98, 99], ["x", "x"])] * 2


def leaf(rank, dtype):
    """Rank r's numbers, small enough for every dtype."""
    return (torch.tensor([[1, 0], [2, 3]]) * (rank + 1)).to(dtype)


JUDGES = {
    "sum": sum,
    "max": max,
    "min": min,
    "mean": lambda values: sum(values) / len(values),
}


@pytest.mark.parametrize("world", [1, 3])
def test_reduce_is_python_arithmetic_on_the_ranks_values(world):
    """Shape and dtype stay; integer sums are int64, integer means true means."""
    dtypes = [dtype for dtype in DTYPES if not dtype.is_complex]

    def fn(env, op):
        tree = {
            "t": {d: leaf(env.rank, d) for d in dtypes},
            "n": [env.rank, env.rank / 4],
        }
        before = copy.deepcopy(tree)
        out = comm.reduce(env, tree, op)
        untouched = all(same(tree["t"][d], before["t"][d]) for d in dtypes)
        return out["t"], out["n"], untouched

    for op, judge in JUDGES.items():
        for tensors, numbers, untouched in run(world)(fn)(op):
            assert untouched
            assert numbers == [
                judge(range(world)),
                judge([r / 4 for r in range(world)]),
            ]
            assert [type(n) for n in numbers] == [type(judge([0])), float]
            for dtype, got in tensors.items():
                values = [
                    leaf(r, dtype).double().flatten().tolist() for r in range(world)
                ]
                want = [judge(v) for v in zip(*values, strict=True)]
                whole = not dtype.is_floating_point
                kept = {"sum": torch.int64, "mean": torch.float32}.get(op, dtype)
                expected = torch.tensor(want).reshape(2, 2).to(kept if whole else dtype)
                assert same(got, expected)


def test_reduce_of_complex_bools_and_large_integers_is_exact():
    """What float32 would round is not rounded, and control: float32 would round it."""
    big = 2**53 + 1

    def fn(env):
        tree = {
            "z": torch.tensor([1 + 2j]) * (env.rank + 1),
            "any": torch.tensor([env.rank == 1, False]),
            "flag": env.rank == 0,
            "big": torch.tensor(big),
            "huge": 10**30 + env.rank,
        }
        z = {"z": tree.pop("z")}
        sums, most = comm.reduce(env, z, "sum"), comm.reduce(env, tree, "max")
        return sums["z"], most, comm.reduce(env, tree, "sum")

    for z, most, total in run(2)(fn)():
        assert same(z, torch.tensor([3 + 6j]))
        assert most["any"].tolist() == [True, False]
        assert most["any"].dtype == torch.bool
        assert (most["flag"], type(most["flag"])) == (True, bool)
        assert total["big"].item() == 2 * big != int(torch.tensor(float(big)) * 2)
        assert total["huge"] == 2 * 10**30 + 1


@pytest.mark.parametrize("op", JUDGES)
def test_a_mean_adds_whatever_the_op(op):
    """The mean over ranks is that of all samples; the mean of rank means is not."""

    def fn(env):
        values = torch.arange(env.rank + 1.0) + 5 * env.rank
        mean = Mean(values.sum(), len(values))
        out = comm.reduce(env, {"loss": mean, "own": mean.value}, op)
        return float(out["loss"].value), float(out["own"])

    every = torch.cat([torch.arange(r + 1.0) + 5 * r for r in range(3)])
    for value, other in run(3)(fn)():
        assert value == pytest.approx(every.mean().item())
        assert other != pytest.approx(every.mean().item())


@pytest.mark.parametrize("world", [1, 3])
def test_broadcast_gives_every_rank_the_source_tree(world):
    """Structure, tensors of every dtype and plain values; others may pass None."""
    src = world - 1

    def fn(env):
        tree = {
            "all": [rows(env.rank, dtype) for dtype in DTYPES],
            "pair": Pair(torch.tensor(env.rank), {"text": "a", "empty": torch.ones(0)}),
            "record": Record(torch.ones(2, 3).t()),
        }
        mine = tree if env.rank == src else None
        return comm.broadcast(env, mine, src=src)

    for got in run(world)(fn)():
        assert all(
            same(part, rows(src, dtype))
            for part, dtype in zip(got["all"], DTYPES, strict=True)
        )
        assert same(got["pair"].x, torch.tensor(src))
        assert got["pair"].y["text"] == "a"
        assert same(got["record"].values, torch.ones(3, 2))


def test_pad_fills_to_the_longest_and_gather_then_fits():
    """At the end or in front, along any dim, and what has no such dim stays."""

    def fn(env):
        tree = [torch.ones(2, env.rank + 1), torch.ones(2), torch.tensor(1), "text"]
        end = comm.pad(env, tree, dim=1, value=-1)
        front = comm.pad(env, tree, dim=1, value=-1, first=True)
        return end, front, comm.gather(env, end)[0].shape

    (end, front, shape), (longest, _, _) = run(2)(fn)()
    assert end[0].tolist() == [[1, -1]] * 2
    assert front[0].tolist() == [[-1, 1]] * 2
    assert same(longest[0], torch.ones(2, 2))
    assert (end[1].shape, end[2].shape, end[3]) == ((2,), (), "text")
    assert shape == (4, 2)


def test_objects_travel():
    """Each rank's object, whatever it is, as a list in rank order."""

    def fn(env):
        return comm.gather_objects(env, {"rank": env.rank, "items": "ab"[: env.rank]})

    want = [{"rank": 0, "items": ""}, {"rank": 1, "items": "a"}]
    assert run(2)(fn)() == [want, want]
    assert comm.gather_objects(Env(), "alone") == ["alone"]


def uneven(env):
    """What each rank is told of trees, calls and values that do not match."""
    r = env.rank
    return [
        caught(comm.gather, env, {"x": [torch.ones(2, 3 + r // 2)]}),
        caught(comm.gather, env, {"x": torch.ones(1), **({"y": 1} if r else {})}),
        caught(comm.gather, env, torch.ones(1, dtype=[torch.int64, None, None][r])),
        caught(comm.gather, env, torch.ones(1) if r else "text"),
        caught(comm.reduce, env, torch.ones(1 + r)),
        caught(comm.reduce, env, f"text {r}"),
        caught(comm.pad, env, torch.ones([1] * (r + 1))),
        caught(comm.gather if r else comm.reduce, env, 1),
        caught(comm.broadcast, env, 1, src=r),
        caught(comm.gather_objects, env, (lambda: 1) if r == 2 else 1),
        caught(comm.barrier, env) if r == 1 else caught(comm.gather, env, 1),
        caught(comm.reduce, env, torch.ones(1, dtype=torch.complex64), "max"),
    ]


def test_ranks_that_do_not_match_are_all_told_how():
    """Leaf, ranks and both sides are in the error, the same one on every rank."""
    told = run(3)(uneven)()
    assert told[0] == told[1] == told[2]
    words = [
        "tree['x'][0] is float32 (2, 3) on ranks 0, 1, float32 (2, 4) on rank 2; bring",
        "tree['y'] is nothing on rank 0, int 1 on ranks 1, 2",
        "int64 (1,) on rank 0, float32 (1,) on ranks 1, 2",
        "tree is str 'text' on rank 0, float32 (1,) on ranks 1, 2",
        "float32 (1,) on rank 0, float32 (2,) on rank 1, float32 (3,) on rank 2",
        "str 'text 0' on rank 0, str 'text 1' on rank 1",
        "float32 (1,) on rank 0, float32 (1, 1) on rank 1",
        'this was reduce(op="mean") on rank 0, gather on ranks 1, 2; look for a branch',
        "broadcast(src=0) on rank 0, broadcast(src=1) on rank 1",
        "gather_objects wants values that pickle, but on rank 2",
        "gather on ranks 0, 2, barrier on rank 1",
        "an order for 'max', got torch.complex64",
    ]
    for text, part in zip(told[0], words, strict=True):
        assert text.startswith("CollectiveError")
        assert part in text


def test_bad_arguments_say_what_to_write():
    """Unknown ops and sources are refused before anything is sent."""
    with pytest.raises(ValueError, match='"mean", "sum", "max", "min", got \'none\''):
        comm.reduce(Env(), 1, "none")
    with pytest.raises(ValueError, match="src in 0 to 0, got 1"):
        comm.broadcast(Env(), 1, src=1)
    with pytest.raises(CollectiveError, match=r"accelx.connect\(\) first"):
        comm.gather(Env(0, 2, 0, 2), 1)
    with pytest.raises(CollectiveError, match="one process alone has none"):
        comm.mesh(Env())


TOGETHER = {
    "gather": lambda env: comm.gather(env, 1),
    "reduce": lambda env: comm.reduce(env, 1),
    "broadcast": lambda env: comm.broadcast(env, 1),
    "pad": lambda env: comm.pad(env, 1),
    "gather_objects": lambda env: comm.gather_objects(env, 1),
    "barrier": comm.barrier,
    "main_first": lambda env: comm.main_first(env).__enter__(),
    "sum_scalars": lambda env: comm.sum_scalars(env, torch.ones(1)),
    "mesh": comm.mesh,
}


@pytest.mark.parametrize("world", [1, 2])
def test_a_collective_inside_on_main_raises_at_once(world):
    """Each names itself and the remedy, on one process too; outside it works after."""

    def fn(env):
        def body(env):
            return {name: caught(call, env) for name, call in TOGETHER.items()}

        told = comm.on_main(env, body)
        return told, comm.reduce(env, 1, "sum")

    (told, total), *others = run(world)(fn)()
    assert all(
        f"{name}" in text and "inside on_main" in text and "before or after" in text
        for name, text in told.items()
    )
    assert total == world
    assert others == [(None, 2)] * (world - 1)


def test_on_main_passes_arguments_and_returns_there():
    """The result is rank 0's alone, and the Env knows that it is alone."""

    def fn(env):
        return comm.on_main(env, lambda env, a, b: (env.alone, env.rank, a, b), 1, b=2)

    assert run(2)(fn)() == [(True, 0, 1, 2), None]


def test_main_goes_first(tmp_path):
    """Others find what rank 0 wrote; without main_first nothing says so."""

    def fn(env):
        with comm.main_first(env):
            found = (tmp_path / "cache").exists()
            (tmp_path / "cache").write_text("filled")
        comm.barrier(env)
        return found

    assert run(3)(fn)() == [False, True, True]


class OddError(Exception):
    """Pickle cannot make it again: it wants two arguments and keeps one."""

    def __init__(self, a, b):
        super().__init__(a)


def test_a_body_that_fails_on_main_fails_everywhere():
    """The others raise the same, or its text, and ranks still meet afterwards."""

    def fn(env, error):
        ran = []

        def body():
            with comm.main_first(env):
                ran.append(env.rank)
                raise error

        return caught(body), ran, comm.reduce(env, 1, "sum")

    assert run(2)(fn)(OSError("disk full")) == [
        ("OSError: disk full", [0], 2),
        ("OSError: disk full", [], 2),
    ]
    _, (told, ran, _) = run(2)(fn)(OddError("what it said", 1))
    assert "CollectiveError" in told
    assert "what it said" in told
    assert not ran


@given(st.integers(0, 40), st.integers(1, 7), st.booleans())
def test_every_item_is_some_rank_s_and_padding_is_even(count, world, pad):
    """Unpadded parts are the items, in order, and lengths differ by at most one."""
    parts = [share(count, world, rank) for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    read = as_loader(TensorDataset(torch.arange(count)), batch_size=max(1, count))
    for rank, part in enumerate(parts) if count else ():  # as `feed` cuts a batch
        (batch,) = batches(attrs.evolve(read, rank=rank, world=world))
        assert batch[0][: rows_of(batch).rows].tolist() == part
    padded = [share(count, world, rank, pad=True) for rank in range(world)]
    assert {len(part) for part in padded} == {-(-count // world)}
    for own, more in zip(parts, padded, strict=True):
        assert more[: len(own)] == own
        assert set(more[len(own) :]) <= {own[-1] if own else count - 1}


def parts(items, pad=False, world=3):
    """Each rank's part."""
    return [comm.split(Env(r, world, r, world), items, pad) for r in range(world)]


def test_split_keeps_the_type_and_leaves_the_items():
    """Lists, tuples, tensors, dicts of them and datasets."""
    items = {"a": [1, 2, 3, 4], "b": torch.arange(4)}
    before = copy.deepcopy(items)
    assert parts([1, 2, 3, 4]) == [[1], [2], [3, 4]]
    assert parts((1, 2, 3, 4), pad=True) == [(1, 1), (2, 2), (3, 4)]
    assert parts([1], pad=True) == [[1], [1], [1]]
    assert [part.tolist() for part in parts(torch.arange(4))] == [[0], [1], [2, 3]]
    cut = parts(items, pad=True)
    assert [(p["a"], p["b"].tolist()) for p in cut][1] == ([2, 2], [1, 1])
    assert items.keys() == before.keys()
    assert items["a"] == before["a"]
    subsets = parts(TensorDataset(torch.arange(4)))
    assert all(isinstance(part, Subset) for part in subsets)
    assert [[int(x) for (x,) in part] for part in subsets] == [[0], [1], [2, 3]]
    assert parts([1, 2], world=1) == [[1, 2]]


class Stream(IterableDataset):
    """A dataset without a length."""

    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("items", ["text", {1, 2}, 7, None, torch.tensor(1), Stream()])
def test_split_refuses_what_has_no_order(items):
    """The error names the type and what is taken."""
    name = type(items).__name__
    with pytest.raises(DataError, match=f"got {name}; pass a list, a tuple, a dict"):
        comm.split(Env(), items)


def test_split_refuses_a_dict_of_unequal_lengths():
    """Rows that do not belong together are not cut."""
    with pytest.raises(DataError, match=r"lengths \{'a': 2, 'b': 1\}"):
        comm.split(Env(), {"a": [1, 2], "b": [1]})


def test_sum_scalars_adds_in_place_and_can_be_waited_for():
    """As torch's own all_reduce; alone it is the identity."""

    def fn(env):
        now, later = torch.ones(2), torch.tensor(env.rank)
        work = comm.sum_scalars(env, later, async_op=True)
        comm.sum_scalars(env, now)
        work.wait()
        return now.tolist(), later.item()

    assert run(3)(fn)() == [([3.0, 3.0], 3)] * 3
    one = torch.ones(1)
    assert comm.sum_scalars(Env(), one) is None
    assert one.item() == 1
