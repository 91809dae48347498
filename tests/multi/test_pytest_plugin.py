"""The fixture `ranks` brings results, failures, and stacks of ranks that hang."""

import subprocess
import sys
import threading
import time

import pytest

from accelx import comm, pytest_plugin
from accelx.pytest_plugin import run_with_stacks
from accelx.testing import RankError
from tests.door.spawning import environment

pytestmark = pytest.mark.multi

FILE = """\
import time
import accelx as ax

def test_fine(ranks):
    launch = ranks(2, timeout=60)
    assert launch(lambda env, x: ax.reduce(env, env.rank + x, "sum"))(10) == [21, 21]

def lonely(env):
    if env.main:
        ax.barrier(env)
    else:
        time.sleep(60)

def test_hangs(ranks):
    ranks(2, timeout=SECONDS)(lonely)()

def test_hangs_by_the_setting(ranks):
    ranks(2)(lonely)()

def wrong(env):
    assert env.rank == 0, "not rank 0"

def test_fails(ranks):
    ranks(2, timeout=60)(wrong)()
"""
LIMITS = (3, 12, 48)  # seconds; a busy machine starts no rank in the first of them


@pytest.fixture
def outside(tmp_path):
    """Run pytest with the plug-in on a file of a user's own."""

    def call(seconds):
        (tmp_path / "test_own.py").write_text(FILE.replace("SECONDS", str(seconds)))
        (tmp_path / "pytest.ini").write_text(f"[pytest]\naccelx_timeout = {seconds}\n")
        words = ["-p", "accelx.pytest_plugin", "-q", "--color=no", "--tb=short"]
        return subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            cwd=tmp_path,
            env=environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"),
            capture_output=True,
            text=True,
            timeout=170,
        )

    return call


def test_a_users_own_tests_run_with_it(outside):
    """One passes; two hang and show where; one fails with its own message."""
    for limit in LIMITS:
        done = outside(limit)
        if done.stdout.count("in lonely") >= 4:  # of two ranks in two tests
            break
    assert "3 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("in lonely") >= 4
    late = f"ranks [0, 1] of 2 had not finished after {limit} s"
    assert done.stdout.count(late) >= 2
    assert "rank 1 of 2 failed" in done.stdout
    assert "not rank 0" in done.stdout


def test_a_setting_that_is_none_is_refused(outside):
    """In the words of the setting, before a test is run."""
    done = outside("soon")
    assert done.returncode == 4
    assert "accelx_timeout wants a number of seconds above 0, got 'soon'" in done.stderr


def waiting(env):
    """Rank 0 waits in a collective that rank 1 does not come to."""
    if env.main:
        comm.barrier(env)
    else:
        asleep()


def asleep():
    """Where rank 1 is found."""
    time.sleep(60)


def hung(n, fn, *places):
    """What is said of ranks that hang once they have come to these places."""
    for limit in LIMITS:
        with pytest.raises(RankError) as failed:
            run_with_stacks(n, timeout=limit)(fn)()
        said = str(failed.value)
        assert f"had not finished after {limit} s" in said
        if all(place in said for place in places):
            break
    return said


def test_a_deadlock_shows_where_each_rank_stands():
    """The collective on one side, the cause on the other, and nothing of ours."""
    said = hung(2, waiting, "in barrier", "in asleep")
    zero, one = said.split("rank 1 stands at:")
    assert "rank 0 stands at:" in zero
    assert "in barrier" in zero
    assert "in asleep" in one
    assert "in barrier" not in one
    assert said.count("in waiting") == 2
    assert "accelx/pytest_plugin.py" not in said
    assert "/_pytest/" not in said


def test_a_rank_with_threads_is_shown_by_its_main_one():
    """Other threads of the rank are left out."""

    def busy(env):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        asleep()

    said = hung(1, busy, "in asleep")
    assert "in asleep" in said
    assert "in busy" in said
    assert "in run" not in said


def test_what_ends_in_time_is_as_without_it():
    """Results come in rank order, failures with their traceback and no stacks."""
    assert run_with_stacks(2, timeout=30.0)(lambda env, x: x + env.rank)(5) == [5, 6]

    def failing(env):
        if env.rank:
            raise KeyError("mine")

    with pytest.raises(RankError) as failed:
        run_with_stacks(2, timeout=30.0)(failing)()
    assert "KeyError: 'mine'" in str(failed.value)
    assert "stands at" not in str(failed.value)


DUMP = """\
Timeout (0:00:01)!
Thread 0x0002 (most recent call first):
  File "threading.py", line 3 in wait

Thread 0x0001 (most recent call first):
  File "own.py", line 7 in inner
  File "own.py", line 5 in outer
  File "{own}", line 99 in _watched
  File "testing.py", line 145 in _attempt
"""


def test_of_a_dump_the_programs_own_frames_are_shown():
    """Of the main thread, which comes last, down to the frame that called it."""
    dump = DUMP.format(own=pytest_plugin.__file__)
    assert pytest_plugin._program_part(dump) == [
        '  File "own.py", line 7 in inner',
        '  File "own.py", line 5 in outer',
    ]
    assert pytest_plugin._program_part("") == []


def test_a_rank_that_never_came_is_told_beside_those_that_did(tmp_path):
    """And where no rank was late, nothing is added."""
    (tmp_path / "0").write_text(DUMP.format(own=pytest_plugin.__file__))
    told = pytest_plugin._stacks(tmp_path, 2).splitlines()
    assert told[0] == "rank 0 stands at:"
    assert told[-1] == "rank 1 has not come to its function"
    (tmp_path / "0").write_text("")
    (tmp_path / "1").write_text("")
    assert pytest_plugin._stacks(tmp_path, 2) == ""
    assert pytest_plugin._stacks(tmp_path, 5) == ""


def test_axes_and_arguments_reach_the_ranks():
    """As with accelx.testing.run itself."""

    def told(env, *args):
        return [(axis.name, axis.size) for axis in env.axes], args

    each = run_with_stacks(2, timeout=30.0, axes="replicate=1,shard=2")(told)(1, "two")
    assert each == [([("replicate", 1), ("shard", 2)], (1, "two"))] * 2


def dumped_after(path, fn, seconds=0.2):
    """What is dumped after a call that has ended before it was time for the dump."""
    at = time.monotonic() + seconds
    ended = fn(at)
    if time.monotonic() > at - seconds / 2:  # a busy machine: the call took longer
        return dumped_after(path, fn, 2 * seconds)
    time.sleep(max(0.0, at - time.monotonic()) + 0.2)
    return ended, path.read_text()


def test_the_dump_is_called_off_where_a_function_returns(tmp_path):
    """What a rank does afterwards, its goodbye say, is not dumped."""
    path = tmp_path / "0"

    def returns(at):
        return pytest_plugin._watched(path, at, lambda x: x + 1, 1)

    def raises(at):
        with pytest.raises(KeyError):
            pytest_plugin._watched(path, at, {}.__getitem__, 1)

    assert dumped_after(path, returns) == (2, "")
    assert dumped_after(path, raises) == (None, "")


def test_without_the_fixture_nothing_of_torch_is_imported():
    """The plug-in is loaded with every pytest of its environment: it costs nothing."""
    code = (
        "import sys, accelx.pytest_plugin\n"
        "print([m for m in ('torch', 'attrs', 'pytest', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
