"""Streams over real ranks: every row once, to an end that all ranks agree on."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import random

import datasets
import pytest
import torch
import torch._dynamo  # optimizers import it when first made
import torch.distributed.tensor  # ranks are forked: once here, not once in each
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import accelx as ax
from accelx.rows import rows_of
from accelx.testing import RankError, run
from tests.streaming import (
    Batches,
    Failing,
    FailingWhole,
    Parted,
    Plain,
    batch_of,
    ids,
)

pytestmark = [
    pytest.mark.multi,
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
]
WORLDS = [1, 2, 3]


def loader_of(dataset, size=5, **settings):
    """A torch DataLoader over it."""
    return DataLoader(dataset, batch_size=size, collate_fn=batch_of, **settings)


def fed(env, source, start=0, stop=None):
    """What this rank gets: (numbers, its mark) of each step."""
    tx = ax.shard_loader(env)
    return [(ids(b), rows_of(b)) for b in ax.feed(tx, source, start, stop)]


def each(env, makers, start=0, stop=None):
    """The same of several sources, in one launch."""
    return {name: fed(env, make(), start, stop) for name, make in makers.items()}


def joined(ranks):
    """The global batches of all ranks' steps; that marks add up is checked."""
    found = []
    for step in zip(*ranks, strict=True):  # all ranks have equally many steps
        totals = {mark.total for _, mark in step}
        assert totals == {sum(mark.rows for _, mark in step)}
        assert all(len(rows) == max(1, mark.rows) for rows, mark in step)
        found.append([i for rows, mark in step for i in rows[: mark.rows]])
    return found


def chunks(numbers, size):
    """A plain stream cut by batch size."""
    rest = iter(numbers)
    return list(iter(lambda: list(itertools.islice(rest, size)), []))


WHOLE = {
    "plain": lambda: loader_of(Plain(23)),
    "drop": lambda: loader_of(Plain(23), drop_last=True),
    "few": lambda: loader_of(Plain(2)),
    "none": lambda: loader_of(Plain(0)),
    "workers": lambda: loader_of(Plain(16), 4, num_workers=2),
    "batches": lambda: Batches([4, 1, 2, 6]),
    "items": lambda: DataLoader(Batched(), batch_size=None),
    "map": lambda: StatefulDataLoader(list(range(9)), 4, collate_fn=batch_of),
    "two shards": lambda: loader_of(table(11, 1)),
    "take": lambda: loader_of(table(23, 3).take(7)),
}


class Batched(Plain):
    """Rows in batches already, as an iterable dataset."""

    def __init__(self):
        super().__init__(3)

    def __iter__(self):
        return (batch_of([k, k + 10, k + 20]) for k in range(3))


def table(n, shards):
    """A streamed Arrow table."""
    made = datasets.Dataset.from_dict({"i": list(range(n))})
    return made.to_iterable_dataset(num_shards=shards)


def plainly(source):
    """The judge: the batches that one process gets without us."""
    return [ids(batch) for batch in source]


@pytest.mark.parametrize("world", WORLDS)
def test_what_cannot_be_divided_is_the_plain_stream(world):
    """Batch by batch, whatever the number of ranks; texts and ragged rows with it."""
    ranks = run(world)(each)(WHOLE)
    for name, make in WHOLE.items():
        assert joined([rank[name] for rank in ranks]) == plainly(make()), name


@pytest.mark.parametrize("world", WORLDS)
def test_steps_from_anywhere_through_the_epochs(world):
    """By reading again, as many epochs as it takes; each epoch is told to the data."""
    ranks = run(world)(each)({"plain": lambda: loader_of(Plain(7), 3)}, 2, 8)
    whole = [c for e in range(3) for c in chunks(range(1000 * e, 1000 * e + 7), 3)]
    assert joined([rank["plain"] for rank in ranks]) == whole[2:8]


