"""`python -m accelx.checkpoint` tells of real checkpoints what their files say."""

import contextlib
import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import accelx as ax
from accelx import testing
from accelx.checkpoints.door import main
from tests import faulty
from tests.door.spawning import LONG, environment
from tests.laws.training import quiet_views
from tests.saving import chain, train

pytestmark = [pytest.mark.door, quiet_views]
TOOL = [sys.executable, "-m", "accelx.checkpoint"]


def saved(env, url, kind, stop, select=None):
    """Train from the newest checkpoint under `url` up to `stop`, saving every 2."""
    more = (
        ax.load_state(env, url, missing="fresh"),
        ax.save_state(env, url, every=2, select=select),
    )
    train(chain(env, kind, *more), stop)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of 2 ranks that one process went on with, and one of trained weights."""
    root = tmp_path_factory.mktemp("runs")
    testing.run(2)(saved)(str(root / "run"), "fsdp2", 4)
    testing.run(1)(saved)(str(root / "run"), "ddp", 6)
    testing.run(1)(saved)(str(root / "small"), "ddp", 2, "trainable")
    return root


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the run to damage: steps 2 and 4 of two ranks, 6 of one."""
    return Path(shutil.copytree(runs / "run", tmp_path / "run"))


@pytest.fixture
def tool(capsys):
    """The tool in this process: (exit code, what it printed, what it complained of)."""

    def call(*words):
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def data(tool):
    """What the tool prints as JSON, and its exit code."""

    def call(*words):
        code, out, err = tool(*words, "--json")
        assert not err
        return code, json.loads(out)

    return call


def steps(run):
    """The folders of a run by step."""
    return {int(f.name.split("-")[1]): f for f in sorted(run.glob("step-*"))}


def read(folder, name):
    """One JSON file, by Python's own reader."""
    return json.loads((folder / name).read_text())


def slices(folder):
    """(name, file, tensor, first byte, last byte) of all slices, by safetensors."""
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 it is no dict
                lo, hi = header[name]["data_offsets"]
                span = 8 + length + lo, 8 + length + hi
                yield name, file.name, opened.get_tensor(name), *span


def tensors(folder):
    """Every tensor in full: slices along dim 0 in the order of ranks."""
    found = {}
    for name, _, tensor, _, _ in slices(folder):
        found.setdefault(name, []).append(tensor)
    return {n: t[0] if len(t) == 1 else torch.cat(t) for n, t in found.items()}


def test_ls_says_what_the_commits_say(data, run):
    """Step, ranks, tensors, metrics and bytes of each folder, oldest first."""
    code, found = data("ls", run)
    assert code == 0
    assert [c["step"] for c in found["checkpoints"]] == [2, 4, 6]
    assert [c["num_ranks"] for c in found["checkpoints"]] == [2, 2, 1]
    for one, folder in zip(found["checkpoints"], steps(run).values(), strict=True):
        commit = read(folder, "commit.json")
        assert one["name"] == folder.name
        assert one["whole"]
        assert one["metrics"] == commit["metrics"]
        assert one["time"] == commit["time"]
        assert one["num_tensors"] == len(tensors(folder))
        assert one["size"] == sum(f.stat().st_size for f in folder.iterdir())


def test_ls_says_why_a_checkpoint_is_not_whole(tool, data, run):
    """Cut short, without commit, without a file: each tells; others' files do not."""
    two, four, six = steps(run).values()
    (two / "notes.txt").write_text("mine")
    (run / "notes.txt").write_text("mine")
    (run / "step-of-mine").mkdir()
    (four / "commit.json").unlink()
    (six / "rank-00000.safetensors").unlink()
    _, found = data("ls", run)
    whys = [c["why"] for c in found["checkpoints"]]
    assert whys[:2] == ["", "it has no commit"]
    assert "rank-00000.safetensors" in whys[2]
    code, out, _ = tool("ls", run)
    assert code == 0
    states = [line.split("  ")[-1].strip() for line in out.splitlines()[2:]]
    want = "rank-00000.safetensors: got nothing"
    assert states == ["whole", "it has no commit", want]


