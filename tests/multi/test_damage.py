"""Whatever happens to the bytes of a checkpoint is found before it is believed."""

import itertools
import json
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import accelx as ax
from accelx import storage, testing
from accelx.errors import CheckpointError, CheckpointWarning, DamagedError
from accelx.saves.choose import Wish, restored
from accelx.saves.commit import found, open_manifest
from accelx.saves.verify import problems
from tests import saving
from tests.laws.training import grouped, made, quiet_views, same

pytestmark = [pytest.mark.multi, quiet_views]
FLIPS = 250  # of each kind
KINDS = {"plain": 1, "fsdp2": 2}  # ranks that write
SMALL = ("manifest.json", "commit.json")


def train(env, kind, url):
    """Two checkpoints, and the weights at each."""
    each = []
    for stop in (1, 2):
        tx = saving.chain(env, kind if env.world > 1 else "ddp")
        state, _ = saving.train(tx, stop)
        ax.save_state(env, url)(state)
        each.append(saving.weights(state))
    return each


@pytest.fixture(scope="module", params=KINDS)
def sound(request, tmp_path_factory):
    """A folder with two checkpoints, and the weights of each."""
    url = tmp_path_factory.mktemp(request.param)
    ranks = testing.run(KINDS[request.param])(train)(request.param, str(url))
    return url, ranks[0]


@pytest.fixture
def run(sound, tmp_path):
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(sound[0], tmp_path / "run"))


@pytest.fixture(scope="module")
def state():
    """What checkpoints are loaded into: on one rank, whatever wrote them."""
    return ax.init(saving.chain(ax.Env(), "ddp"), made(), grouped)


def load(state, url, **wish):
    """The state, with the global random streams left as they were."""
    before = torch.get_rng_state()
    loaded = restored(ax.Env(), state, str(url), Wish(**wish))
    torch.set_rng_state(before)
    return loaded


def newest(run):
    """The folder of the newer checkpoint."""
    return max(run.iterdir())


def said(folder):
    """All problems of a checkpoint, from its manifest down."""
    one = next(one for one in found(str(folder.parent)) if one.name == folder.name)
    try:
        return list(problems(*open_manifest(one)))
    except CheckpointError as error:
        return [str(error)]


def flip(file, at, bit):
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 1 << bit]))


def names_bytes(text, at):
    """Whether an error about a data file names bytes around `at`."""
    low, high = text.partition(" at ")[2].split(" have ")[0].split(" to ")
    return int(low) <= at < int(high)


def test_every_flipped_bit_is_found(run, state):
    """Wherever it lies: by looking, and by loading, with the file and bytes named."""
    folder, draw = newest(run), random.Random(0)
    files = sorted(folder.iterdir())
    assert not said(folder)
    assert load(state, run, verify="full").step == 2
    for _ in range(FLIPS):
        file, bit = draw.choice(files), draw.randrange(8)
        at = draw.randrange(file.stat().st_size)
        flip(file, at, bit)
        texts = said(folder)
        with pytest.raises(DamagedError) as caught:
            load(state, folder, verify="full")
        for text in (*texts, str(caught.value)):
            assert file.name in text
            assert file.suffix != ".safetensors" or names_bytes(text, at)
        assert texts
        flip(file, at, bit)
    assert not said(folder)  # each was turned back


def slices(folder):
    """(file, first byte, byte behind, name) of all that a load on one rank reads."""
    tensors = json.loads((folder / "manifest.json").read_text())["tensors"]
    for index in folder.glob("rank-*.json"):
        file = index.with_suffix(".safetensors")
        each = sorted(json.loads(index.read_text())["slices"], key=lambda one: one[2])
        ends = [one[2] for one in each[1:]] + [file.stat().st_size]
        for (number, _, start, _), stop in zip(each, ends, strict=True):
            if tensors[number][0] != "random":  # of which a rank reads its own
                yield file, start, stop, tensors[number][0]


def test_bytes_of_tensors_are_found_without_looking_at_all_first(run, state):
    """The usual load checks what it reads: the tensor is named."""
    draw = random.Random(1)
    for file, start, stop, name in draw.sample(list(slices(newest(run))), 30):
        at, bit = draw.randrange(start, stop), draw.randrange(8)
        flip(file, at, bit)
        with pytest.raises(DamagedError, match=file.name) as caught:
            load(state, run)
        assert names_bytes(str(caught.value), at)
        assert f"those of {name} at" in str(caught.value)
        flip(file, at, bit)
    assert load(state, run).step == 2


