"""How the door tests start the launcher: a process of its own, in a given folder."""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS")
PLAIN = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
LONG = 150  # seconds, which only what hangs takes: under pytest's own limit


def command(*words):
    """The launcher's command line."""
    return [sys.executable, "-m", "accelx.spawn", *map(str, words)]


def environment(**more):
    """This environment without a rank's variables, and accelx importable."""
    return {**PLAIN, "PYTHONPATH": str(ROOT), **more}


def launch(*words, timeout=LONG, **more):
    """Run the launcher in the folder of scripts; what it wrote, and its exit code."""
    return subprocess.run(
        command(*words),
        cwd=SCRIPTS,
        env=environment(**more),
        input="",
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def program(file, *words, timeout=LONG, **more):
    """Run a Python program that calls `accelx.spawn` itself."""
    return subprocess.run(
        [sys.executable, str(file), *words],
        cwd=SCRIPTS,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@cache
def server():
    """A socket to server.py, which ends with this process."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Stacks of its ranks end in its frames: no word of where this checkout is.
    code = f"exec(compile(open({str(SCRIPTS / 'server.py')!r}).read(), 's.py', 'exec'))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(there.fileno())],
        env=environment(OMP_NUM_THREADS="1"),
        pass_fds=[there.fileno()],
    )
    there.close()

    def stop():
        here.close()
        process.wait()

    atexit.register(stop)
    return here


class Forked:
    """A launcher that is forked where torch is imported: as a Popen with pipes.

    That import takes longer than what most launchers here do. `launch` and `command`
    are for tests of how a program itself starts and leaves.
    """

    def __init__(self, *words, stdout=None, folder=SCRIPTS, changes=(), **more):
        place = [str(folder), environment(**more), dict(changes)]
        message = [[*map(str, words)], *place]
        pipes = [os.pipe() for _ in range(3)]
        ends = [write for _, write in pipes]
        outs = ends if stdout is None else [stdout, stdout, ends[2]]
        socket.send_fds(server(), [json.dumps(message).encode()], outs)
        for end in ends:
            os.close(end)
        self.stdout, self.stderr, self.told = (os.fdopen(read) for read, _ in pipes)
        self.pid, self.returncode = int(self.told.readline()), None

    def wait(self, timeout=None):
        """The exit code; TimeoutExpired if it does not come in so many seconds."""
        if self.returncode is None:
            if not select.select([self.told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = int(self.told.readline())
        return self.returncode

    def poll(self):
        """The exit code, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number):
        """Send it, unless the launcher has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # just now
                os.kill(self.pid, number)

    def kill(self):
        """Its ranks end with it."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """What it wrote and complained of from here on, when it has ended."""
        with ThreadPoolExecutor(2) as pool:
            said = list(pool.map(lambda pipe: pipe.read(), (self.stdout, self.stderr)))
        self.wait(timeout)
        return said

    def close(self):
        """End it if it has not ended."""
        self.kill()
        self.wait()
        for pipe in (self.stdout, self.stderr, self.told):
            pipe.close()


def forked(*words, **more):
    """Run a forked launcher: what it wrote, and its exit code, as `launch` does."""
    with contextlib.closing(Forked(*words, **more)) as process:
        said = process.communicate()
        return subprocess.CompletedProcess(words, process.returncode, *said)


def together(jobs, at_once=100):
    """Run forked launchers side by side: how each ended.

    `jobs` is name -> words, or (words, changes) with `changes` as server.py reads them.
    """
    server()  # one for all of them

    def run(job):
        words, changes = job if isinstance(job[0], tuple) else (job, ())
        return forked(*words, changes=changes)

    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(jobs, pool.map(run, jobs.values()), strict=True))


@contextlib.contextmanager
def begun(*words, lines, **more):
    """Start a launcher and read as many lines of its output; it still runs then."""
    with contextlib.closing(Forked(*words, **more)) as process:
        yield process, [process.stdout.readline().strip() for _ in range(lines)]