def test_ls_of_one_checkpoint_is_its_row(data, run):
    """A checkpoint's own URL lists that one."""
    for folder in steps(run).values():
        _, found = data("ls", f"{folder}/")
        assert [c["name"] for c in found["checkpoints"]] == [folder.name]


@pytest.mark.parametrize("step", [4, 6])
def test_show_says_what_the_files_hold(data, run, step):
    """Names, shapes, dtypes, bytes and slices are those that safetensors reads."""
    folder = steps(run)[step]
    _, found = data("show", folder)
    held = tensors(folder)
    assert {t["name"] for t in found["tensors"]} == set(held)
    each = list(slices(folder))
    for one in found["tensors"]:
        tensor = held[one["name"]]
        assert one["shape"] == list(tensor.shape)
        assert one["dtype"] == str(tensor.dtype).removeprefix("torch.")
        assert one["size"] == tensor.numel() * tensor.element_size()
        files = [file for name, file, *_ in each if name == one["name"]]
        assert one["num_slices"] == len(files)
        assert [found["parts"][p]["file"] for p in one["parts"]] == files
    for part in found["parts"]:
        assert part["num_slices"] == sum(file == part["file"] for _, file, *_ in each)
        assert part["size"] == (folder / part["file"]).stat().st_size
    for group in found["groups"]:
        inside = [t for n, t in held.items() if n.split(".")[0] == group["name"]]
        assert group["num_tensors"] == len(inside) == sum(group["dtypes"].values())
        assert group["size"] == sum(t.numel() * t.element_size() for t in inside)
    assert {g["name"] for g in found["groups"]} == {"model", "optim", "random"}
    about = {"step": step, "skipped": 0, "position": step, "torch": torch.__version__}
    assert found["about"].items() >= about.items()


def test_show_takes_the_newest_whole_one(tool, data, run):
    """A newer one that is cut short is passed over, and that is said."""
    part = steps(run)[6] / "rank-00000.safetensors"
    os.truncate(part, part.stat().st_size - 1)
    _, found = data("show", run)
    assert found["checkpoint"]["step"] == 4
    assert [f["name"] for f in found["passed_over"]] == [steps(run)[6].name]
    assert f"passed over: {steps(run)[6].name}" in tool("show", run)[1]


def test_show_of_names_that_fit(tool, data, run):
    """A glob chooses tensors and tied names; one that fits nothing says what would."""
    _, found = data("show", run, "--tensors", "model.layers.*.inner.*")
    names = {n for n in tensors(steps(run)[6]) if ".inner." in n and "model." in n}
    assert {t["name"] for t in found["tensors"]} == names
    assert found["aliases"] == {
        "model.layers.1.inner.weight": "model.layers.0.inner.weight"
    }
    code, out, err = tool("show", run, "--tensors", "model.layer.*")
    assert (code, out) == (1, "")
    assert "model.layers." in err
    assert "'model.layer.*'" in err


def test_show_tells_of_weights_that_are_not_stored(tool, data, runs):
    """Frozen weights of a trainable save are listed by fingerprint."""
    folder = steps(runs / "small")[2]
    _, found = data("show", folder)
    frozen = {"layers.1.outer.weight", "layers.3.norm.weight", "layers.3.norm.bias"}
    assert {b["name"] for b in found["base"]} == frozen
    assert not {f"model.{n}" for n in frozen} & set(tensors(folder))
    assert "not stored" in tool("show", folder)[1]


def changed(a, b):
    """Names, tied ones too, whose numbers differ in two folders; by safetensors."""
    ours, theirs = tensors(a), tensors(b)
    stored = {n: n for n in ours} | read(a, "manifest.json")["aliases"]
    return {
        n
        for n, s in stored.items()
        if ours[s].shape == theirs[s].shape and not torch.equal(ours[s], theirs[s])
    }


