"""What a save asks of its ranks, and which checkpoints are gone after it."""

import warnings
from pathlib import Path

import pytest
import torch

import accelx as ax
from accelx import storage, testing
from accelx.saves import saver
from accelx.saves.commit import found
from tests import saving
from tests.laws.training import made, quiet_views

pytestmark = [pytest.mark.multi, quiet_views]
ENV = ax.Env()


def slot(value):
    """A change that gives a state one slot more."""
    return lambda state, rank: ax.with_slot(state, "mine", value(rank))


def drift(state, rank):
    """A buffer that is another one on each rank."""
    state.model.layers[0].share.fill_(rank)
    return state


def alone(state, rank):
    """A slot on the last rank only."""
    return ax.with_slot(state, "mine", 1) if rank else state


DIFFERENCES = {
    "a number": (slot(lambda rank: {"a": rank}), "differ in slots.mine"),
    "a tensor": (slot(lambda rank: torch.tensor([1, rank])), "differ in slots.mine"),
    "a shape": (slot(lambda rank: torch.ones(1 + rank)), "differ in slots.mine"),
    "a buffer": (drift, "differ in model.layers.0.share"),
    "a slot too many": (alone, "differ in slots.mine"),
    "what cannot be saved": (
        slot(lambda rank: (lambda: 0) if rank else 0),
        "rank 1: .*slots.mine is a function",
    ),
}


def told(env, folder, kind):
    """What each rank hears of a save of states that differ, for each difference."""
    said = {}
    for name, (change, words) in DIFFERENCES.items():
        state = ax.init(saving.chain(env, kind), made(), saving.grouped)
        with pytest.raises(ax.CheckpointError, match=words) as error:
            ax.save_state(env, folder)(change(state, env.rank))
        said[name] = str(error.value)
    same = ax.init(saving.chain(env, kind), made(), saving.grouped)
    mine = slot(lambda rank: {"a": torch.ones(2)})(same, env.rank)
    return said, ax.save_state(env, folder)(mine)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_that_differ_are_told_where(kind, tmp_path):
    """Every rank raises the same, and no folder is made but that of the good save."""
    (one, url), (two, other) = testing.run(2)(told)(str(tmp_path), kind)
    assert (one, url) == (two, other)
    assert [f.name for f in tmp_path.iterdir()] == [url.rpartition("/")[2]]


def alone_without_a_place(env, folder):
    """A save of several ranks whose model nobody placed."""
    state = ax.init(ax.identity, made(), saving.grouped)
    with pytest.raises(ax.CheckpointError, match=r"on all 2 ranks.*shard_model"):
        ax.save_state(env, folder)(state)


def test_ranks_of_their_own_models_are_refused(tmp_path):
    """Each would be saved in part."""
    testing.run(2)(alone_without_a_place)(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def steps(folder):
    """The steps of the whole checkpoints in a folder."""
    return [one.step for one in found(str(folder)) if one.commit]


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (1, [8]),
        (3, [6, 7, 8]),
        (ax.retain(1, every=3), [3, 6, 8]),
        (ax.retain(2, best=("loss", "max")), None),
    ],
)
def test_what_is_not_kept_is_gone_from_the_disk(keep, left, wait, tmp_path):
    """The newest, each third, the best: and no other folder is there any more."""
    save = ax.save_state(ENV, str(tmp_path), every=1, keep=keep, wait=wait)
    stranger = tmp_path / "step-notes"
    stranger.mkdir()
    state, losses = saving.train(saving.chain(ENV, "ddp", save), 8)
    state.slots["save_state"].background.join()
    best = 1 + losses.index(max(losses))
    assert steps(tmp_path) == (sorted({best, 7, 8}) if left is None else left)
    assert len(list(tmp_path.iterdir())) == len(steps(tmp_path)) + 1
    assert stranger.is_dir()


def test_what_a_save_that_was_cut_off_left_is_removed(tmp_path):
    """A folder without a commit goes once a newer checkpoint is there; not before."""
    old, new = (tmp_path / f"step-{n:010d}-0123abcd" for n in (1, 10))
    for folder in (old, new):
        folder.mkdir()
        (folder / "rank-00000.safetensors").write_bytes(b"half")
    save = ax.save_state(ENV, str(tmp_path), every=2, keep=1)
    saving.train(saving.chain(ENV, "ddp", save), 2)
    assert (old.exists(), new.exists(), steps(tmp_path)) == (False, True, [2])


def test_nothing_goes_before_the_new_one_was_read_back(tmp_path, monkeypatch):
    """A newer checkpoint that lacks a file is no reason to remove the older one."""
    write = storage.write

    def losing(store, name, parts, size):
        write(store, name, parts, size)
        if name == "commit.json" and "step-0000000002" in store.url:
            Path(store.root, "rank-00000.safetensors").unlink()

    monkeypatch.setattr(storage, "write", losing)
    save = ax.save_state(ENV, str(tmp_path), every=1, keep=1)
    with pytest.warns(ax.CheckpointWarning, match="was not read back"):
        saving.train(saving.chain(ENV, "ddp", save), 2)
    assert steps(tmp_path) == [1, 2]


def test_a_removal_that_fails_is_a_warning(tmp_path, monkeypatch):
    """The run goes on, and the next save removes what is left."""

    def locked(store, first=()):
        raise PermissionError(13, "not yours")

    monkeypatch.setattr(saver.storage, "remove_folder", locked)
    save = ax.save_state(ENV, str(tmp_path), every=1, keep=1)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        state, _ = saving.train(saving.chain(ENV, "ddp", save), 2)
    assert (state.step, steps(tmp_path)) == (2, [1, 2])
    assert ["could not be removed" in str(w.message) for w in heard] == [True]
    monkeypatch.undo()
    load = ax.load_state(ENV, str(tmp_path))
    state, _ = saving.train(saving.chain(ENV, "ddp", load, save), 3)
    assert steps(tmp_path) == [3]


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "1"])
def test_a_number_that_keeps_nothing_is_refused(wrong, tmp_path):
    """At the call, with what to write."""
    with pytest.raises(ValueError, match=r"keep.*at least 1"):
        ax.save_state(ENV, str(tmp_path), every=1, keep=wrong)
    with pytest.raises(ValueError, match=r"keep.*at least 1.*\[1\]"):
        ax.save_state(ENV, str(tmp_path), every=1, keep=[1])
    with pytest.raises(ValueError, match=r"every.*at least 1"):
        ax.save_state(ENV, str(tmp_path), every=wrong)
