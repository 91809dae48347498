"""A signal in any phase of a run ends all of it, and loses nothing that was saved."""

import signal
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest

from tests.door.spawning import LONG, SCRIPTS, command, environment
from tests.unit.test_leaks import load

pytestmark = [pytest.mark.door, pytest.mark.timeout(4 * LONG)]
PHASES = ("start", "compile", "train", "evaluate", "save")
CODES = {"SIGINT": 130, "SIGTERM": 143}


def told(phase, name, folder):
    """Runs up to a phase, sends a signal; code, standard error, what is left."""
    mark = uuid.uuid4().hex
    words = command("-n", 2, "--grace", 5, "phases.py", phase, folder)
    with subprocess.Popen(
        words,
        cwd=SCRIPTS,
        env=environment(ACCELX_SUITE=mark),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            seen = 0
            for line in process.stdout:
                seen += line.strip() == f"in {phase}"
                if seen == 2:
                    break
            process.send_signal(signal.Signals[name])
            _, errors = process.communicate(timeout=LONG)
        finally:
            process.kill()
    return seen, process.returncode, errors, outlived(mark)


def outlived(mark):
    """What is left of a run, if it is not at its end just now."""
    limit = time.monotonic() + 60
    while (left := load().survivors(mark)) and time.monotonic() < limit:
        time.sleep(0.05)
    return left


@cache
def ends(folder):
    """Every phase with either signal, three at a time."""
    cases = [(phase, name) for phase in PHASES for name in CODES]
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda c: told(*c, f"{folder}/{c[0]}-{c[1]}"), cases)
        return dict(zip(cases, found, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where runs save."""
    return tmp_path_factory.mktemp("phases")


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_ends_all_ranks_in_each_phase(folder, phase, name):
    """With the code of the signal, without a traceback; no process outlives it."""
    seen, code, errors, left = ends(folder)[phase, name]
    assert seen == 2
    assert code == CODES[name], errors
    assert "Traceback" not in errors
    assert left == []


def test_what_was_saved_before_is_whole_and_the_next_run_goes_on(folder):
    """Also where the signal came in the middle of another save."""
    ends(folder)
    place = f"{folder}/save-SIGTERM"
    done = subprocess.run(
        command("-n", 2, "phases.py", "none", place),
        cwd=SCRIPTS,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n"))[1:3] == ["at 0", "at 0"]
    assert done.stdout.count("done 1") == 2
