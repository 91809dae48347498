"""A save that goes on beside the training: what it writes, who hears of a failure."""

import subprocess
import sys
import threading
import time

import pytest
import torch

import accelx as ax
from accelx import storage, testing
from accelx.saves.background import FAILED, Background
from tests import saving
from tests.laws import odd
from tests.laws.training import local, made, masked, quiet_views

pytestmark = [pytest.mark.multi, quiet_views]
PLACES = [(1, "ddp"), (2, "ddp"), (2, "fsdp2")]


def held_back(gate, write=storage.write):
    """`storage.write` that waits until `gate` is set."""

    def slow(*args):
        assert gate.wait(50)
        write(*args)

    return slow


def overwritten(env, kind, folder, snapshot):
    """What is loaded of a save whose weights and moments change before it writes."""
    gate, patch = threading.Event(), pytest.MonkeyPatch()
    patch.setattr(storage, "write", held_back(gate))
    if not snapshot:
        patch.setattr(
            Background, "_snapshot", lambda self, job: [s.data for s in job.slabs]
        )
    tx = saving.chain(env, kind, ax.save_state(env, folder, every=2, wait=False))
    state, _ = saving.train(tx, 2)
    wanted = odd.described(state, local)
    for tensor in [*state.model.parameters(), *moments(state)]:
        local(tensor).fill_(7.0)
    gate.set()
    state.slots["save_state"].background.join()
    patch.undo()
    back = ax.load_state(env, folder)
    found = ax.init(saving.chain(env, kind, back), made(), saving.grouped)
    return odd.differing(wanted, odd.described(found, local))


def moments(state):
    """The tensors of the optimizer that have a shape."""
    return [t for held in state.optim.state.values() for t in held.values() if t.dim()]


@pytest.mark.parametrize(("world", "kind"), PLACES)
def test_what_changes_after_the_snapshot_is_not_written(world, kind, tmp_path):
    """The checkpoint holds the state of the step that was saved, to the bit."""
    places = testing.run(world)(overwritten)(kind, str(tmp_path), True)
    assert places == [[]] * world


def test_a_slot_may_change_its_shape_from_save_to_save(tmp_path):
    """What saves have in common is no more than what stayed as it was."""
    grow = ax.transform(
        "mine",
        start=lambda state, tx: ax.with_slot(state, "mine", torch.ones(0)),
        after=lambda state, out: (
            ax.with_slot(state, "mine", torch.full((state.step % 3,), 1.0)),
            out,
        ),
    )
    env = ax.Env()
    save = ax.save_state(env, str(tmp_path), every=1, wait=False)
    state, _ = saving.train(saving.chain(env, "ddp", grow, save), 5)
    state.slots["save_state"].background.join()
    found = {}
    for folder in tmp_path.iterdir():
        load = ax.load_state(env, str(folder))
        state = ax.init(saving.chain(env, "ddp", grow, load), made(), saving.grouped)
        found[state.step] = state.slots["mine"].tolist()
    assert found == {k: [1.0] * (k % 3) for k in range(1, 6)}


@pytest.mark.parametrize("mode", [torch.device("meta"), torch.inference_mode()])
def test_where_tensors_are_made_by_default_is_not_where_saves_are(mode, tmp_path):
    """A default device, or a mode, around a save or a load changes neither."""
    env = ax.Env()
    save = ax.save_state(env, str(tmp_path), every=2, wait=False)
    state, _ = saving.train(saving.chain(env, "ddp", save), 2)
    wanted, saver = odd.described(state), state.slots["save_state"]
    fresh = saving.chain(env, "ddp")
    with mode:
        saver.save(state, {}, wait=False)
        saver.background.join()
    found = ax.init(fresh, made(), saving.grouped)
    with mode:
        found = ax.load_state(env, str(tmp_path))(found)
    assert odd.differing(wanted, odd.described(found)) == []
    weights = [*found.model.parameters(), *moments(found)]
    assert not any(t.is_inference() or t.is_meta for t in weights)
    step = ax.step(fresh, masked)
    assert step(found, next(iter(ax.feed(fresh, saving.loader()))))[1].stepped


def test_control_without_a_snapshot_the_change_is_written(tmp_path):
    """The test above sees it when memory is written that training goes on to change."""
    assert testing.run(1)(overwritten)("ddp", str(tmp_path), False) != [[]]


