"""What a rank's end means, where in the program it was, and how it is said."""

import json
import os
import signal
import sys
import traceback

import attrs
import pytest

from accelx.comm_site import LIBRARY
from accelx.launch import kernel, watch, where
from accelx.launch.failure import Failure, died, dumps, late, loads, raised
from accelx.launch.reading import Seen, read, wants_count
from accelx.launch.running import Rank
from accelx.launch.told import elsewhere, names, odd, report, told

SEEN = Seen(host="node7", pid=4711, peak=int(11.8 * kernel.GIB), oom=None)


def killed(oom, number=signal.SIGKILL):
    """How the end of a rank by a signal is read."""
    return read(died(3, -number, ""), attrs.evolve(SEEN, oom=oom))


@pytest.mark.parametrize(
    ("oom", "headline"),
    [
        (True, "killed by the kernel: out of memory; peak 11.8 GiB (give it more mem"),
        (
            False,
            "killed by SIGKILL (kill -9: the kernel ended nothing for want of memor",
        ),
        (None, "killed by SIGKILL (out of memory, or kill -9; peak 11.8 GiB)"),
    ],
)
def test_a_killed_rank_says_what_the_kernel_has_counted(oom, headline):
    """Out of memory where it counted one, kill -9 where not, both if it is silent."""
    failure = killed(oom)
    assert failure.headline.startswith(headline)
    assert (failure.code, failure.signal) == (137, "SIGKILL")
    assert (failure.host, failure.pid) == ("node7", 4711)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGSEGV, "killed by SIGSEGV (a fault in native code)"),
        (signal.SIGABRT, "killed by SIGABRT (native code gave up, such as a failed"),
        (signal.SIGBUS, "killed by SIGBUS (often a full /dev/shm: give the container"),
        (signal.SIGILL, "killed by SIGILL (native code built for another CPU)"),
        (signal.SIGTERM, "killed by SIGTERM (something else asked this rank to stop)"),
        (signal.SIGALRM, "killed by SIGALRM"),
        (40, "killed by signal 40"),
    ],
)
def test_each_signal_has_its_reading(number, said):
    """Whether or not the kernel ended others: that is about SIGKILL alone."""
    for oom in (True, False, None):
        assert killed(oom, number).headline.startswith(said)
        assert killed(oom, number).code == 128 + number


def failing(error):
    """The failure of a rank whose program raised `error`, as the launcher has it."""
    try:
        raise error
    except BaseException as caught:
        return loads(dumps(raised(1, caught)))


WORKER = "DataLoader worker (pid(s) 12) is killed by signal: Killed. \n"
LOST = "DataLoader worker (pid(s) 12) exited unexpectedly"


@pytest.mark.parametrize(
    ("error", "oom", "reading"),
    [
        (MemoryError(), None, "no more memory was given"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you"),
            None,
            "no more",
        ),
        (
            RuntimeError("CUDA out of memory. Tried"),
            None,
            "the GPU is full; accumulate(n)",
        ),
        (
            RuntimeError(WORKER),
            True,
            "a loader's worker was killed by the kernel: out of",
        ),
        (
            RuntimeError(WORKER),
            False,
            "a loader's worker was killed: out of memory, or",
        ),
        (RuntimeError(LOST), True, "a loader's worker was killed by the kernel: out"),
        (RuntimeError(LOST), False, "a loader's worker is gone: out of memory, kill"),
        (SystemExit(75), None, "told to leave, and saved: run it again"),
    ],
)
def test_a_known_error_has_a_reading(error, oom, reading):
    """What the words of torch and Python do not say: what to do about it."""
    found = read(failing(error), attrs.evolve(SEEN, oom=oom))
    assert found.reading.startswith(reading)
    assert found.headline.endswith(f"({found.reading})")


@pytest.mark.parametrize("error", [ValueError("memory"), SystemExit(3), OSError(28)])
def test_any_other_error_speaks_for_itself(error):
    """No reading is made up; the kernel is not asked."""
    failure = failing(error)
    assert not wants_count(failure)
    assert read(failure, attrs.evolve(SEEN, oom=True)).reading == ""


@pytest.mark.parametrize(
    ("failure", "asks"),
    [
        (died(0, -9, ""), True),
        (died(0, -15, ""), False),
        (failing(RuntimeError(WORKER)), True),
        (died(0, 9, ""), False),
    ],
)
def test_the_kernel_is_asked_where_it_may_have_done_it(failure, asks):
    """SIGKILL of a rank, or of what it started; exit code 9 is something else."""
    assert wants_count(failure) == asks


V1 = "9:name=systemd:/\n4:memory:/job/7\n0::/\n"
CASES = {
    "v2": ("0::/job/7\n", {"sys/fs/cgroup/job/7/memory.events": "oom 3\noom_kill 2\n"}),
    "inside": ("0::/job/7\n", {"sys/fs/cgroup/memory.events": "oom_kill 2\n"}),
    "v1": (V1, {"sys/fs/cgroup/memory/job/7/memory.oom_control": "oom_kill 2\n"}),
    "v1 inside": (V1, {"sys/fs/cgroup/memory/memory.oom_control": "oom_kill 2\n"}),
    "machine": (V1, {"proc/vmstat": "nr_free 9\noom_kill 2\npgfault 3\n"}),
}


