"""What of a job can be reached, read or left behind: nothing beyond this machine."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.door.scripts.where import listening
from tests.door.spawning import LONG, begun, environment, forked
from tests.door.test_spawn_ends import gone, runs

pytestmark = pytest.mark.door
LOOPBACK = "0100007F"  # 127.0.0.1 as the kernel writes it

# Ranks that have met, and wait with their sockets open; the launcher's number first.
WAITING = """
import os, sys, time
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
sys.stdout.write(f"{os.getppid()} {os.getpid()}\\n")
sys.stdout.flush()
time.sleep(600)
"""
# A launcher that takes this machine for one without prctl, memfd, waitid and affinity.
BARE = """
import sys
import attrs
from accelx.launch import door, machine
look = machine.look
machine.look = lambda environ: attrs.evolve(
    look(environ), system="darwin", has=frozenset({"fork", "wait4"})
)
sys.exit(door.main(sys.argv[1:]))
"""
# A program whose call carries a secret; its ranks say that they run.
SECRET = """
import os, sys, time
from pathlib import Path
import accelx as ax

def work(secret, folder):
    Path(folder, f"{os.environ['RANK']}.pid").touch()
    time.sleep(600)

if __name__ == "__main__":
    ax.spawn(work, Path(sys.argv[1], "secret").read_text(), sys.argv[1], n=2)
"""


@pytest.fixture
def waiting(tmp_path):
    """A script whose ranks wait for each other and then for ever."""
    path = tmp_path / "waiting.py"
    path.write_text(WAITING)
    return path


def parents(pid):
    """The numbers of all processes that this one has started, and theirs."""
    found = {pid}
    stats = list[str]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # has ended
            stats.append(path.read_text())
    pairs = [(int(s.split()[0]), int(s.rpartition(")")[2].split()[1])) for s in stats]
    for _ in pairs:
        found |= {child for child, parent in pairs if parent in found}
    return found


@pytest.mark.parametrize("environ", [{}, {"USE_LIBUV": "0"}])
def test_a_job_of_one_machine_listens_on_loopback_only(waiting, environ):
    """Every socket of every process of the job, listed from outside."""
    with begun("-n", 2, waiting, lines=2, **environ) as (process, lines):
        job = {int(number) for line in lines for number in line.split()}
        assert job <= parents(process.pid)
        found = listening(parents(process.pid))
        with socket.create_server(("", 0)):  # the control: a public one is seen
            control = listening([os.getpid()])
    assert set(found) == {LOOPBACK}
    assert set(control) - {LOOPBACK}


def bare(folder, *words):
    """Start the launcher that has no prctl, with its output in pipes."""
    launcher = folder / "bare.py"
    launcher.write_text(BARE)
    return subprocess.Popen(
        [sys.executable, str(launcher), *map(str, words)],
        env=environment(GLOO_SOCKET_IFNAME="lo"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ranks_end_with_a_killed_launcher_where_no_kernel_tells(tmp_path, waiting):
    """kill -9 of the launcher, on a system without prctl: the pipe does it."""
    with bare(tmp_path, "-n", "2", waiting) as process:
        lines = [process.stdout.readline() for _ in range(2)]
        ranks = [int(line.split()[1]) for line in lines]
        assert all(map(runs, ranks))
        process.kill()
        assert gone(ranks)


def test_a_bare_system_reports_failures_too(tmp_path):
    """A fault's line comes from a file, the end of the rank from wait4."""
    script = tmp_path / "fault.py"
    script.write_text(
        "import ctypes, os, time\n"
        "if os.environ['RANK'] == '1': ctypes.string_at(0)\ntime.sleep(600)\n"
    )
    with bare(tmp_path, "-n", "2", script) as process:
        _, errors = process.communicate(timeout=LONG)
    assert process.returncode == 139
    assert "rank 1 on" in errors
    assert "killed by SIGSEGV (a fault in native code)" in errors
    assert 'fault.py", line 2' in errors


def test_a_launcher_killed_while_ranks_meet_leaves_none(waiting):
    """At any moment: 0.2 s after the first sign of ranks, before they have met."""
    with begun("-n", 3, waiting, lines=0) as (process, _):
        limit = time.monotonic() + LONG
        while len(parents(process.pid)) < 4 and time.monotonic() < limit:
            time.sleep(0.02)
        job = parents(process.pid)
        assert len(job) == 4
        time.sleep(0.2)
        process.kill()
        process.communicate(timeout=LONG)
        assert gone(job)


def words_of(pid):
    """What `ps` shows of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def test_what_a_call_carries_is_in_no_argument(tmp_path):
    """Arguments travel in a folder that only this user may enter."""
    secret = "correct-horse-battery-staple"
    (tmp_path / "secret").write_text(secret)
    script = tmp_path / "secret.py"
    script.write_text(SECRET)
    words = [sys.executable, str(script), str(tmp_path)]
    with subprocess.Popen(words, env=environment(TMPDIR=str(tmp_path))) as process:
        limit = time.monotonic() + LONG
        while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < limit:
            time.sleep(0.05)
        job = parents(process.pid)
        assert len(job) == 4
        shown = [words_of(pid) for pid in job]
        (folder,) = tmp_path.glob("accelx-spawn-*")
        mode = folder.stat().st_mode & 0o777
        process.send_signal(signal.SIGTERM)
        process.wait(LONG)
    assert not [text for text in shown if secret in text]
    assert [text for text in shown if str(folder) in text]  # the control: ps sees words
    assert mode == 0o700
    assert gone(job)


def test_a_failure_holds_no_variable_of_the_environment(tmp_path):
    """A token of the environment is in no log or failure.json, nor on the screen."""
    token = "hf_0123456789"
    done = forked("-n", 2, "--logs", tmp_path, "ends.py", "raise", 1, API_TOKEN=token)
    texts = [path.read_text() for path in tmp_path.iterdir()]
    assert len(texts) == 3
    assert not [text for text in (*texts, done.stderr, done.stdout) if token in text]
    assert re.search("ZeroDivisionError", done.stderr)  # the control: it did fail