PARTED = {
    "even": lambda: loader_of(table(24, 6)),
    "uneven": lambda: loader_of(table(23, 4)),
    "one is short": lambda: loader_of(Parted([9, 1, 9, 4])),
    "one is empty": lambda: loader_of(Parted([0, 8, 5])),
    "drop": lambda: loader_of(Parted([9, 1, 8]), drop_last=True),
    "less than a row each": lambda: loader_of(Parted([4, 4, 4]), 2),
    "nothing": lambda: loader_of(Parted([0, 0, 0])),
    "workers": lambda: loader_of(table(23, 6), num_workers=2),
    "parts and workers": lambda: loader_of(Parted([3, 2, 5, 1, 2, 4]), num_workers=2),
}


@pytest.mark.parametrize("world", [2, 3])
def test_a_divided_stream_gives_each_row_once(world):
    """Batches keep their size while there are rows anywhere; all ranks end together."""
    ranks = run(world)(each)(PARTED)
    for name, make in PARTED.items():
        found = joined([rank[name] for rank in ranks])
        loader = make()
        n, size = len(list(loader.dataset)), loader.batch_size
        kept = n // size * size if loader.drop_last else n
        assert [len(rows) for rows in found] == [
            len(c) for c in chunks(range(kept), size)
        ]
        rows = [i for batch in found for i in batch]
        assert len(set(rows)) == len(rows), name
        assert set(rows) <= set(range(n))


def random_parts(seed):
    """Twelve cases of (sizes of shards, batch size, drop_last, a step to start at)."""
    draw = random.Random(seed)
    return [
        (
            [draw.choice([0, 1, 2, 7, 13]) for _ in range(draw.randint(1, 7))],
            draw.randint(1, 9),
            draw.random() < 0.3,
            draw.randint(1, 4),
        )
        for _ in range(12)
    ]