@pytest.mark.parametrize("case", CASES)
def test_kills_for_memory_are_counted_by_group_or_machine(tmp_path, case):
    """The group's own count comes before the machine's; `oom` alone is no kill."""
    groups, files = CASES[case]
    for name, text in {"proc/vmstat": "oom_kill 50\n", **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/cgroup").write_text(groups)
    assert kernel.oom_kills(tmp_path) == 2


def test_a_silent_kernel_is_not_taken_for_zero(tmp_path):
    """Without files the count is unknown; a group without a limit says none."""
    assert kernel.oom_kills(tmp_path) is None
    assert kernel.oom_kills() in (None, *range(1_000_000))


def test_the_line_is_the_programs_own():
    """An error deep in a library is shown where the program called it."""
    try:
        json.loads("{")
    except ValueError as error:
        line = where.innermost(error.__traceback__)
        deep = traceback.extract_tb(error.__traceback__)[-1]
    assert line.startswith(f"{__file__}:")
    assert line.endswith(', in test_the_line_is_the_programs_own: json.loads("{")')
    assert deep.filename != __file__  # the control: the deepest frame is another
    assert where.innermost(None) == ""


def test_a_library_alone_shows_its_own_line():
    """Where no line is the program's, the deepest has to do."""
    frames = '  File "{0}/json/decoder.py", line 9 in f\n  File "{0}/x.py", line 2 in g'
    stack = f"Stack:\n{frames}"
    lib = LIBRARY[0]
    assert where.of_stack(stack.format(lib)) == f"{lib}/json/decoder.py:9, in f"
    mixed = stack.format(lib) + '\n  File "train.py", line 3 in main'
    assert where.of_stack(mixed) == "train.py:3, in main"
    installed = '  File "/x/site-packages/t.py", line 1 in f\n' + mixed
    assert where.of_stack(installed) == "train.py:3, in main"
    assert where.of_stack("") == ""


def test_the_screen_names_the_line_once():
    """A traceback that ends there says it; `sys.exit`, which has none, is given it."""
    own = read(failing(ValueError("x")), SEEN)
    assert "\nat " not in told(own, "node7", 0)
    left = read(failing(SystemExit(3)), SEEN)
    assert told(left, "node7", 2).splitlines() == [
        "rank 1 on node7 failed: sys.exit(3)",
        f"at {left.line}",
        "2 ranks stopped because of it",
    ]
    try:
        json.loads("{")
    except ValueError as error:
        deep = raised(1, error)
    assert told(deep, "node7", 0).splitlines()[-1] == f"at {deep.line}"


def test_the_file_has_every_field():
    """Programs read what the screen says, and more; what is not there is null."""
    written = json.loads(report(read(failing(ValueError("no\nway")), SEEN)))
    assert written["exception"] == "ValueError"
    assert written["message"] == "no\nway"
    assert written["summary"] == "ValueError: no way"
    assert f"{__file__}:" in written["line"]
    assert written["traceback"].endswith("ValueError: no\nway")
    assert (written["rank"], written["host"], written["pid"]) == (1, "node7", 4711)
    assert written["peak_bytes"] == SEEN.peak
    assert written["time"].endswith("+00:00")
    assert (written["signal"], written["reading"]) == (None, None)
    assert json.loads(report(killed(True)))["signal"] == "SIGKILL"


def stuck(rank, line):
    """A rank that did not finish, at a line."""
    return late(rank, 60, f'Stack\n  File "train.py", line {line} in step')


def test_the_odd_rank_is_the_one_to_look_at():
    """Three wait in a collective, one is elsewhere: that one is named."""
    ranks = [stuck(0, 30), stuck(1, 30), stuck(2, 12), stuck(3, 30)]
    root = odd(ranks)
    assert root is ranks[2]
    assert root.code == 124
    assert root.headline == "did not finish within 60 s"
    others = elsewhere(ranks, root)
    assert others == ["ranks 0, 1, 3 did not either, at train.py:30, in step"]
    assert odd(ranks[:2]) is ranks[0]
    assert elsewhere([ranks[0]], ranks[0]) == []
    assert names([4]) == "rank 4"


def test_a_failure_travels_whole():
    """What a rank writes into its pipe is what the launcher reads; one line."""
    failure = failing(KeyError("a\nb"))
    assert loads(dumps(failure)) == failure
    assert dumps(failure).count(b"\n") == 1
    assert isinstance(failure, Failure)
    assert sys.exc_info() == (None, None, None)


def test_the_word_of_a_rank_counts_once():
    """Also where the end of its pipe is seen after it was judged: it had been asked."""
    report, reports = os.pipe()
    os.write(reports, dumps(raised(0, SystemExit(5))))
    os.close(reports)
    rank = Rank(0, 4711, report, -1)
    assert watch._listen(rank)
    assert rank.failure.summary == "sys.exit(5)"  # the control
    rank.failure, rank.code = None, 5  # it chose so, and that is no failure
    assert not watch._listen(rank)
    assert rank.failure is None
    os.close(report)
