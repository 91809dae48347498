"""Every way for a rank to fail, planted: what the screen says, and what is written."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import attrs
import pytest

from tests.door.spawning import LONG, SCRIPTS, begun, forked, together

pytestmark = pytest.mark.door
HOST = socket.gethostname()

HEAD = "import os, sys, time\nrank = int(os.environ['RANK'])\n"  # lines 1 and 2
TAIL = "if rank == 1: work()\ntime.sleep(600)\n"  # from line 5
LOADER = """    import torch
    class Data(torch.utils.data.Dataset):
        def __len__(self): return 4
        def __getitem__(self, i):
            time.sleep(1)
            os.kill(os.getpid(), 9)
    list(torch.utils.data.DataLoader(Data(), num_workers=1))
"""


@attrs.frozen
class Case:
    """A failure to plant, and what is to be said of it."""

    work: str  # what rank 1 does, from line 4 on
    code: int
    said: str  # a regular expression for what follows "failed: "
    fields: dict  # of failure.json
    words: tuple = ()
    ranks: int = 2
    step: int = 0
    line: int | None = 4  # None: it cannot be known


KILL = "    os.kill(os.getpid(), 9)\n"
WORKER = r"RuntimeError: DataLoader worker .*\(.*"
CASES = {
    "raise": Case(
        "    x = {}['key']\n",
        1,
        "KeyError: 'key'",
        {"kind": "exception", "exception": "KeyError", "message": "'key'"},
    ),
    "sys.exit": Case(
        "    sys.exit(9)\n",
        9,
        r"sys\.exit\(9\)",
        {"kind": "exit", "exception": "SystemExit", "traceback": None},
    ),
    "os._exit": Case(
        "    os._exit(3)\n",
        3,
        r"os\._exit\(3\), or native code's exit, without an exception",
        {"kind": "exit", "exception": None, "signal": None},
        line=None,
    ),
    "segfault": Case(
        "    __import__('ctypes').string_at(0)\n",
        139,
        r"killed by SIGSEGV \(a fault in native code\)",
        {"kind": "signal", "signal": "SIGSEGV", "reading": "a fault in native code"},
    ),
    "abort": Case(
        "    os.abort()\n",
        134,
        r"killed by SIGABRT \(native code gave up, such as a failed assertion",
        {"kind": "signal", "signal": "SIGABRT", "exception": None},
    ),
    "no memory": Case(
        "    bytearray(1 << 60)\n",
        1,
        r"MemoryError \(no more memory was given, here or by ulimit -v; give it more",
        {"kind": "exception", "exception": "MemoryError", "message": None},
    ),
    "memory killer": Case(
        KILL,
        137,
        r"killed by the kernel: out of memory; peak \d\.\d GiB \(give it more memory",
        {"kind": "signal", "signal": "SIGKILL"},
        step=1,
        line=None,
    ),
    "kill -9": Case(
        KILL,
        137,
        r"killed by SIGKILL \(kill -9: the kernel ended nothing for want of memory; p",
        {"kind": "signal", "signal": "SIGKILL"},
        line=None,
    ),
    "worker and memory": Case(
        LOADER,
        1,
        WORKER + "was killed by the kernel: out of memory",
        {"exception": "RuntimeError"},
        step=1,
        line=10,
    ),
    "worker": Case(
        LOADER,
        1,
        WORKER + " out of memory,.* kill -9",
        {"exception": "RuntimeError"},
        line=10,
    ),
    "late": Case(
        "    time.sleep(600)\n",
        124,
        r"did not finish within 12 s",
        {"kind": "timeout", "exception": None},
        words=("--timeout", "12"),
        ranks=3,
    ),
    "in time": Case("    sys.exit(0)\n", 0, "", {}, words=("--timeout", "150")),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Every case, run at once: its folder, and how its launcher ended."""
    folders, jobs = {}, {}
    for name, case in CASES.items():
        folders[name] = tmp_path_factory.mktemp("case")
        tail = TAIL if case.code else "work()\n"
        script = folders[name] / "job.py"
        script.write_text(f"{HEAD}def work():\n{case.work}{tail}")
        words = ("-n", case.ranks, "--logs", folders[name] / "logs", *case.words)
        jobs[name] = (*words, script), {"step": case.step}
    done = together(jobs)
    return {name: (folders[name], done[name]) for name in CASES}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.code])
def test_a_failure_is_said_and_kept(planted, name):
    """Rank, host, reading and line on the screen, once; all of it in failure.json."""
    case, (folder, done) = CASES[name], planted[name]
    said = done.stderr
    kept = json.loads((folder / "logs" / "failure.json").read_text())
    assert done.returncode == kept["code"] == case.code
    assert re.search(rf"^rank 1 on {HOST} failed: {case.said}", said, re.M), said
    assert said.count("failed:") == 1
    assert {field: kept[field] for field in case.fields} == case.fields
    assert (kept["rank"], kept["host"]) == (1, HOST)
    assert kept["peak_bytes"] > 50 << 20  # torch alone is more
    assert kept["pid"] > 1
    place = f"{folder / 'job.py'}:{case.line}, in work"
    assert (kept["line"] or "").startswith(place if case.line else "")
    shown = f'job.py", line {case.line}' in said or f"at {kept['line']}" in said
    assert shown == (case.line is not None), said


