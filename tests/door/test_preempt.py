"""A signal in any phase: all ranks save the same step, leave, and go on exactly."""

import json
import signal
import time

import pytest

import accelx as ax
from tests.door.spawning import begun, launch

pytestmark = pytest.mark.door
SAVED, STOP = 75, 8


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Every loss of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    out = folder / "out.json"
    words = ("preempted.py", folder / "run", "none", out)
    done = launch("-n", 2, *words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    step, losses = json.loads(out.read_text())
    assert step == STOP
    return losses


def sent(number, phase, folder, one=False):
    """Start on two ranks, send a signal in a phase: exit code, seconds, stderr."""
    words = ("preempted.py", folder / "run", phase, folder / "first.json")
    with begun("-n", 2, *words, lines=2, OMP_NUM_THREADS="1") as (process, _):
        began = time.monotonic()
        process.send_signal(number)
        code = process.wait(30)
        return code, time.monotonic() - began, process.stderr.read()


@pytest.mark.parametrize(
    ("number", "phase"),
    [
        (signal.SIGTERM, "train"),
        (signal.SIGUSR1, "train"),
        (signal.SIGTERM, "evaluate"),
        (signal.SIGTERM, "save"),
    ],
)
def test_a_signal_saves_and_the_next_run_goes_on(number, phase, tmp_path, undisturbed):
    """Exit code 75 within seconds; what follows has the losses of the undisturbed."""
    code, seconds, said = sent(number, phase, tmp_path)
    assert code == SAVED, said
    assert seconds < 10
    assert f"accelx: {number.name}: step" in said
    assert said.count("run it again to go on") >= 1
    step, losses = json.loads((tmp_path / "first.json").read_text())
    newest = ax.latest(tmp_path / "run")
    assert newest is not None
    # the step that the signal ended in is saved, and never returned to be noted
    assert newest.step in (step, step + 1)
    assert newest.step < STOP
    assert losses == undisturbed[:step]
    again = tmp_path / "again.json"
    words = ("preempted.py", tmp_path / "run", "none", again)
    done = launch("-n", 2, *words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    last, rest = json.loads(again.read_text())
    assert last == STOP
    assert rest == undisturbed[newest.step :], "to the bit, on the same ranks"


def test_a_run_that_reaches_no_boundary_says_where_it_is(tmp_path):
    """After `grace` it leaves unsaved with 128 + signal, and its stack."""
    code, seconds, said = sent(signal.SIGTERM, "stuck", tmp_path)
    assert code == 128 + signal.SIGTERM
    assert seconds < 10
    assert "no step, batch or save ended within 0.7 s" in said
    assert 'preempted.py", line' in said
    newest = ax.latest(tmp_path / "run")
    assert newest is not None
    assert newest.step == 3, "what was saved before is there"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"signals": ("SIGKILL",)}, "can be caught, got 'SIGKILL'"),
        ({"signals": "TERM"}, "got 'TERM'; write signals="),
        ({"grace": 0}, "seconds, more than 0, got 0"),
    ],
)
def test_what_cannot_be_heard_is_refused(given, words):
    """At once, with what to write."""
    with pytest.raises(ValueError, match=words):
        ax.on_preempt(ax.Env(), "/tmp/x", **given)
