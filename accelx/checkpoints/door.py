"""How a command of the tool ends: what is printed where, and with which exit code."""

from __future__ import annotations

import os
import sys

from accelx.checkpoints.options import WrongUseError, parse
from accelx.errors import AccelxError

TYPE_CHECKING = False  # importing `typing` would cost `--help` 10 ms
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 failed or damaged, 2 wrong use."""
    try:
        return _run(parse(sys.argv[1:] if argv is None else argv))
    except WrongUseError as error:
        return _fail(error, WRONG_USE)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # a reader that has gone (`| head`) is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (AccelxError, OSError) as error:
        return _fail(error, FAILED)


def _run(given: argparse.Namespace) -> int:
    from accelx import storage  # attrs, fsspec: 0.1 s
    from accelx.checkpoints import screen
    from accelx.checkpoints.commands import COMMANDS

    if not given.json:
        screen.check_installed()  # before hours of reading, not after
    try:
        for url in given.urls:
            storage.at(url)
    except ValueError as error:
        raise WrongUseError(str(error)) from error
    report = COMMANDS[given.command](given)
    if given.json:
        screen.write_json(report.data)
    else:
        screen.write(report.text())
    return report.code


def _fail(error: Exception, code: int) -> int:
    from accelx.checkpoints.tables import plain
    from accelx.storage_at import scrubbed

    lines = scrubbed(f"accelx.checkpoint: {error}").splitlines()
    sys.stderr.write("".join(f"{plain(line)}\n" for line in lines))
    return code
