"""Run the whole suite as two processes side by side: most tests keep one core busy.

What the second prints comes after the first's. Fails if one of them does, or if tests
leave a process or shared memory behind.
"""

import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _leaks import MARK, left, shared

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest"]
RANKS = sorted(f"tests/multi/{p.name}" for p in (ROOT / "tests/multi").glob("test_*"))
EARLY = [file for file in RANKS if file < "tests/multi/test_save"]  # half of their time
FIRST = ["tests/unit", "tests/laws", *EARLY, "tests/docs", "tests/device", "tests/xla"]
SECOND = [*RANKS[len(EARLY) :], "tests/door"]


def main() -> int:
    """The exit code of the first half that failed, or 0."""
    mark, before = uuid.uuid4().hex, shared()
    codes = halves({**os.environ, MARK: mark})
    leaks = left(mark, before)
    print(*leaks, sep="\n", end="\n" if leaks else "")
    return next((code for code in [*codes, len(leaks)] if code), 0)


def halves(environ: dict[str, str]) -> list[int]:
    """Both exit codes."""
    with tempfile.TemporaryFile("w+") as kept:
        second = subprocess.Popen(
            [
                *PYTEST,
                *SECOND,
                "-p",
                "no:cacheprovider",
            ],  # one of them writes the cache
            env=environ,
            stdout=kept,
            stderr=subprocess.STDOUT,
        )
        try:
            first = subprocess.call([*PYTEST, *FIRST], env=environ)
            return [first, second.wait()]
        finally:
            second.terminate()
            second.wait()
            kept.seek(0)
            sys.stdout.writelines(kept)


if __name__ == "__main__":
    sys.exit(main())
