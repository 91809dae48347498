"""What the command line gets before anything heavy is imported: help, and mistakes."""

from __future__ import annotations

import sys

from accelx.errors import SpawnError
from accelx.launch.options import parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher. Returns the exit code, in the launcher and in each rank."""
    try:
        given = parse(sys.argv[1:] if argv is None else argv)
        from accelx.launch.system import check_here  # `--help` needs no attrs

        check_here(given.target)
    except SpawnError as error:
        sys.stderr.write(f"accelx.spawn: {error}\n")
        return 2
    try:
        from accelx.launch.start import start  # attrs, ctypes, pickle: 0.1 s

        return start(given)
    except KeyboardInterrupt:  # before a rank was started
        return 130