@pytest.mark.parametrize(
    ("steps_", "by", "lot"),
    [((2, 4), "digests", 1 << 20), ((4, 6), "bytes", 1 << 20), ((6, 4), "bytes", 50)],
)
def test_diff_finds_the_tensors_that_differ(data, run, monkeypatch, steps_, by, lot):
    """Those that safetensors reads as different, however they are cut and read."""
    monkeypatch.setattr("accelx.checkpoints.same.LOT", lot)
    a, b = (steps(run)[s] for s in steps_)
    code, found = data("diff", a, b)
    assert code == 0
    assert not found["same"]
    assert {c["name"] for c in found["changed"]} == changed(a, b)
    assert by in {c["by"] for c in found["changed"]}
    assert found["num_same"][by]  # frozen weights
    shapes = {n: list(t.shape) for n, t in tensors(a).items()}
    others = {n: list(t.shape) for n, t in tensors(b).items()}
    assert found["reshaped"] == [
        {"name": n, "a": shapes[n], "b": others[n]}
        for n in shapes
        if shapes[n] != others[n]
    ]
    steps_of = [v for v in found["values"] if v["name"] == "step"]
    assert steps_of == [{"name": "step", "a": steps_[0], "b": steps_[1]}]
    rates = [read(f, "manifest.json")["values"]["optim.0.groups"] for f in (a, b)]
    rates = [r["groups"][1]["options"]["lr"] for r in rates]
    name = "optim.0.groups.groups.1.options.lr"
    assert {"name": name, "a": rates[0], "b": rates[1]} in found["values"]


def test_diff_of_a_checkpoint_and_its_copy_is_nothing(data, run, tmp_path):
    """Two folders of the same bytes are the same, by digests alone."""
    copy = shutil.copytree(steps(run)[4], tmp_path / steps(run)[4].name)
    _, found = data("diff", steps(run)[4], copy)
    assert found["same"]
    held = len(tensors(copy))
    assert found["num_same"] == {"digests": held, "bytes": 0}


def test_diff_tells_what_only_one_side_has(data, runs):
    """Weights that one side does not store are told as such, and by fingerprint."""
    a, b = steps(runs / "run")[2], steps(runs / "small")[2]
    _, found = data("diff", a, b)
    gone = set(tensors(a)) - set(tensors(b))
    assert set(found["removed"]) == gone
    assert {f"model.{c['name']}" for c in found["base"]} == gone
    assert not found["added"]
    _, back = data("diff", b, a)
    assert set(back["added"]) == gone


