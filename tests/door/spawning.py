"""How the door tests start the launcher: a program of its own, in a given folder."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS")
PLAIN = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}


def command(*words):
    """The launcher's command line."""
    return [sys.executable, "-m", "accelx.spawn", *map(str, words)]


def environment(**more):
    """This environment without a rank's variables, and accelx importable."""
    return {**PLAIN, "PYTHONPATH": str(ROOT), **more}


def launch(*words, timeout=60, **more):
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


def program(file, *words, timeout=60):
    """Run a Python program that calls `accelx.spawn` itself."""
    return subprocess.run(
        [sys.executable, str(file), *words],
        cwd=SCRIPTS,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@contextlib.contextmanager
def begun(*words, lines, **more):
    """Start the launcher and read as many lines of its output; it still runs then."""
    with subprocess.Popen(
        command(*words),
        cwd=SCRIPTS,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process, [process.stdout.readline().strip() for _ in range(lines)]
        finally:
            process.kill()  # its ranks end with it
