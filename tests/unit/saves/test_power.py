"""Whatever of a disk's cache is lost with the power, what was saved is still there."""

import os
import random
from pathlib import Path

import attrs
import pytest

import accelx as ax
from accelx import storage_local
from accelx.saves.commit import open_manifest
from accelx.saves.verify import problems
from tests import forged

ENDS = 3  # that are tried of each point at which the power may fail
LAST = 4  # saves


def tree(folder):
    """All that lies in a folder: bytes of files, dicts of folders."""
    return {
        one.name: tree(one) if one.is_dir() else one.read_bytes()
        for one in folder.iterdir()
    }


def at(root, path):
    """The folder at a path of a tree, made where it is not."""
    for part in path.parts:
        root = root.setdefault(part, {})
    return root


class Power:
    """The system's calls, and before each: what there is, and what of it is safe.

    Safe are the bytes of a file at its last sync, and the names in a folder at its own.
    """

    def __init__(self, root):
        self.root = root
        self.saved = 0  # steps whose save is over
        self.paths = {}  # of open files
        self.files, self.names = {}, {Path(): set()}
        self.points = []

    def __getattr__(self, name):
        return getattr(os, name)

    def note(self):
        safe = dict(self.files), {k: set(v) for k, v in self.names.items()}
        self.points.append((self.saved, tree(self.root), *safe))

    def open(self, path, *args):
        self.note()
        opened = os.open(path, *args)
        self.paths[opened] = Path(path).relative_to(self.root.parent)
        return opened

    def write(self, *args):
        self.note()
        return os.write(*args)

    def fsync(self, opened):
        self.note()
        full = self.root.parent / self.paths[opened]
        path = Path(*self.paths[opened].parts[1:])
        if full.is_dir():
            self.names[path] = {one.name for one in full.iterdir()}
        else:
            self.files[path] = full.read_bytes()
        self.note()


def lost(draw, there, files, names, path=Path()):
    """A tree as it may be after the power failed: what is not safe may be anything."""
    kept = {}
    safe = names.get(path, set())
    for name in sorted(set(there) | safe):
        if (name in there) != (name in safe) and draw.random() < 0.5:
            continue
        inner = path / name
        now = there.get(name, files.get(inner, {}))
        if isinstance(now, dict):
            kept[name] = lost(draw, now, files, names, inner)
            continue
        old = files.get(inner)
        cut = now[: draw.randrange(len(now) + 1)]
        kinds = (now, cut, bytes(len(now)), b"" if old is None else old)
        kept[name] = now if now == old else draw.choice(kinds)
    return kept


def put(folder, kept):
    """Write a tree."""
    folder.mkdir()
    for name, value in kept.items():
        if isinstance(value, dict):
            put(folder / name, value)
        else:
            (folder / name).write_bytes(value)


@pytest.fixture
def power(monkeypatch, tmp_path):
    """A run's folder, whose disk has a cache."""
    root = tmp_path / "run"
    root.mkdir()
    made = Power(root)
    monkeypatch.setattr(storage_local, "os", made)
    return made


def run(power):
    """Several saves, of which the newest two are kept."""
    for step in range(1, LAST + 1):
        state = attrs.evolve(forged.fresh(), step=step)
        ax.save_state(ax.Env(), power.root, keep=2)(state)
        power.saved = step
        power.note()


def outcomes(points, folder):
    """(steps whose saves were over, newest step, problems) of each end."""
    draw = random.Random(0)
    for number, (saved, *point) in enumerate(points):
        for end in range(ENDS):
            place = folder / f"{number}-{end}"
            put(place, lost(draw, *point))
            newest = ax.latest(str(place))
            step = 0 if newest is None else newest.step
            bad = list(problems(*open_manifest(newest))) if newest else []
            yield saved, step, bad


def test_a_power_failure_at_any_call_loses_no_save_that_was_over(
    power, tmp_path, monkeypatch
):
    """Whatever was not synced may be lost: the newest is whole, and new."""
    run(power)
    monkeypatch.undo()
    assert len(power.points) > 100
    steps = set()
    for saved, step, bad in outcomes(power.points, tmp_path):
        assert step >= saved
        assert not bad
        steps.add(step)
    assert steps == set(range(LAST + 1))


@pytest.mark.parametrize("name", ["sync_folder", "fsync"])
def test_control_without_a_sync_saves_are_lost(power, tmp_path, monkeypatch, name):
    """The comparison sees it, if names or bytes are left to the cache."""
    if name == "fsync":
        power.fsync = lambda opened: power.note()
    else:
        monkeypatch.setattr(storage_local, name, lambda folder: None)
    run(power)
    monkeypatch.undo()
    assert any(step < saved for saved, step, _ in outcomes(power.points, tmp_path))