def test_verify_finds_one_byte_anywhere(data, run):
    """A byte turned around in any file of a checkpoint is found in that file."""
    folder = steps(run)[4]
    assert data("verify", folder)[0] == 0  # the control
    for file in sorted(folder.iterdir()):
        size = file.stat().st_size
        for at in {0, 9, size // 3, size // 2, size - 1}:
            faulty.flip(file, at)
            code, found = data("verify", folder)
            assert code == 1, (file.name, at)
            (one,) = found["checkpoints"]
            assert {d["file"] for d in one["damage"]} == {file.name}
            assert found["num_damaged"] == 1
            faulty.flip(file, at)
    assert data("verify", folder)[0] == 0


def test_verify_names_the_tensor_and_its_bytes(tool, data, run):
    """Damage in a slice is told as the bytes that the safetensors header gives it."""
    folder = steps(run)[4]
    for name, file, _, start, stop in list(slices(folder))[::9]:
        faulty.flip(folder / file, stop - 1)
        _, found = data("verify", folder)
        (damage,) = found["checkpoints"][0]["damage"]
        told = tuple(damage[k] for k in ("file", "tensor", "start", "stop"))
        assert told == (file, name, start, stop)
        row = tool("verify", folder)[1].splitlines()[-1].split()
        assert row[1:5] == [file, name, str(start), str(stop)]
        faulty.flip(folder / file, stop - 1)


def test_verify_lists_all_that_a_cut_file_lost(data, run):
    """Of a file that ends early: its size, and each tensor beyond its end."""
    folder, file = steps(run)[4], "rank-00001.safetensors"
    lost = [(n, a, b) for n, f, _, a, b in slices(folder) if f == file]
    cut = sorted(a for _, a, _ in lost)[-4]  # four tensors begin here or later
    os.truncate(folder / file, cut)
    code, found = data("verify", folder)
    damage = found["checkpoints"][0]["damage"]
    assert code == 1
    told = {(d["tensor"], d["start"], d["stop"]) for d in damage if d["tensor"]}
    assert told == {one for one in lost if one[2] > cut}
    whole = [d for d in damage if not d["tensor"]]
    assert [(d["start"], d["file"]) for d in whole] == [(cut, file)]


def test_verify_takes_the_newest_or_all(data, run):
    """By default the newest committed one; a save that was cut off is no damage."""
    two, four, six = steps(run).values()
    faulty.flip(two / "rank-00000.safetensors", -1)
    (four / "rank-00000.json").unlink()
    code, found = data("verify", run)
    assert (code, [c["state"] for c in found["checkpoints"]]) == (0, ["sound"])
    (six / "commit.json").unlink()
    (two / "notes.txt").write_text("mine")
    code, found = data("verify", run)
    assert (code, found["checkpoints"][0]["step"]) == (1, 4)
    code, found = data("verify", run, "--all")
    assert code == 1
    states = [c["state"] for c in found["checkpoints"]]
    assert states == ["damaged", "damaged", "unfinished"]
    assert found["checkpoints"][0]["foreign"] == ["notes.txt"]


def test_verify_of_no_commit_at_all_fails(tool, run):
    """Where nothing is committed there is nothing to call sound."""
    for folder in steps(run).values():
        (folder / "commit.json").unlink()
    code, out, err = tool("verify", run)
    assert (code, out) == (1, "")
    assert "none has a commit" in err


def test_prune_keeps_what_it_was_told(data, run):
    """Every 4th step and the newest stay; a dry run removes nothing."""
    words = "prune", run, "--last", 1, "--every", 4
    before = steps(run)
    code, found = data(*words, "--dry-run")
    assert (code, found["done"]) == (0, False)
    assert steps(run) == before
    code, found = data(*words, "--yes")
    assert (code, found["done"]) == (0, True)
    assert [c["step"] for c in found["removed"]] == [2]
    assert list(steps(run)) == [c["step"] for c in found["kept"]] == [4, 6]


def test_prune_keeps_the_best(tool, data, run):
    """The lowest loss stays; a metric that nobody saved is refused."""
    losses = {
        s: read(f, "commit.json")["metrics"]["loss"] for s, f in steps(run).items()
    }
    for direction, best in (("min", min), ("max", max)):
        words = "--last", 1, "--best", f"loss:{direction}", "--dry-run"
        _, found = data("prune", run, *words)
        kept = {c["step"] for c in found["kept"]}
        assert kept == {6, best(losses, key=losses.__getitem__)}
    code, _, err = tool("prune", run, "--last", 1, "--best", "los:min", "--yes")
    assert code == 1
    assert "'los'" in err
    assert "loss" in err
    assert len(steps(run)) == 3


def test_prune_never_leaves_a_damaged_one_alone(data, run):
    """The newest that counts is whole: one that lost a file does not stand for it."""
    (steps(run)[6] / "rank-00000.safetensors").unlink()
    _, found = data("prune", run, "--last", 1, "--yes")
    assert list(steps(run)) == [4, 6]
    assert [c["step"] for c in found["removed"]] == [2]


def test_prune_removes_the_commit_first(tool, run):
    """A removal that fails halfway leaves no checkpoint that looks whole."""
    with faulty.use(run.parent, fail_remove=2, once=False):
        code, _, err = tool("prune", "faulty://run", "--last", 1, "--yes")
    assert code == 1
    assert "remove" in err
    left = {s: (f / "commit.json").exists() for s, f in steps(run).items()}
    assert left == {2: False, 4: True, 6: True}
    assert (steps(run)[2] / "manifest.json").exists()


@pytest.mark.parametrize("step", [4, 6])
def test_export_writes_the_weights(data, run, tmp_path, step):
    """Other programs read the numbers that lie in the slices, whole and by name."""
    folder, out = steps(run)[step], tmp_path / "out"
    code, found = data("export", folder, out)
    files = {f.name: f.stat().st_size for f in out.iterdir()}
    assert code == 0
    assert {f["name"]: f["size"] for f in found["files"]} == files
    exported, held = load_file(out / "model.safetensors"), tensors(folder)
    assert {f"model.{n}" for n in exported} == {
        n for n in held if n.startswith("model.")
    }
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, held[f"model.{name}"], rtol=0, atol=0)


