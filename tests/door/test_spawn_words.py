"""What the launcher's command line says to a reader, without importing torch."""

import subprocess
import sys

import pytest

from tests.door.spawning import SCRIPTS, command, environment, launch

pytestmark = pytest.mark.door


def modules_of(*words):
    """Exit code of the launcher, and the names of all modules that it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command(*words)[1:]],
        cwd=SCRIPTS,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = done.stderr.splitlines()
    return done.returncode, {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize("words", [["--help"], ["-n", "2", "--print", "meet.py"]])
def test_torch_is_not_imported_to_answer(words):
    """Help and the plan come from the standard library and attrs."""
    code, modules = modules_of(*words)
    assert code == 0
    assert "argparse" in modules
    assert not modules & {"torch", "numpy"}


def test_help_is_answered_before_the_launcher_is_imported():
    """Not even attrs is imported for it."""
    assert not modules_of("--help")[1] & {"attrs", "attr", "typing", "pickle"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-n", "0", "meet.py"], ["1 or more", "'0'", "-n 2", "-n auto"]),
        (["-n", "x", "meet.py"], ["1 or more", "'x'", "-n 2", "-n auto"]),
        (["meet.py"], ["required: -n", "--help"]),
        (["-n", "2"], ["required: script"]),
        (["-n", "2", "meat.py"], ["meat.py", "not there", "did you mean meet.py?"]),
        (["-n", "2", "meet"], ["did you mean meet.py?"]),
        (["-n", "2", "zzz.py"], ["zzz.py", "not there", "nothing like it"]),
        (["-n", "2", "pack"], ["'pack' is a folder", "train.py"]),
        (["-n", "2", "pack.job"], ["not there", "write -m pack.job"]),
        (["-n", "2", "-m", "meet.py"], ["'meet.py' is a file", "leave -m out"]),
        (["-n", "2", "-m", "pack.jab"], ["'pack.jab' is not found", "as `import`"]),
        (["-n", "2", "--grace", "-1", "meet.py"], ["0 or more", "'-1'", "--grace 30"]),
        (
            ["-n", "2", "--log-dir", "meet.py", "meet.py"],
            ["'meet.py'", "--log-dir logs"],
        ),
        (["-n", "2", "--grce", "5", "meet.py"], ["--grce", "did you mean --grace?"]),
        (["-n", "2", "--config", "no.toml", "meet.py"], ["got 'no.toml'", "No such"]),
    ],
)
def test_bad_input_is_told_what_to_write(words, said):
    """Exit code 2, and a message with what was wanted, what came, what to write."""
    done = launch(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert not [word for word in said if word not in done.stderr], done.stderr


def test_print_shows_every_setting_and_starts_nothing(tmp_path):
    """The words of the command line come back with their source; no folder is made."""
    logs = tmp_path / "logs"
    words = ("-n", 3, "--print", "--log-dir", logs, "ends.py", "--grace", "raise")
    done = launch(*words, OMP_NUM_THREADS="7")
    assert done.returncode == 0
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert "command line" in rows["num_ranks"]
    assert "ends.py --grace raise" in rows["script"]  # the script's, not ours
    assert "default" in rows["grace"]
    assert rows["OMP_NUM_THREADS"].endswith("environment")
    assert {"MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "cpus", "gpus"} <= {
        *rows
    }
    assert not logs.exists()


def test_print_names_the_file_and_the_variable_of_a_setting(tmp_path):
    """What stands in a folder's accelx.toml needs no word on the command line."""
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('started')")
    config = tmp_path / "accelx.toml"
    config.write_text("num_ranks = 3\ngrace = 9\ntimeout = 60\n")
    done = launch(*("--grace", 5, "--config", config, "--print"), script)
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    assert rows["num_ranks"] == ["num_ranks", "3", str(config)]
    assert rows["grace"] == ["grace", "5", "s", "command", "line"]
    assert rows["timeout"] == ["timeout", "60", "s", str(config)]
    assert rows["config"] == ["config", str(config), "command", "line"]
    started = launch("--config", config, script, ACCELX_NUM_RANKS="1")
    assert "sys.exit('started')" in started.stderr  # the control: without --print


def test_a_syntax_error_is_shown_once(tmp_path):
    """The script is compiled once for all ranks, before any of them starts."""
    script = tmp_path / "wrong.py"
    script.write_text("def work(:\n    pass\n")
    done = launch("-n", 8, script)
    assert done.returncode == 1
    assert done.stderr.count("SyntaxError") == 1
    assert f'File "{script}", line 1' in done.stderr
