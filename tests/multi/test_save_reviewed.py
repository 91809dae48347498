"""What would lose a run without a word: each is an error, a warning, or a save."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

import accelx as ax
from accelx import storage, testing
from accelx.errors import CheckpointWarning
from accelx.saves.background import FAILED
from tests import saving
from tests.laws import odd
from tests.laws.training import local, made, quiet_views
from tests.multi.test_connect import free_port

pytestmark = [pytest.mark.multi, quiet_views]


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def loss(model, x):
    return model(x).square().mean()


def ran(steps, *passes, model=None):
    """The state after `steps` of a small model under `passes`."""
    tx = ax.chain(*passes)
    state = ax.init(tx, model or nn.Linear(2, 1), sgd)
    step = ax.step(tx, loss)
    for _ in range(steps):
        state, _ = step(state, torch.ones(3, 2))
    return state


class Copies(nn.Linear):
    """Its state_dict gives copies, into which nothing can be loaded."""

    def state_dict(self, *args, **kwargs):
        given = super().state_dict(*args, **kwargs)
        return {name: value.clone() for name, value in given.items()}


class Drops(nn.Linear):
    """Its state_dict has no bias."""

    def state_dict(self, *args, **kwargs):
        given = super().state_dict(*args, **kwargs)
        return {name: value for name, value in given.items() if name != "bias"}


@pytest.mark.parametrize(
    ("model", "said"),
    [(Copies, "weight is a copy, bias is a copy"), (Drops, "bias is left out")],
)
def test_a_state_dict_that_could_not_be_loaded_is_refused(model, said, tmp_path):
    """At init, with names; frozen weights may be left out."""
    env = ax.Env()
    for one in (ax.save_state(env, tmp_path, 1), ax.on_preempt(env, tmp_path)):
        with pytest.raises(ax.CheckpointError, match=said):
            ran(0, one, model=model(2, 1))
    ran(1, ax.save_state(env, tmp_path, 1))
    with pytest.raises(ax.CheckpointError, match=said):
        ax.init(ax.load_state(env, tmp_path, only="model.**"), model(2, 1))
    frozen = Drops(2, 1)
    frozen.bias.requires_grad_(False)
    ran(1, ax.save_state(env, tmp_path / "frozen", 1), model=frozen)


def test_a_run_that_went_back_hears_of_the_later_checkpoints(tmp_path):
    """Once, by name; a save that was cut off is none, and other folders are silent."""
    env = ax.Env()
    ran(4, ax.save_state(env, tmp_path, every=2))
    first, last = sorted(one.name for one in tmp_path.iterdir())
    back = ax.load_state(env, str(tmp_path / first))
    with pytest.warns(CheckpointWarning, match=f"where {last} is of a later") as told:
        ran(1, back, ax.save_state(env, tmp_path, every=1))
    assert len(told) == 1
    (tmp_path / last / "commit.json").unlink()
    ran(1, back, ax.save_state(env, tmp_path, every=1))
    ran(1, back, ax.save_state(env, tmp_path / "other", every=1))


def test_a_metric_that_is_never_there_is_told(tmp_path):
    """Or `retain(best=...)` would keep nothing; one that is there is silent."""

    def best(name):
        return ax.retain(best=(name, "min"))

    with pytest.warns(CheckpointWarning, match="'val_loss', and the step has loss"):
        ran(1, ax.save_state(ax.Env(), tmp_path, 1, best("val_loss")))
    ran(1, ax.save_state(ax.Env(), tmp_path, 1, best("loss")))


def test_a_path_is_that_of_the_start(tmp_path, monkeypatch):
    """Another working directory later does not move the saves of a run."""
    monkeypatch.chdir(tmp_path)
    tx = ax.save_state(ax.Env(), "run", every=1)
    state = ran(1, tx)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    step = ax.step(tx, loss)
    step(state, torch.ones(3, 2))
    assert ax.latest(tmp_path / "run").step == 2
    assert not list((tmp_path / "sub").iterdir())


@pytest.mark.parametrize("one", [ax.save_state, ax.on_preempt])
def test_a_url_that_cannot_be_is_refused_at_init(one):
    """Not hours later, at the first save."""
    given = {"every": 500} if one is ax.save_state else {}
    with pytest.raises(ValueError, match="nosuch://run"):
        ran(0, one(ax.Env(), "nosuch://run", **given))


@pytest.mark.parametrize("name", ["a::b", "a b", "ü#?%20", "[x]*", "~"])
def test_any_name_of_a_folder_will_do(name, tmp_path):
    """Saved, read back, made room, and gone on from."""
    env, folder = ax.Env(), tmp_path / name
    ran(3, ax.save_state(env, folder, every=1, keep=1))
    assert len(list(folder.iterdir())) == 1
    assert ran(1, ax.load_state(env, folder)).step == 4


@pytest.mark.parametrize("url", ["memory://run#3", "memory://run?a=1"])
def test_a_url_that_is_printed_otherwise_is_refused(url):
    """At init: what is saved there would not be found again."""
    with pytest.raises(ValueError, match=r"without \? and #"):
        ran(0, ax.save_state(ax.Env(), url, every=500))


def went_back(env, folder):
    """What differs after a step, between a loaded state and one from the start."""
    found = []
    for pending in (False, True):
        tx = saving.chain(env, "fsdp2", ax.load_state(env, folder))
        state = ax.init(tx, made(), saving.grouped)
        batch = next(ax.feed(tx, saving.loader(), start=state))
        if pending:
            state, _ = ax.grads(tx, saving.masked)(state, batch)
            state = ax.load_state(env, folder)(state)
        state, _ = ax.step(tx, saving.masked)(state, batch)
        found.append(odd.described(state, local))
    return odd.differing(*found)


def first(env, folder):
    saving.train(saving.chain(env, "fsdp2", ax.save_state(env, folder, 2)), 2)


def test_gradients_that_wait_do_not_outlive_a_load(tmp_path):
    """They belong to the weights that were there before."""
    testing.run(2)(first)(str(tmp_path))
    assert testing.run(2)(went_back)(str(tmp_path)) == [[]] * 2


class Broken:
    """An object whose state_dict raises, in a slot."""

    def state_dict(self):
        raise KeyError("lost")

    def load_state_dict(self, state):
        raise AssertionError


def broken_on_one(env, folder):
    """What each rank raises where only the last cannot say what it holds."""
    state = ax.init(saving.chain(env, "ddp"), made(), saving.grouped)
    mine = Broken() if env.rank == env.world - 1 else {}
    with pytest.raises(ax.CheckpointError) as error:
        ax.save_state(env, folder)(ax.with_slot(state, "mine", mine))
    return str(error.value)


def test_an_object_that_raises_on_one_rank_raises_on_all(tmp_path):
    """With the rank and its words, where the others would wait."""
    told = testing.run(2)(broken_on_one)(str(tmp_path))
    assert told == ["rank 1: KeyError: 'lost'"] * 2


def failed_then_left(env, folder):
    """The exit code where the save beside fails on one rank as a signal comes."""
    patch, write = pytest.MonkeyPatch(), storage.write
    fails = [True]

    def full(store, name, parts, size):
        if fails and env.rank == env.world - 1:
            fails.clear()
            raise OSError(28, "no space left")
        write(store, name, parts, size)

    patch.setattr(storage, "write", full)
    every = min(env.world, 2) + 1  # the boundary at which the signal is acted on
    beside = ax.save_state(env, folder, every, wait=False)
    tx = saving.chain(env, "ddp", beside, ax.on_preempt(env, folder))
    state = ax.init(tx, made(), saving.grouped)
    step, code = ax.step(tx, saving.masked), None
    try:
        for batch in ax.feed(tx, saving.loader(), start=state, stop=4):
            if state.step == 1:
                signal.raise_signal(signal.SIGUSR1)
            state, _ = step(state, batch)
    except SystemExit as left:
        code = left.code
    patch.undo()
    return code, ax.latest(folder).step == every


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_leaves_saves_again_where_the_save_beside_failed(world, tmp_path):
    """Instead of an error, which would lose the run since the save before."""
    left = testing.run(world)(failed_then_left)(str(tmp_path))
    assert left == [(75, True)] * world


GROUP = """
import os, signal, time
from pathlib import Path
import torch
from torch.utils.data import DataLoader
import accelx as ax