def test_export_in_another_dtype_and_several_files(data, run, tmp_path):
    """Words of the command reach the export."""
    words = "--dtype", "bf16", "--max-shard-size", "100B"
    _, found = data("export", run, tmp_path / "out", *words)
    weights = [f["name"] for f in found["files"] if f["name"].endswith(".safetensors")]
    assert len(weights) > 2
    dtypes = {
        t.dtype for name in weights for t in load_file(tmp_path / "out" / name).values()
    }
    assert dtypes == {torch.bfloat16}


def test_export_refuses_what_it_cannot_do(tool, run, tmp_path):
    """A dtype or size of no meaning is wrong use; a full folder is a failure."""
    for words in (["--dtype", "int3"], ["--max-shard-size", "big"]):
        code, _, err = tool("export", run, tmp_path / "out", *words)
        assert code == 2
        assert words[1] in err
    code, _, err = tool("export", run, steps(run)[4])
    assert code == 1
    assert "commit.json" in err


def test_the_tool_reads_object_stores(data, run):
    """Any fsspec URL is listed, shown and checked as a folder is."""
    with faulty.use(run.parent) as faults:
        _, found = data("ls", "faulty://run")
        assert [c["whole"] for c in found["checkpoints"]] == [True] * 3
        assert data("verify", "faulty://run", "--all")[0] == 0
        faults.flip_read = faults.reads + 3
        assert data("verify", "faulty://run")[0] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "COMMAND"),
        (["list", "x"], "'list'"),
        (["ls"], "URL"),
        (["ls", ""], "nothing"),
        (["ls", "a", "b"], "unrecognized arguments: b"),
        (["prune", "x", "--yes"], "--last"),
        (["prune", "x", "--last", "0", "--yes"], "'0'"),
        (["prune", "x", "--last", "1", "--best", "loss", "--yes"], "loss:min"),
        (["prune", "x", "--last", "1", "--yes", "--dry-run"], "--dry-run"),
        (["diff", "x"], "B"),
        (["ls", "nosuch://x"], "nosuch"),
    ],
)
def test_wrong_use_is_told_in_words(tool, words, said):
    """What cannot be meant ends in 2, with the words and what to write."""
    code, out, err = tool(*words)
    assert (code, out) == (2, "")
    assert err.startswith("accelx.checkpoint: ")
    assert said in err


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_a_url_of_nothing_fails(tool, tmp_path, command):
    """Where there is no checkpoint the tool says where it looked, and ends in 1."""
    code, out, err = tool(command, tmp_path / "typo")
    assert (code, out) == (1, "")
    assert f"{tmp_path}/typo" in err


def test_no_credential_is_printed(tool):
    """Neither a mistake in a command nor in a URL shows the secrets in it."""
    url = "nosuch://me:hunter2@host/run?token=hunter3"
    for words in (["ls", url], ["ls", "x", url], ["prune", url, "--best", url]):
        code, out, err = tool(*words)
        assert code == 2
        assert "hunter" not in out + err
        assert "host/run" in err


def test_ctrl_c_is_130(tool, run, monkeypatch):
    """An interrupt ends the tool without a traceback."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("accelx.saves.verify.digest", interrupted)
    assert tool("verify", run) == (130, "", "")


def start(*words, **more):
    """The tool as a program of its own."""
    return subprocess.run(
        [*TOOL, *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
        stdin=subprocess.DEVNULL,
        **more,
    )


LIGHT = """
import sys
from accelx.checkpoints.door import main
run, a, b = sys.argv[1:]
for words in (["ls", run], ["show", run], ["verify", run, "--all"], ["diff", a, b],
              ["prune", run, "--last", "2", "--dry-run"]):
    assert main(words) == 0, words
    assert "torch" not in sys.modules, words
    assert "numpy" not in sys.modules, words
