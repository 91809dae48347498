"""Runs on streams, saved and gone on with: the batches are those of one long run."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
import torch._dynamo  # optimizers import it when first made
import torch.distributed.tensor  # ranks are forked: once here, not once in each
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import accelx as ax
from accelx.rows import rows_of
from accelx.testing import run
from tests.streaming import Batches, Counting, Parted, Plain, batch_of, ids

pytestmark = [
    pytest.mark.multi,
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
]


def loader_of(dataset, size=4, **settings):
    """A torch DataLoader over it."""
    return DataLoader(dataset, batch_size=size, collate_fn=batch_of, **settings)


def table(n, shards):
    """A streamed Arrow table."""
    made = datasets.Dataset.from_dict({"i": list(range(n))})
    return made.to_iterable_dataset(num_shards=shards)


DIVIDED = {
    "arrow": lambda: loader_of(table(23, 4)),
    "arrow, workers": lambda: loader_of(table(26, 6), num_workers=2),
    "parts": lambda: loader_of(Parted([9, 1, 7])),
}
WHOLE = {
    "counting": lambda: loader_of(Counting(13)),
    "plain": lambda: loader_of(Plain(13)),
    "shuffled loader": lambda: StatefulDataLoader(
        list(range(18)), 4, shuffle=True, collate_fn=batch_of
    ),
    "batches": lambda: Batches([4, 3, 5, 2, 1]),
    "one shard": lambda: loader_of(table(17, 1)),
}
MAKERS = DIVIDED | WHOLE
STOP = 9
# Some in the middle of an epoch, some where it ends, one where one rank has no rows.
CUTS = dict(
    zip(MAKERS, [6, 3, 4, 4, 2, 3, 5, 2], strict=True),
)


def loss(model, batch):
    """Any mean over rows."""
    return model(batch["i"].unsqueeze(1) / 100.0).mean()


def begun(env, *more):
    """A small model's state, and the chain that trains it."""
    tx = ax.chain(ax.shard_loader(env, seed=3), ax.shard_model(env), *more)
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    return tx, ax.init(tx, model, lambda m: torch.optim.SGD(m.parameters(), 0.1))


def trained(tx, state, source, stop):
    """(the state after step `stop`, this rank's real rows of each step until then)."""
    step, found = ax.step(tx, loss), []
    for batch in ax.feed(tx, source, start=state, stop=stop):
        found.append(ids(batch)[: rows_of(batch).rows])
        state, _ = step(state, batch)
    return state, found


def whole_and_saved(env, makers, folder, cuts):
    """Each source read in one go; and read to its step of `cuts`, then saved."""
    found = {}
    for name, make in makers.items():
        whole = trained(*begun(env), make(), STOP)[1]
        state, first = trained(*begun(env), make(), cuts[name])
        ax.save_state(env, f"{folder}/{name}")(state)
        assert first == whole[: cuts[name]]
        found[name] = whole
    return found


def gone_on(env, makers, folder):
    """Each source read on, by what was saved; what is raised in place of rows."""
    found = {}
    for name, make in makers.items():
        tx, state = begun(env, ax.load_state(env, f"{folder}/{name}"))
        try:
            found[name] = trained(tx, state, make(), STOP)[1]
        except ax.DataError as error:
            found[name] = str(error)
    return found


def joined(ranks):
    """The global batches of all ranks' steps."""
    return [[i for rows in step for i in rows] for step in zip(*ranks, strict=True)]


def check_same(whole, later, cuts):
    """To the end, through all epochs, on each rank; and not those from the start."""
    for before, after in zip(whole, later, strict=True):
        for name, cut in cuts.items():
            assert after[name] == before[name][cut:], name
        first = {name: before[name][: STOP - cut] for name, cut in cuts.items()}
        again = [name for name in cuts if after[name] == first[name]]
        assert {*again} <= {"arrow", "batches"}  # cut where an epoch ends


def test_one_rank_goes_on_in_the_middle_and_at_the_end_of_an_epoch(tmp_path):
    """With the batches of one long run, from a state or by reading again."""
    for cut in (2, 4):
        cuts, folder = dict.fromkeys(MAKERS, cut), tmp_path / str(cut)
        whole = run(1)(whole_and_saved)(MAKERS, folder, cuts)
        check_same(whole, run(1)(gone_on)(MAKERS, folder), cuts)


def test_two_ranks_go_on_on_as_many_and_on_others(tmp_path):
    """On two with the same rows on each; what one reads on any number of ranks.

    A divided stream is refused there, with the guarantee and what to do.
    """
    whole = run(2)(whole_and_saved)(MAKERS, tmp_path, CUTS)
    check_same(whole, run(2)(gone_on)(MAKERS, tmp_path), CUTS)
    for now in (1, 3):
        again = run(now)(gone_on)(MAKERS, tmp_path)
        for name in WHOLE:
            wanted = joined([rank[name] for rank in whole])[CUTS[name] :]
            assert joined([rank[name] for rank in again]) == wanted, name
        for rank in again:
            assert "(guarantee: same-ranks)" in rank["arrow"]
            assert "(guarantee: replay)" in rank["parts"]
            for name in DIVIDED:
                assert f"got {now}; go on with 2 ranks" in rank[name]


def manifests(folder):
    """What checkpoints under `folder` hold beside tensors, as text."""
    texts = [p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()]
    return b"".join(texts)


def in_a_chain(env, folder):
    """Saved by the chain while it runs, beside the writing; and one run of a map."""
    tx, state = begun(env, ax.save_state(env, f"{folder}/s", every=3, wait=False))
    state, found = trained(tx, state, loader_of(table(23, 4)), 7)
    state.slots["save_state"].background.join()
    tx, state = begun(env, ax.load_state(env, f"{folder}/s"))
    step, rest = trained(tx, state, loader_of(table(23, 4)), 7)[0].step, None
    tx, state = begun(env, ax.load_state(env, f"{folder}/s"))
    assert (state.step, step) == (6, 7)
    rest = trained(tx, state, loader_of(table(23, 4)), 7)[1]
    assert rest == found[6:]
    data = DataLoader(TensorDataset(torch.arange(8)), batch_size=4)
    tx, state = begun(env)
    loss = lambda model, batch: model(batch[0].unsqueeze(1) / 8).mean()  # noqa: E731
    for batch in ax.feed(tx, data, start=state):
        state, _ = ax.step(tx, loss)(state, batch)
    ax.save_state(env, f"{folder}/m")(state)
    fork = ax.fork(state)
    assert fork.slots["shard_loader"].empty
    return True


def test_only_runs_on_streams_save_where_they_stand(tmp_path):
    """A run on indexed data is saved as it was before there were streams."""
    assert run(2)(in_a_chain)(tmp_path) == [True, True]
    assert b"slots.shard_loader" in manifests(tmp_path / "s")
    assert b"slots.shard_loader" not in manifests(tmp_path / "m")


def each_epoch(env, makers):
    """A call of feed for each epoch, as many loops have it."""
    found = {}
    for name, make in makers.items():
        source, (tx, state) = make(), begun(env)
        step, rows = ax.step(tx, loss), []
        for _ in range(3):
            for batch in ax.feed(tx, source, start=state):
                rows.append(ids(batch)[: rows_of(batch).rows])
                state, _ = step(state, batch)
        found[name] = rows, trained(*begun(env), make(), len(rows))[1]
    return found


def test_a_feed_for_each_epoch_is_one_feed_through_all():
    """Without reading again what the epochs before held."""
    for rank in run(2)(each_epoch)(MAKERS):
        for name in MAKERS:
            once, through = rank[name]
            assert once == through, name