sent = Path({sent!r})

class Slow(torch.utils.data.Dataset):
    made = 0

    def __len__(self):
        return 64

    def __getitem__(self, at):
        self.made += 1
        while self.made > 8 and not sent.exists():  # nor is a worker's second batch
            time.sleep(0.01)
        return torch.ones(2)

env = ax.Env()
tx = ax.chain(
    ax.shard_loader(env),
    *([ax.on_preempt(env, {folder!r})] if {heard} else []),
)
if not {heard}:  # a program that answers, but whose workers do not
    from accelx import fetch
    fetch.answered = tuple
    tx = ax.chain(tx, ax.on_preempt(env, {folder!r}))
sgd = lambda m: torch.optim.SGD(m.parameters(), 0.1)
state = ax.init(tx, torch.nn.Linear(2, 1), sgd)
step = ax.step(tx, lambda m, x: m(x).mean())
for batch in ax.feed(tx, DataLoader(Slow(), 8, num_workers=2), start=state):
    state, _ = step(state, batch)
    if state.step == 2:
        os.killpg(0, signal.SIGTERM)
        sent.touch()
"""


def code_of(folder, heard):
    """The exit code of a program whose whole process group gets SIGTERM."""
    text = GROUP.format(folder=folder, heard=heard, sent=f"{folder}-sent")
    told = subprocess.run(
        [sys.executable, "-c", text],
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=150,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    return told.returncode, told.stderr


@pytest.mark.door
def test_a_signal_to_the_whole_group_spares_the_workers(tmp_path):
    """The run is saved; where workers die of the signal, it is not."""
    code, said = code_of(str(tmp_path / "run"), True)
    assert (code, ax.latest(tmp_path / "run").step) == (75, 3), said
    code, said = code_of(str(tmp_path / "control"), False)
    assert code != 75, said
    assert "DataLoader worker" in said


GONE = """
import os, sys
import torch
import accelx as ax
from accelx.saves import background