if a != b:
    main(["diff", a, run])  # cut in another way
    assert "torch" in sys.modules
"""


def test_all_but_reading_a_diff_runs_without_torch(run):
    """ls, show, verify, prune and a diff by digests never import torch."""
    two, four = steps(run)[2], steps(run)[4]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, run, two, four],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


HELP = """
import sys
from accelx.checkpoints.door import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print(end.code, sorted({"torch", "rich", "fsspec", "attrs"} & set(sys.modules)))
"""


def test_help_imports_nothing_heavy():
    """`--help` costs Python's own start, argparse, and little more."""
    for words in (["--help"], ["prune", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", HELP, *words],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == "0 []"


WITHOUT_RICH = """
import sys
sys.modules["rich"] = None
from accelx.checkpoints.door import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_rich_json_is_left(run):
    """A missing extra is named before anything is read, and --json works without."""
    ends = {}
    for words in ([], ["--json"]):
        ends[len(words)] = subprocess.run(
            [sys.executable, "-c", WITHOUT_RICH, "ls", run, *words],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
    assert ends[0].returncode == 1
    assert "accelx[cli]" in ends[0].stderr
    assert "--json" in ends[0].stderr
    assert ends[1].returncode == 0
    assert len(json.loads(ends[1].stdout)["checkpoints"]) == 3


def test_a_pipe_gets_whole_rows(run):
    """What is no terminal is not cut to 80 columns, and has no colour."""
    done = start("ls", run)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    for folder, line in zip(
        steps(run).values(), done.stdout.splitlines()[2:], strict=True
    ):
        commit = read(folder, "commit.json")
        assert line.split()[0] == folder.name
        loss = float(line.split("loss=")[1].split()[0])
        assert math.isclose(loss, commit["metrics"]["loss"], rel_tol=1e-5)
        assert line.endswith("whole")


def test_a_reader_that_has_gone_is_no_error(run):
    """`show | head` ends quietly."""
    words = " ".join([*TOOL, "show", str(run)])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; ({words}; echo $? >&2) | true"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines() == ["0"]


def test_prune_refuses_to_ask_nobody(run):
    """Without a terminal and without --yes nothing is removed."""
    done = start("prune", run, "--last", 1)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--yes" in done.stderr
    assert len(steps(run)) == 3


@contextlib.contextmanager
def at_terminal(*words):
    """The tool with a terminal for its questions and progress: (process, terminal)."""
    own, theirs = pty.openpty()
    process = subprocess.Popen(
        [*TOOL, *map(str, words)],
        env=environment(TERM="xterm"),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield process, own
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
        os.close(own)


def shown(terminal, end):
    """What the terminal shows, up to `end` or the end of the program."""
    data = b""  # a read may end within a character
    while end is None or end.encode() not in data:
        try:
            data += os.read(terminal, 1 << 16)
        except OSError:  # the other end was closed
            break
    return data.decode()


@pytest.mark.parametrize(
    ("answer", "code", "left"),
    [("y", 0, [6]), ("", 1, [2, 4, 6]), (None, 130, [2, 4, 6])],
)
def test_prune_asks_a_person(run, answer, code, left):
    """It says what would go, and removes it for a yes alone; None is Ctrl-C."""
    with at_terminal("prune", run, "--last", 1) as (process, terminal):
        asked = shown(terminal, "[y/N]")
        for step, folder in steps(run).items():
            assert (folder.name in asked) == (step != 6)
        if answer is None:
            process.send_signal(signal.SIGINT)
        else:
            os.write(terminal, f"{answer}\n".encode())
        assert process.wait(LONG) == code
    assert list(steps(run)) == left


def test_progress_is_shown_on_a_terminal_only(run):
    """A bar on the standard error, which is a terminal; the table is as in a pipe."""
    with at_terminal("verify", run) as (process, terminal):
        bar = shown(terminal, None)
        table = process.stdout.read()
        assert process.wait(LONG) == 0
    quiet = start("verify", run)
    assert "verifying" in bar
    assert quiet.stderr == ""
    assert table == quiet.stdout
