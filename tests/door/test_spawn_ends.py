"""How a run of several ranks ends, well or badly, and what it leaves behind."""

import json
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.door.spawning import LONG, begun, together

pytestmark = pytest.mark.door
HOST = socket.gethostname()


def runs(pid):
    """Whether a process is there and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # also in between
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def gone(pids, seconds=60):
    """Whether all these processes end; what stays would stay for minutes."""
    pids, limit = list(pids), time.monotonic() + seconds
    while any(map(runs, pids)) and time.monotonic() < limit:
        time.sleep(0.02)
    return not any(map(runs, pids))


WAYS = {
    "raise": (1, "ZeroDivisionError: division by zero"),
    "exit": (3, r"sys.exit\(3\)"),
    "words": (1, r"sys.exit\('no data in here'\)"),
    "_exit": (7, r"os._exit\(7\), or native code's exit, without an exception"),
    "kill": (137, r"killed by SIGKILL \(.*kill -9.* memory.*; peak 0.\d GiB\)"),
    "fault": (139, r"killed by SIGSEGV \(a fault in native code\)"),
}
MEETINGS = [f"meeting {number}" for number in range(15)]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A folder that is not there yet."""
    return tmp_path_factory.mktemp("a") / "new" / "logs"


@pytest.fixture(scope="module")
def ended(logs):
    """How each run ended, well or badly: five at a time."""
    jobs = {way: ("-n", 3, "ends.py", way, 1) for way in WAYS}
    jobs["early"] = ("-n", 2, "ends.py", "early", 1)
    jobs["stuck"] = ("-n", 3, "--grace", 0.5, "stuck.py")
    jobs["logged"] = ("-n", 2, "--log-dir", logs, "ends.py", "raise", 1)
    jobs |= dict.fromkeys(MEETINGS, ("-n", 2, "meet.py"))
    return together(jobs, at_once=5)


@pytest.mark.parametrize("way", WAYS)
def test_the_first_failing_rank_has_the_last_word(way, ended):
    """Its rank, host and reason, once; the others' echoes are not shown."""
    (code, said), done = WAYS[way], ended[way]
    assert done.returncode == code
    lines = done.stderr.splitlines()
    assert re.fullmatch(f"rank 1 on {HOST} failed: {said}", lines[0]), lines[0]
    assert lines[-1] == "2 ranks stopped because of it"
    assert " by peer" not in done.stderr
    traced = 'ends.py", line' in done.stderr
    assert traced == (way in ("raise", "fault"))
    at = re.findall(r"^at ends.py:\d+, in <lambda>", done.stderr, re.MULTILINE)
    assert len(at) == (way in ("exit", "words", "fault"))  # a traceback says it itself
    assert "accelx" not in done.stderr  # its own frames say nothing
    assert gone([int(done.stdout)]), "what the rank started has outlived it"


def test_a_rank_that_left_early_is_named(ended):
    """Exit code 0 of one rank is what the others' lost connection comes from."""
    done = ended["early"]
    assert done.returncode == 1
    assert "rank 0 on" in done.stderr
    assert re.search("(closed|reset) by peer", done.stderr)
    assert done.stderr.splitlines()[-1] == "rank 1 had ended before, with exit code 0"


def test_ranks_that_do_not_heed_are_killed(ended):
    """After a failure comes SIGTERM, then SIGKILL; the reason stays the first."""
    done = ended["stuck"]
    assert done.returncode == 1
    assert "rank 0 has had enough" in done.stderr
    assert "2 ranks stopped because of it" in done.stderr
    assert "ranks 1, 2 did not end in time and had to be killed" in done.stderr
    assert gone(map(int, done.stdout.split()))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_reaches_each_rank_once(name):
    """Handled by the ranks it ends well, also if it is repeated at once."""
    words = ("-n", 2, "signals.py", "count")
    # so that it does not matter how soon this process gets to send the second
    with begun(*words, lines=2, changes={"repeat": 600}) as (process, _):
        for _ in range(2):  # as from a terminal and from a wrapper around the launcher
            process.send_signal(signal.Signals[name])
        out, errors = process.communicate(timeout=LONG)
        assert out.splitlines() == [f"got {name}"] * 2
        assert process.returncode == 0
        assert errors.splitlines()[1:] == []


@pytest.mark.parametrize(
    ("how", "name", "code"),
    [("default", "SIGINT", 130), ("default", "SIGTERM", 143), ("choose", "SIGTERM", 5)],
)
def test_the_exit_code_says_how_ranks_took_a_signal(how, name, code):
    """128 + signal where it ended them, or the code that they chose; no traceback."""
    with begun("-n", 2, "signals.py", how, lines=2) as (process, _):
        process.send_signal(signal.Signals[name])
        _, errors = process.communicate(timeout=LONG)
        assert process.returncode == code
        assert re.fullmatch(f"accelx.spawn: {name}: waiting up to 30 s .*\n", errors)


def test_sigusr1_is_passed_on_and_the_second_ctrl_c_kills():
    """A notice ends nothing; an impatient user is not kept waiting for the grace."""
    with begun("-n", 2, "signals.py", "ignore", lines=2) as (process, lines):
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGINT)
        heard = process.stderr.readline()
        time.sleep(1.2)  # less than a second apart they would be one
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LONG)
        assert process.returncode == 130
        assert "Ctrl-C again" in heard
        assert "had to be killed" in errors
        assert gone([int(line.split()[1]) for line in lines])


def test_a_killed_launcher_leaves_no_ranks():
    """The kernel ends them: nobody is there to do it."""
    with begun("-n", 2, "signals.py", "default", lines=2) as (process, lines):
        pids = [int(line.split()[1]) for line in lines]
        assert all(map(runs, pids))
        process.kill()
        process.communicate(timeout=LONG)
        assert gone(pids)


def test_starts_are_clean_also_beside_each_other(ended):
    """Fifteen starts of two ranks, five at a time: exit code 0, nothing on stderr."""
    done = [ended[name] for name in MEETINGS]
    assert [(run.returncode, run.stderr) for run in done] == [(0, "")] * 15


def test_the_failure_is_kept_beside_the_logs(ended, logs):
    """failure.json is the screen's last word for programs; the logs have the echoes."""
    done = ended["logged"]
    assert done.returncode == 1
    failure = json.loads((logs / "failure.json").read_text())
    assert (failure["rank"], failure["code"], failure["kind"]) == (1, 1, "exception")
    assert "ZeroDivisionError" in failure["traceback"]
    assert "ZeroDivisionError" in (logs / "rank-1.log").read_text()
    assert "dist.barrier()" in (logs / "rank-0.log").read_text()  # where it waited
    assert "dist.barrier()" not in done.stderr