def test_the_last_line_says_what_became_of_the_others(planted):
    """They stopped because of it; or where each stands, if no rank is the cause."""
    last = {n: done.stderr.splitlines()[-1:] for n, (_, done) in planted.items()}
    folder, done = planted["in time"]
    assert (last.pop("in time"), done.returncode) == ([], 0)  # the control: silence
    assert not (folder / "logs" / "failure.json").exists()
    place = f"{planted['late'][0] / 'job.py'}:6, in <module>"
    assert last.pop("late") == [f"ranks 0, 2 did not either, at {place}"]
    assert set(map(tuple, last.values())) == {("1 rank stopped because of it",)}


def test_without_logs_nothing_is_written(tmp_path):
    """Neither in this folder nor in the temporary one, also when a rank fails."""
    (tmp_path / "tmp").mkdir()
    before = {path for path in SCRIPTS.rglob("*") if "__pycache__" not in path.parts}
    done = forked("-n", 2, "ends.py", "raise", 1, TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 1
    after = {path for path in SCRIPTS.rglob("*") if "__pycache__" not in path.parts}
    assert after == before
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == []


def test_logs_of_an_earlier_failure_do_not_stay(tmp_path):
    """A run that ends well leaves no failure.json behind from the one before."""
    script = tmp_path / "job.py"
    script.write_text("import os\nprint(os.environ['RANK'])\n")
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "failure.json").write_text("{}")
    (logs / "rank-1.log").write_text("of the run before")
    done = forked("-n", 2, "--logs", logs, script)
    assert (done.returncode, done.stderr) == (0, "")
    left = sorted(path.name for path in logs.iterdir())
    assert left == ["rank-0.log", "rank-1.log"]
    assert (logs / "rank-1.log").read_text() == "1\n"


def test_logs_that_cannot_be_written_do_not_hide_the_failure(tmp_path):
    """The folder has gone meanwhile: that is said too, before the rank's own words."""
    script = tmp_path / "job.py"
    script.write_text("import shutil, sys\nshutil.rmtree(sys.argv[1])\n1 / 0\n")
    logs = tmp_path / "logs"
    done = forked("-n", 1, "--logs", logs, script, logs)
    assert done.returncode == 1
    lines = [
        s for s in done.stderr.splitlines() if "failed:" in s or "failure.json" in s
    ]
    assert re.fullmatch(r"accelx\.spawn: no .*failure\.json: No such file.*", lines[0])
    assert lines[1].endswith("failed: ZeroDivisionError: division by zero")
    assert not logs.exists()


def test_a_rank_killed_from_outside_is_reported_at_once(tmp_path):
    """kill -9 of one rank's number: that rank is named, and its log says so too."""
    words = ("-n", 2, "--logs", tmp_path, "signals.py", "default")
    with begun(*words, lines=2) as (process, lines):
        os.kill(int(lines[0].split()[1]), signal.SIGKILL)
        _, errors = process.communicate(timeout=LONG)
    kept = json.loads((tmp_path / "failure.json").read_text())
    assert process.returncode == 137
    assert kept["pid"] == int(lines[0].split()[1])
    assert errors.startswith(f"rank {kept['rank']} on {HOST} failed: killed by SIGKILL")
    log = (tmp_path / f"rank-{kept['rank']}.log").read_text()
    assert kept["summary"] in log


ROOM = 400 << 20  # bytes: two ranks without torch take less
GROUPS = (  # where a control group can be made, and the name of its limit
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ("/sys/fs/cgroup", "memory.max"),
)
GREEDY = """    held = []
    while True: held.append(b"x" * (16 << 20))
"""


def enter(group):
    """Become a member of a control group."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture
def small_group():
    """A control group of little memory, as containers have it."""
    for root, limit in GROUPS:
        path = Path(root) / f"accelx-test-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:  # no such mount, or not ours to write
            continue
        try:
            if (path / limit).exists():
                (path / limit).write_text(str(ROOM))
                subprocess.run(["true"], preexec_fn=partial(enter, path), check=True)
                yield path
                return
        except (OSError, subprocess.SubprocessError):  # not ours to limit or to enter
            continue
        finally:
            path.rmdir()
    pytest.skip("no control group with a limit of memory can be made here")


def test_the_memory_killer_itself(small_group, tmp_path):
    """The kernel ends a rank for want of memory, and the screen says that."""
    script = tmp_path / "job.py"
    script.write_text(f"{HEAD}def work():\n{GREEDY}{TAIL}")
    done = subprocess.run(
        [sys.executable, "-m", "accelx.spawn", "-n", "2", script],
        preexec_fn=partial(enter, small_group),
        capture_output=True,
        text=True,
        check=False,
        timeout=LONG,
    )
    said = r"failed: killed by the kernel: out of memory; peak 0\.\d GiB"
    assert re.match(rf"rank 1 on {HOST} {said}", done.stderr), done.stderr
    assert done.returncode == 137