def hurt(file, kind):
    """Cut a file, let it grow, or remove it."""
    size = file.stat().st_size
    if kind == "gone":
        file.unlink()
    elif kind == "longer":
        file.write_bytes(file.read_bytes() + b"\0")
    else:
        with file.open("r+b") as opened:
            opened.truncate(
                {"empty": 0, "byte": 1, "half": size // 2}.get(kind, size - 1)
            )


@pytest.mark.parametrize("kind", ["empty", "byte", "half", "last", "longer", "gone"])
def test_a_file_of_another_length_makes_the_checkpoint_none(run, state, kind):
    """Each of its files: `latest` takes the one before and says why, so does a load."""
    for name in sorted(file.name for file in newest(run).iterdir()):
        copy = Path(shutil.copytree(run, run.parent / name))
        hurt(newest(copy) / name, kind)
        one = ax.latest(str(copy))
        assert one.step == 1
        assert "commit" in one.skipped[0].why or name in one.skipped[0].why
        if name == "commit.json" and kind == "gone":  # it was never saved
            assert load(state, copy).step == 1
            continue
        with pytest.warns(CheckpointWarning, match=newest(copy).name):
            assert load(state, copy, fallback=True).step == 1


def swaps(run):
    """Pairs of files of which each lies where the other should."""
    old, new = sorted(run.iterdir())
    names = sorted(file.name for file in new.iterdir())
    yield from ((old / name, new / name) for name in names)
    for suffix in (".safetensors", ".json"):
        ranks = [new / n for n in names if n.startswith("rank") and n.endswith(suffix)]
        yield from itertools.pairwise(ranks)


def test_files_that_change_places_are_found(run, state):
    """Those of two ranks, and those of two steps, which have the same sizes."""
    for number, (one, other) in enumerate(swaps(run)):
        copy = Path(shutil.copytree(run, run.parent / str(number)))
        paths = [copy / file.relative_to(run) for file in (one, other)]
        data = [file.read_bytes() for file in paths]
        assert data[0] != data[1]
        for file, other_data in zip(paths, reversed(data), strict=True):
            file.write_bytes(other_data)
        assert said(newest(copy))
        with pytest.raises(DamagedError):
            load(state, newest(copy))


def test_the_one_before_is_taken_whole(run, sound, state):
    """After a load that failed half-way, nothing of the damaged one is left."""
    file, at, *_ = max(slices(newest(run)))
    flip(file, at, 0)
    with pytest.raises(DamagedError, match=file.name):
        load(state, run)
    with pytest.warns(CheckpointWarning, match="the one before taken"):
        loaded = load(state, run, fallback=True)
    assert loaded.step == 1
    assert same(saving.weights(loaded), sound[1][0])
    assert not same(saving.weights(loaded), sound[1][1])


def test_where_all_are_damaged_a_load_says_so_of_each(run, state):
    """No state comes out of it, and each checkpoint is named."""
    for folder in run.iterdir():
        flip(folder / "manifest.json", 9, 1)
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(DamagedError, match="all are damaged") as caught,
    ):
        load(state, run, fallback=True)
    assert all(folder.name in str(caught.value) for folder in run.iterdir())


def test_files_of_others_change_nothing(run, sound, state):
    """Beside the checkpoints and inside them: whatever the names, they are not read."""
    for folder in (run, newest(run)):
        (folder / "notes.txt").write_text("mine")
        (folder / "rank-00009.safetensors").write_bytes(b"\xff" * 99)
        (folder / "best").mkdir()
        (folder / "best" / "commit.json").write_text("{}")
    (run / "step-1").mkdir()
    (run / "step-0000000009-0a1b2c3d").mkdir()  # a save that was cut off
    assert ax.latest(str(run)).name == sorted(sound[0].iterdir())[-1].name
    assert same(saving.weights(load(state, run, verify="full")), sound[1][1])


def test_a_look_reads_every_byte(run, monkeypatch):
    """What it reads adds up to the sizes of all files that the manifest names."""
    store, manifest = open_manifest(found(str(run))[-1])
    read, reading = [], storage.reading

    @contextmanager
    def counted(*args):
        with reading(*args) as fill:
            yield lambda at, out: read.append(len(out)) or fill(at, out)

    monkeypatch.setattr(storage, "reading", counted)
    assert not list(problems(store, manifest))
    assert sum(read) == sum(file.stat().st_size for file in newest(run).glob("*.safe*"))
