"""The examples, as a reader starts them: the same numbers on any ranks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.door.spawning import ROOT, environment, launch

pytestmark = pytest.mark.door

EXAMPLES = ROOT / "examples"
LIGHT = (
    "pure_step.py",
    "four_lines.py",
    "custom_pass.py",
    "distil.py",
    "gan.py 60",
    "ppo.py 3",
)
GPT = "gpt.py --steps 2 --batch 6 --every 9 --sample 4"
TRANSFORMERS = "finetune_transformers.py --steps 6"


def printed(ranks, *commands):
    """What each program prints on so many ranks, by its file's name."""
    words = ("-n", ranks, "several.py", *commands)
    done = launch(*words, timeout=150, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^== (.+)\n", done.stdout, flags=re.MULTILINE)
    return {
        Path(p).name: text for p, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def examples(*commands):
    return [f"{EXAMPLES}/{command}" for command in commands]


def numbers(text):
    """The numbers of the lines that give results: the last two of them."""
    lines = dict.fromkeys(text.strip().splitlines())
    last = [line for line in lines if re.search(r"\d\.\d", line)]
    return [float(x) for line in last[-2:] for x in re.findall(r"\d+\.\d+", line)]


def same(text, judge):
    """Equal up to what rounding can do to the last printed digit."""
    found, wanted = numbers(text), numbers(judge)
    assert wanted
    return found == pytest.approx(wanted, abs=2e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Everything in one process: the judge."""
    out = tmp_path_factory.mktemp("gpt")
    return printed(1, *examples(*LIGHT, f"{GPT} --out {out}", TRANSFORMERS))


@pytest.fixture(scope="module", params=[2, 3])
def together(request):
    """The light examples on several ranks."""
    return printed(request.param, *examples(*LIGHT))


@pytest.mark.parametrize("name", [command.split()[0] for command in LIGHT])
def test_an_example_prints_the_same_on_any_ranks(name, together, alone):
    """The results of several ranks are those of one process."""
    text = together[name]
    assert same(text, alone[name]), f"{text}\none process:\n{alone[name]}"


def test_a_transformer_trains_the_same_sharded(alone):
    """fsdp2 on two ranks and ragged microbatches give the numbers of one process."""
    more = "--kind fsdp2 --accumulate 3"
    text = printed(2, *examples(f"{TRANSFORMERS} {more}"))["finetune_transformers.py"]
    judge = alone["finetune_transformers.py"]
    assert same(text, judge), f"{text}\none process:\n{judge}"


def test_the_main_job_draws_writes_and_agrees(alone, tmp_path):
    """gpt.py, sharded on two ranks: a bar, a PNG and one process's losses."""
    words = f"{GPT} --kind fsdp2 --accumulate 2 --out {tmp_path}".split()
    done = launch(
        "-n", 2, EXAMPLES / words[0], *words[1:], timeout=120, OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stderr
    assert same(done.stdout, alone["gpt.py"]), done.stdout
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.count("The model writes") == 1
    assert done.stderr.count("  0%|") == 1, "one bar, on one rank"


def test_the_main_job_goes_on_from_what_it_saved(alone, tmp_path):
    """Left after a step on two ranks and gone on on three: one process's losses."""
    words = f"{GPT} --kind fsdp2 --out {tmp_path} --save {tmp_path}/saved".split()
    runs = (2, ["--until", 1], "left at step 1"), (3, [], "going on at step 1")
    for ranks, more, said in runs:
        file, *rest = [EXAMPLES / words[0], *words[1:], *more]
        done = launch("-n", ranks, file, *rest, timeout=120, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
    assert same(done.stdout, alone["gpt.py"]), done.stdout


def test_a_disturbed_run_on_s3_ends_like_an_undisturbed_one(tmp_path):
    """resume.py: SIGTERM in training and in evaluation, on 2, 3 and 1 ranks."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "resume.py", "--out", tmp_path],
        capture_output=True,
        text=True,
        env=environment(OMP_NUM_THREADS="1"),
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert "exit codes [75, 75, 0]" in done.stdout
    gap = re.search(r"difference from the undisturbed run: ([\d.]+)", done.stdout)
    assert float(gap[1]) <= 2e-4
    written = re.search(r"written by the disturbed runs: (\d+)", done.stdout)
    assert int(written[1]) >= 58, "a run that did nothing differs in nothing"


def test_each_example_is_run_here():
    """No example is left out."""
    run = {command.split()[0] for command in (*LIGHT, GPT, TRANSFORMERS)}
    run |= {"resume.py", "ray_train.py"}  # the latter in test_cluster.py
    assert run == {path.name for path in EXAMPLES.glob("*.py")}


def test_four_lines_are_all(alone, tmp_path):
    """Without its four marked lines the example is plain torch, and prints the same."""
    lines = (EXAMPLES / "four_lines.py").read_text().splitlines()
    marked = [line for line in lines if line.endswith("# accelx")]
    assert len(marked) == 4
    plain = tmp_path / "plain.py"
    plain.write_text("\n".join(line for line in lines if line not in marked))
    assert "ax." not in plain.read_text()
    done = subprocess.run(
        [sys.executable, plain], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone["four_lines.py"]


def test_ranks_that_train_apart_print_something_else(alone, tmp_path):
    """The control: ranks with labels or a model of their own are told apart.

    An order of their own they cannot have: feed compares it.
    """
    edits = {
        "pure_step.py": ("tensor(labels)", "tensor(labels).roll(env.rank)"),
        "four_lines.py": ("ax.shard_model(env)(model)", "model"),
    }
    for name, edit in edits.items():
        source = (EXAMPLES / name).read_text()
        assert edit[0] in source
        (tmp_path / name).write_text(source.replace(*edit))
    broken = printed(2, *(str(tmp_path / name) for name in edits))
    for name in edits:
        assert not same(broken[name], alone[name]), name