background.PATIENCE = {patience}
env = ax.connect()
tx = ax.chain(
    ax.shard_model(env, "ddp"), ax.save_state(env, {folder!r}, every=2, wait=False)
)
sgd = lambda m: torch.optim.SGD(m.parameters(), 0.1)
state = ax.init(tx, torch.nn.Linear(2, 1), sgd)
step = ax.step(tx, lambda m, x: m(x).mean())
state, _ = step(state, torch.ones(3, 2))
if env.rank == 1:
    background.Background.start = lambda *args: os._exit(9)
try:
    for _ in range(2):
        state, _ = step(state, torch.ones(3, 2))
except Exception as error:
    print(type(error).__name__)
    sys.exit(3)
"""


@pytest.mark.door
def test_a_program_that_ends_waits_for_a_lost_rank_for_a_while(tmp_path):
    """Where its own code took the error, nothing else tells the thread that saves."""
    folder, port = str(tmp_path / "run"), str(free_port())
    text = GONE.format(folder=folder, patience=1.0)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", text],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(2)
    ]
    said = [one.communicate(timeout=150) for one in ranks]
    assert [one.returncode for one in ranks] == [FAILED, 9], said
    assert "the run ended before all ranks had written" in said[0][1]
    assert ax.latest(folder) is None


def test_a_folder_named_as_a_checkpoint_is_none_to_save_under(tmp_path):
    """It would be taken for one when the run goes on."""
    folder = tmp_path / "step-0000000001-12345678"
    saves = ax.save_state(ax.Env(), folder, every=1)
    with pytest.raises(ValueError, match="named as one checkpoint is"):
        saving.train(saving.chain(ax.Env(), "ddp", saves), 1)
