"""Run the whole suite as two processes side by side: most tests keep one core busy.

What the second prints comes after the first's. Fails if one of them does.
"""

import subprocess
import sys
import tempfile

PYTEST = [sys.executable, "-m", "pytest"]
FIRST = ["tests/unit", "tests/laws", "tests/docs", "tests/device"]
SECOND = ["tests/multi", "tests/door", "-p", "no:cacheprovider"]  # one writes it


def main() -> int:
    """The exit code of the first half that failed, or 0."""
    with tempfile.TemporaryFile("w+") as kept:
        second = subprocess.Popen(
            [*PYTEST, *SECOND], stdout=kept, stderr=subprocess.STDOUT
        )
        try:
            codes = [subprocess.call([*PYTEST, *FIRST]), second.wait()]
        finally:
            second.terminate()
            second.wait()
            kept.seek(0)
            sys.stdout.writelines(kept)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
