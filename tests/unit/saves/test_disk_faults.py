"""A disk that fails, fills up or may not be written loses nothing that was saved."""

import errno
import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch

import accelx as ax
from accelx import storage_local
from accelx.errors import CheckpointError
from accelx.saves.commit import open_manifest
from accelx.saves.verify import problems
from tests import forged

PAGE = 4096  # bytes: what a file takes at least
# Of the second save of a run. A header, 16 tensors, an index, a manifest, a commit;
# four files and the folder of each after it, and the run's folder, which got a name.
CALLS = {"write": 20, "fsync": 9, "open": 9}


class Disk:
    """The system's calls, of which one fails or writes half."""

    def __init__(self):
        self.counts = dict.fromkeys(CALLS, 0)
        self.fault = None, 0, 0  # call, which of them, errno or None for a short write

    def __getattr__(self, name):
        return getattr(os, name)

    def _called(self, name, *args):
        self.counts[name] += 1
        call, number, code = self.fault
        if (call, number) == (name, self.counts[name]):
            if code is not None:
                raise OSError(code, os.strerror(code))
            args = (args[0], args[1][: len(args[1]) // 2])
        # no power fails here, and a real sync takes long
        return None if name == "fsync" else getattr(os, name)(*args)

    def write(self, *args):
        return self._called("write", *args)

    def fsync(self, *args):
        return self._called("fsync", *args)

    def open(self, *args):
        return self._called("open", *args)


@pytest.fixture
def disk(monkeypatch):
    """The calls by which a save reaches the disk."""
    made = Disk()
    monkeypatch.setattr(storage_local, "os", made)
    return made


def save(run, step):
    """Save a state whose weights are all `step`."""
    state = forged.fresh()
    for parameter in state.model.parameters():
        parameter.data.fill_(step)
    object.__setattr__(state, "step", step)
    return ax.save_state(ax.Env(), run)(state)


def holds(run, step):
    """Whether the newest checkpoint is that of `step`, to the byte."""
    newest = ax.latest(str(run))
    assert newest.step == step
    assert not list(problems(*open_manifest(newest)))
    state = forged.load(run, verify="full")
    weights = list(state.model.parameters())
    return all(torch.equal(w, torch.full_like(w, step)) for w in weights)


def test_a_save_makes_the_calls_that_are_failed_below(disk, tmp_path):
    """Each file is written and synced, and so is each folder that got a name."""
    save(tmp_path, 1)
    assert disk.counts == CALLS


FAULTS = [
    (call, number, code)
    for call, code in (
        ("write", errno.ENOSPC),
        ("write", errno.EIO),
        ("fsync", errno.EIO),
        ("open", errno.EACCES),
        ("open", errno.EMFILE),
    )
    for number in range(1, CALLS[call] + 1)
]


def test_each_call_that_fails_fails_the_save_alone(disk, tmp_path):
    """The error has the system's words; the save before and the one after are whole."""
    for call, number, code in FAULTS:
        run = tmp_path / f"{call}-{number}-{code}"
        run.mkdir()
        save(run, 1)
        disk.fault = call, disk.counts[call] + number, code
        with pytest.raises(CheckpointError, match=os.strerror(code)):
            save(run, 2)
        assert holds(run, 1)
        save(run, 3)
        assert holds(run, 3)


def test_a_short_write_is_gone_on_with(disk, tmp_path):
    """A call that takes half of the bytes is no fault: the rest follows."""
    for number in range(1, CALLS["write"] + 1):
        before = disk.counts["write"]
        disk.fault = "write", before + number, None
        save(tmp_path, number)
        assert disk.counts["write"] == before + CALLS["write"] + 1
        assert holds(tmp_path, number)


def system(*command):
    """Whether a program ends well."""
    done = subprocess.run(command, capture_output=True, check=False)
    return done.returncode == 0


@contextmanager
def small_disk(place, size):
    """A real file system of `size` bytes, in memory."""
    place.mkdir()
    if not shutil.which("mount") or os.geteuid():
        pytest.skip("only root may mount a file system")
    if not system("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)):
        pytest.skip("this system lets nobody mount a file system")
    try:
        yield place
    finally:
        assert system("umount", str(place))


def room(run, pages):
    """Leave so many pages free on a disk; the file that takes the others."""
    filler = run / "filler"
    filler.write_bytes(bytes((os.statvfs(run).f_bavail - pages) * PAGE))
    return filler


def test_a_disk_that_is_full_loses_nothing(tmp_path):
    """Whatever file of a save the last page goes to."""
    with small_disk(tmp_path / "disk", 64 * PAGE) as run:
        save(run, 1)
        for pages in range(6):  # the slices take three, and each other file one
            filler = room(run, pages)
            with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
                save(run, 2)
            filler.unlink()
            assert holds(run, 1)
            for left in run.glob("step-0000000002-*"):
                shutil.rmtree(left)
        room(run, 6)
        save(run, 3)
        assert holds(run, 3)


def test_a_disk_that_may_only_be_read_is_read(tmp_path):
    """A save says so, a load works, and so does a save once it may be written again."""
    with small_disk(tmp_path / "disk", 64 * PAGE) as run:
        save(run, 1)
        assert system("mount", "-o", "remount,ro", str(run))
        with pytest.raises(CheckpointError, match=os.strerror(errno.EROFS)):
            save(run, 2)
        assert holds(run, 1)
        assert system("mount", "-o", "remount,rw", str(run))
        save(run, 3)
        assert holds(run, 3)
