"""The examples, as a reader starts them: the same numbers on any ranks."""

import re
import subprocess
import sys

import pytest

from tests.door.spawning import ROOT, environment, launch

LONG = 400  # seconds: eight programs, each an import of torch and more
pytestmark = [pytest.mark.door, pytest.mark.timeout(4 * LONG)]

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
APART = {  # what to change so that ranks have labels or a model of their own
    "pure_step.py": ("tensor(labels)", "tensor(labels).roll(env.rank)"),
    "four_lines.py": ("ax.shard_model(env)(model)", "model"),
}


def printed(ranks, commands):
    """What each program prints on so many ranks, by its key; what all complain of."""
    words = ("-n", ranks, "several.py", *commands.values())
    done = launch(*words, timeout=LONG, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    texts = re.split(r"^== .+\n", done.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(commands, texts, strict=True)), done.stderr


def examples(*commands):
    """file -> how it is started."""
    return {command.split()[0]: f"{EXAMPLES}/{command}" for command in commands}


def edited(folder, name, edit):
    """A copy of an example with another text in it: its file."""
    source = (EXAMPLES / name).read_text()
    assert edit[0] in source
    (folder / name).write_text(source.replace(*edit))
    return str(folder / name)


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
def plain(tmp_path_factory):
    """The four lines' example without them."""
    lines = (EXAMPLES / "four_lines.py").read_text().splitlines()
    path = tmp_path_factory.mktemp("plain") / "plain.py"
    path.write_text("\n".join(line for line in lines if not line.endswith("# accelx")))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory, plain):
    """Everything in one process: the judge."""
    out = tmp_path_factory.mktemp("gpt")
    commands = examples(*LIGHT, f"{GPT} --out {out}", TRANSFORMERS)
    return printed(1, commands | {"plain": str(plain)})[0]


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    """Where the main job draws, and how it is started so that it can go on."""
    out = tmp_path_factory.mktemp("sharded")
    return out, f"{EXAMPLES}/{GPT} --kind fsdp2 --out {out}/later --save {out}/saved"


@pytest.fixture(scope="module")
def two(tmp_path_factory, gpt):
    """Everything on two ranks, sharded where it can be, and what is to differ."""
    commands = examples(
        *LIGHT,
        f"{TRANSFORMERS} --kind fsdp2 --accumulate 3",
        f"{GPT} --kind fsdp2 --accumulate 2 --out {gpt[0]}",
    )
    folder = tmp_path_factory.mktemp("apart")
    apart = {f"apart {n}": edited(folder, n, edit) for n, edit in APART.items()}
    return printed(2, commands | {"left": f"{gpt[1]} --until 1"} | apart)


@pytest.fixture(scope="module")
def three(gpt, two):
    """The light examples on three ranks, and what two of them have left."""
    return printed(3, examples(*LIGHT) | {"going on": gpt[1]})


@pytest.mark.parametrize("ranks", ["two", "three"])
@pytest.mark.parametrize("name", [command.split()[0] for command in LIGHT])
def test_an_example_prints_the_same_on_any_ranks(name, ranks, alone, request):
    """The results of several ranks are those of one process."""
    text = request.getfixturevalue(ranks)[0][name]
    assert same(text, alone[name]), f"{text}\none process:\n{alone[name]}"


def test_a_transformer_trains_the_same_sharded(alone, two):
    """fsdp2 on two ranks and ragged microbatches give the numbers of one process."""
    text, judge = (one["finetune_transformers.py"] for one in (two[0], alone))
    assert same(text, judge), f"{text}\none process:\n{judge}"


def test_the_main_job_draws_writes_and_agrees(alone, two, gpt):
    """gpt.py, sharded on two ranks: a bar, a PNG and one process's losses."""
    text, errors = two[0]["gpt.py"], two[1]
    assert same(text, alone["gpt.py"]), text
    assert (gpt[0] / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("The model writes") == 1
    # where nothing happens for seconds tqdm shows a bar once more, with its time
    begun = re.findall(r"  0%\|[^\r\n]*\[00:00<", errors)
    assert len(begun) == 2, "one bar each time, on one rank"


def test_the_main_job_goes_on_from_what_it_saved(alone, two, three):
    """Left after a step on two ranks and gone on on three: one process's losses."""
    text = three[0]["going on"]
    assert "left at step 1" in two[0]["left"]
    assert "going on at step 1" in text
    assert same(text, alone["gpt.py"]), text


def test_a_disturbed_run_on_s3_ends_like_an_undisturbed_one(tmp_path):
    """resume.py: SIGTERM in training and in evaluation, on 2, 3 and 1 ranks."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "resume.py", "--out", tmp_path],
        capture_output=True,
        text=True,
        env=environment(OMP_NUM_THREADS="1"),
        timeout=LONG,
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
    run |= {"resume.py"}
    run |= {"ray_train.py"}  # in test_cluster.py
    run |= {"three_d.py"}  # in tests/multi/test_three_d.py
    assert run == {path.name for path in EXAMPLES.glob("*.py")}


def test_four_lines_are_all(alone, plain):
    """Without its four marked lines the example is plain torch, and prints the same."""
    lines = (EXAMPLES / "four_lines.py").read_text().splitlines()
    left = plain.read_text()
    assert len(lines) - len(left.splitlines()) == 4
    assert "ax." not in left
    assert alone["plain"] == alone["four_lines.py"]


@pytest.mark.parametrize("name", APART)
def test_ranks_that_train_apart_print_something_else(alone, two, name):
    """The control: ranks with labels or a model of their own are told apart.

    An order of their own they cannot have: feed compares it.
    """
    assert not same(two[0][f"apart {name}"], alone[name])