def one_at_a_time(env, folder):
    """Writers at once at most, buffers that were used, and what was committed."""
    writers, buffers, patch = [], set(), pytest.MonkeyPatch()
    write = storage.write

    def slow(*args):
        alive = [t for t in threading.enumerate() if t.name == "accelx-save"]
        writers.append(len(alive))
        time.sleep(0.02)
        write(*args)

    patch.setattr(storage, "write", slow)
    tx = saving.chain(env, "ddp", ax.save_state(env, folder, every=1, wait=False))
    state = ax.init(tx, made(), saving.grouped)
    step = ax.step(tx, saving.masked)
    for batch in ax.feed(tx, saving.loader(), start=state, stop=4):
        state, _ = step(state, batch)
        buffers.add(state.slots["save_state"].background.buffer.data_ptr())
    state.slots["save_state"].background.join()
    patch.undo()
    return set(writers), len(buffers), ax.latest(folder).step


def test_one_save_is_under_way_at_a_time_in_one_buffer(tmp_path):
    """A second save waits for the first, and takes its memory over."""
    assert testing.run(2)(one_at_a_time)(str(tmp_path)) == [({1}, 1, 4)] * 2


def failing(env, folder):
    """What each rank raises after a write that fails on the last of them."""
    patch, write = pytest.MonkeyPatch(), storage.write

    def full(store, name, parts, size):
        if name.startswith(f"rank-{env.world - 1:05d}."):
            raise OSError(28, "no space left")
        write(store, name, parts, size)

    tx = saving.chain(env, "ddp", ax.save_state(env, folder, every=1, wait=False))
    state = ax.init(tx, made(), saving.grouped)
    step, told = ax.step(tx, saving.masked), []
    for batch in ax.feed(tx, saving.loader(), start=state, stop=4):
        if state.step == 1:  # the first save is good
            state.slots["save_state"].background.join()
            patch.setattr(storage, "write", full)
        if state.step == 2:
            saver = state.slots["save_state"]
            saver.background.thread.join()
            with pytest.raises(ax.CheckpointError) as error:
                step(state, batch)
            told.append(str(error.value))
            break
        state, _ = step(state, batch)
    patch.undo()
    saver.background.check()  # it was raised once
    return told, ax.latest(folder).step


@pytest.mark.parametrize("world", [1, 2])
def test_a_failure_is_raised_by_a_later_step_on_every_rank(world, tmp_path):
    """With rank and cause; the checkpoint before stays the newest."""
    for told, newest in testing.run(world)(failing)(str(tmp_path)):
        assert len(told) == 1
        assert f"rank {world - 1} failed" in told[0]
        assert "no space left" in told[0]
        assert "beside the training" in told[0]
        assert newest == 1


ENDING = """
import sys, time
import torch
import accelx as ax
from accelx import storage

write = storage.write

def slow(store, name, parts, size):
    time.sleep(0.3)
    if {fails}:
        raise OSError(28, "no space left")
    write(store, name, parts, size)

env, folder = ax.Env(), {folder!r}
storage.write = slow
tx = ax.save_state(env, folder, every=1, wait=False)
sgd = lambda m: torch.optim.SGD(m.parameters(), 0.1)
state = ax.init(tx, torch.nn.Linear(2, 1), sgd)
state, _ = ax.step(tx, lambda m, x: m(x).mean())(state, torch.ones(3, 2))
print("trained", flush=True)
"""


@pytest.mark.door
def test_a_program_ends_when_its_last_save_has(tmp_path):
    """It waits and exits with 0; if that save fails, with a traceback and code 74."""
    running = {}
    for fails in (False, True):
        folder = str(tmp_path / str(fails))
        text = ENDING.format(fails=fails, folder=folder)
        told = subprocess.PIPE
        running[folder] = subprocess.Popen(
            [sys.executable, "-c", text], stdout=told, stderr=told, text=True
        )
    said = [one.communicate(timeout=150) for one in running.values()]
    codes = [one.returncode for one in running.values()]
    good, bad = running
    assert [out for out, _ in said] == ["trained\n"] * 2, said
    assert (codes, ax.latest(good).step) == ([0, FAILED], 1)
    assert "no space left" in said[1][1]
    assert ax.latest(bad) is None


def test_a_save_by_hand_waits_for_the_one_beside(tmp_path):
    """`save_state(env, url)(state)` is committed on return, after the other one."""
    env = ax.Env()
    tx = saving.chain(env, "ddp", ax.save_state(env, str(tmp_path), 2, wait=False))
    state, _ = saving.train(tx, 2)
    by_hand = ax.save_state(env, str(tmp_path / "hand"))(state)
    assert ax.latest(str(tmp_path)).step == 2
    assert ax.latest(str(tmp_path / "hand")).url == by_hand
    before = odd.described(state)
    again = ax.init(
        saving.chain(env, "ddp", ax.load_state(env, by_hand)), made(), saving.grouped
    )
    assert odd.differing(before, odd.described(again)) == []
    assert torch.is_tensor(state.slots["save_state"].background.buffer)
