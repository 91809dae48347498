"""A signal in any phase: all ranks save the same step, leave, and go on exactly."""

import json
import signal

import pytest

import accelx as ax
from tests.door.spawning import LONG, begun, forked

pytestmark = [pytest.mark.door, pytest.mark.timeout(4 * LONG)]
SAVED, STOP = 75, 8


def sent(number, phase, folder):
    """Start on two ranks, send a signal in a phase: exit code, stderr."""
    words = ("preempted.py", folder / "run", phase, folder / "first.json")
    words = ("-n", 2, "--grace", LONG, *words)
    with begun(*words, lines=2, OMP_NUM_THREADS="1") as (process, _):
        process.send_signal(number)
        _, said = process.communicate(LONG)
        return process.returncode, said


SENT = {
    "train": signal.SIGTERM,
    "train, USR1": signal.SIGUSR1,
    "evaluate": signal.SIGTERM,
    "save": signal.SIGTERM,
}


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """case -> folder, exit code and stderr of a run that a signal ended."""
    folders = {case: tmp_path_factory.mktemp("left") for case in SENT}
    return {
        case: (folders[case], *sent(number, case.split(",")[0], folders[case]))
        for case, number in SENT.items()
    }


@pytest.fixture(scope="module")
def rest(tmp_path_factory, left):
    """case -> last step, losses from where it was left on; "" is a run of its own.

    One launch for all of them.
    """
    folders = {"": tmp_path_factory.mktemp("whole")}
    folders |= {case: folder for case, (folder, *_) in left.items()}
    words = [f"preempted.py {f}/run none {f}/again.json" for f in folders.values()]
    newest = {case: ax.latest(folder / "run") for case, folder in folders.items()}
    done = forked("-n", 2, "several.py", *words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return {
        case: (newest[case], *json.loads((folder / "again.json").read_text()))
        for case, folder in folders.items()
    }


@pytest.mark.parametrize("case", SENT)
def test_a_signal_saves_and_the_next_run_goes_on(case, left, rest):
    """Exit code 75; what follows has the losses of the undisturbed."""
    folder, code, said = left[case]
    assert code == SAVED, said
    assert f"accelx: {SENT[case].name}: step" in said
    assert said.count("run it again to go on") >= 1
    nothing, stop, undisturbed = rest[""]
    assert (nothing, stop) == (None, STOP)
    step, losses = json.loads((folder / "first.json").read_text())
    newest, last, losses_after = rest[case]
    assert newest is not None
    # the step that the signal ended in is saved, and never returned to be noted
    assert newest.step in (step, step + 1)
    assert newest.step < STOP
    assert losses == undisturbed[:step]
    assert last == STOP
    assert losses_after == undisturbed[newest.step :], "to the bit, on the same ranks"


def test_a_run_that_reaches_no_boundary_says_where_it_is(tmp_path):
    """After `grace` it leaves unsaved with 128 + signal, and its stack."""
    code, said = sent(signal.SIGTERM, "stuck", tmp_path)
    assert code == 128 + signal.SIGTERM
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