def parts_fed(env, seed):
    """Each case from its first step, and from the one to start at."""
    found = []
    for sizes, size, drop, start in random_parts(seed):
        source = loader_of(Parted(sizes), size, drop_last=drop)
        found.append(fed(env, source))
        more = len(found[-1]) > start
        found.append(fed(env, source, start) if more else [])
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_parts_of_any_sizes(world):
    """Each row once, in full batches, and from any step the same tail."""
    ranks = run(world)(parts_fed)(world)
    steps = [joined(case) for case in zip(*ranks, strict=True)]
    cases = zip(random_parts(world), steps[::2], steps[1::2], strict=True)
    for (sizes, size, drop, start), whole, tail in cases:
        n = sum(sizes)
        wanted = chunks(range(n // size * size if drop else n), size)
        assert [len(rows) for rows in whole] == [len(rows) for rows in wanted]
        rows = [i for batch in whole for i in batch]
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(n))
        assert tail == whole[start:]


def differing(env):
    """Ranks that were given streams of other sizes."""
    for make in (lambda: loader_of(Plain(9), 3 + env.rank), lambda: table_of(env)):
        with pytest.raises(ax.DataError) as caught:
            list(ax.feed(ax.shard_loader(env), make()))
        yield str(caught.value)


def table_of(env):
    """Shards enough for two ranks on one of them alone."""
    return loader_of(table(8, 1 + env.rank))


def test_ranks_that_read_other_streams_are_refused():
    """On all of them, in place of waiting for one another."""
    for said in run(2)(lambda env: list(differing(env)))():
        assert "batch_size=3, " in said[0]
        assert "batch_size=4, " in said[0]
        assert "on rank 1; make the dataset" in said[0]
        assert "by 1 readers" in said[1]
        assert "by 2 readers" in said[1]


def test_each_rank_reads_its_own_shards():
    """And none reads what another does: 24 rows in 4 shards, of which each has two."""
    ranks = run(2)(each)({"x": lambda: loader_of(table(24, 4), 4)})
    shards = [{i // 6 for rows, _ in rank["x"] for i in rows} for rank in ranks]
    assert shards[0].isdisjoint(shards[1])
    assert all(len(one) == 2 for one in shards)


def test_files_of_parquet(tmp_path):
    """One file a shard, read where it is needed: workers and ranks share them out."""
    for k in range(4):
        rows = {"i": list(range(k * 5, k * 5 + 5))}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{k}.parquet")
    files = sorted(str(path) for path in tmp_path.glob("*.parquet"))
    cache = str(tmp_path / "cache")

    def made():
        return datasets.load_dataset(
            "parquet", data_files=files, streaming=True, split="train", cache_dir=cache
        )

    source = made()
    makers = {
        "here": lambda: loader_of(source, 4),
        "workers": lambda: loader_of(source, 4, num_workers=2),
    }
    ranks = run(2)(each)(makers)
    for name in makers:
        found = joined([rank[name] for rank in ranks])
        assert sorted(i for rows in found for i in rows) == list(range(20))
        assert [len(rows) for rows in found] == [4] * 5


def everything(env):
    """The control: what ranks do that all iterate the loader themselves."""
    return [i for batch in loader_of(table(23, 4)) for i in ids(batch)]


def test_control_ranks_that_each_read_the_stream_repeat_it():
    """23 rows come 46 times, and no rank knows."""
    found = [i for rank in run(2)(everything)() for i in rank]
    assert len(found) == 2 * len(set(found)) == 46


def rows_back(env):
    """Rows gathered from all ranks, as a metric would have them."""
    tx, found = ax.shard_loader(env), []
    for batch in ax.feed(tx, loader_of(Plain(11), 4)):
        texts = ax.gather_rows(env, batch["rest"][0], batch)
        assert len(texts) == rows_of(batch).total
        found += texts
    return found


def test_rows_are_gathered_each_once():
    """A placeholder is known as such."""
    for rank in run(3)(rows_back)():
        assert rank == [f"row {i}" for i in range(11)]


def weights(env):
    """A model trained on a stream whose last batch is short, through two epochs."""
    torch.manual_seed(0)
    tx = ax.chain(ax.shard_loader(env), ax.shard_model(env))
    model = torch.nn.Linear(1, 1).double()
    state = ax.init(tx, model, lambda m: torch.optim.SGD(m.parameters(), 0.1))
    step = ax.step(tx, squared)
    for batch in ax.feed(tx, loader_of(Plain(7), 3), stop=6):
        state, _ = step(state, batch)
    return [p.detach().clone() for p in state.model.parameters()]


def squared(model, batch):
    """A loss that a mean of means, or a row counted twice, would change."""
    x = (batch["i"] % 1000).unsqueeze(1).double() / 7
    return (model(x) - x.square()).square().mean()


def test_a_run_on_a_stream_is_that_of_one_process():
    """torch's own loop is the judge, one with another last batch the control."""
    torch.manual_seed(0)
    first = torch.nn.Linear(1, 1).double()
    found = []
    for sizes in ([3, 3, 1], [3, 3]):
        model = copy.deepcopy(first)
        optim = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            for k, size in enumerate(sizes):
                optim.zero_grad()
                squared(model, batch_of(range(3 * k, 3 * k + size))).backward()
                optim.step()
        found.append([p.detach() for p in model.parameters()])
    judge, control = found
    for world in (1, 2, 3):
        for rank in run(world)(weights)():
            torch.testing.assert_close(rank, judge)
            assert not torch.allclose(rank[0], control[0])


def beside(env):
    """Two streams at once, a third in between, and one left in the middle."""
    tx = ax.shard_loader(env)
    one = ax.feed(tx, loader_of(Plain(9), 3))
    two = ax.feed(tx, loader_of(table(12, 3), 4, num_workers=1))
    found = []
    for a, b in zip(one, two, strict=True):
        inside = sum(rows_of(x).rows for x in ax.feed(tx, loader_of(Plain(5))))
        found.append((rows_of(a).rows, rows_of(b).rows, inside))
    for _ in ax.feed(tx, loader_of(table(24, 4), num_workers=2)):
        break
    left = len(multiprocessing.active_children())
    return found, left


def test_streams_beside_one_another():
    """Each goes its own way, and a break leaves no process behind."""
    ranks = run(3)(beside)()
    counts = [found for found, _ in ranks]
    for step in zip(*counts, strict=True):
        assert [sum(column) for column in zip(*step, strict=True)] == [3, 4, 5]
    assert [left for _, left in ranks] == [0, 0, 0]


def failing(env, makers):
    """What each rank raises, and after how many steps."""
    said = {}
    for name, make in makers.items():
        steps = 0
        try:
            for _ in ax.feed(ax.shard_loader(env), make()):
                steps += 1
        except Exception as error:
            notes = getattr(error, "__notes__", [])
            said[name] = (steps, type(error).__name__, "\n".join([str(error), *notes]))
    return said


def test_an_error_of_one_rank_reaches_all():
    """The one that read raises its own, the others say who and where; none hangs."""
    makers = {
        "whole": lambda: loader_of(FailingWhole(20, 12)),
        "parted": lambda: loader_of(Failing(20, 13)),
        "worker": lambda: loader_of(FailingWhole(20, 13), num_workers=2),
        "collected": lambda: Batches([4, 0]),
    }
    first, second = run(2)(failing)(makers)
    assert first["whole"][:2] == (2, "LookupError")
    assert "item 12 is not there" in first["whole"][2]
    assert "batch of step 2 on rank 0 of 2" in first["whole"][2]
    assert second["whole"][:2] == (2, "DataError")
    assert "rank 0 of 2 failed while getting the batch of step 2" in second["whole"][2]
    assert "LookupError: item 12" in second["whole"][2]
    assert (first["parted"][1], second["parted"][1]) == ("DataError", "LookupError")
    assert "rank 1 of 2 failed" in first["parted"][2]
    assert "worker process 1" in first["worker"][2]
    assert "worker process 1" in second["worker"][2]
    assert first["collected"][:2] == second["collected"][:2] == (1, "DataError")


def killed(env):
    """A worker dies, which torch raises wherever its rank is just then."""
    fed(env, loader_of(Failing(24, 13, kill=True), num_workers=2))


def test_a_killed_worker_ends_the_run():
    """With what torch says of it; the other ranks do not wait for ever."""
    with pytest.raises(RankError, match=r"DataLoader worker \(pid"):
        run(2)(killed)()


def own_loop(env, makers):
    """A loop of the user's own over `shard_loader(env)(loader)`, and what it raises."""
    said = {}
    for name, (make, ragged) in makers.items():
        mine = ax.shard_loader(env, ragged=ragged)(make())
        found = []
        try:
            for _ in range(2):
                for batch in mine:
                    found.append(len(ids(batch)))
        except ax.DataError as error:
            found.append(str(error))
        said[name] = found
    return said


def test_a_loop_of_your_own_has_even_batches_or_none():
    """Refused on all ranks at once, as counted when they come."""
    makers = {
        "even": (lambda: loader_of(Plain(8), 4), False),
        "short": (lambda: loader_of(Plain(10), 8), False),
        "ragged": (lambda: loader_of(Plain(11), 8), True),
        "a rank without": (lambda: loader_of(Plain(9), 4), True),
        "parts": (lambda: loader_of(Parted([6, 2]), 4, drop_last=True), False),
    }
    first, second = run(2)(own_loop)(makers)
    assert first["even"] == second["even"] == [2, 2, 2, 2]
    assert first["short"] == second["short"] == [4, 1, 4, 1]
    assert first["ragged"] == [4, 1, 4, 1]
    assert second["ragged"] == [4, 2, 4, 2]
    assert first["a rank without"][:2] == second["a rank without"][:2] == [2, 2]
    assert "a batch of 1 rows as 0, 1 on 2 ranks" in first["a rank without"][2]
    assert first["a rank without"] == second["a rank without"]
    assert first["parts"][0] == 2
    assert "a batch of 4 rows as 4, 0 on 2 ranks" in first["parts"][1]


def alone(env):
    """Rank 1 stops asking: the others must not wait for ever."""
    for step, _ in enumerate(ax.feed(ax.shard_loader(env), loader_of(Plain(50)))):
        if env.rank == 1 and step == 1:
            raise KeyboardInterrupt


def test_a_rank_that_is_gone_is_an_error():
    """And no hang: its connection is closed."""
    with pytest.raises(RankError, match="rank 1 of 2 failed"):
        run(2)(alone)()
