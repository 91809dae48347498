"""How a command line ends: what is printed where, and with which exit code."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import contextmanager

from accelx.errors import AccelxError

TYPE_CHECKING = False  # importing `typing` would cost `--help` 10 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import NoReturn

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130


class WrongUseError(AccelxError, ValueError):
    """The words of a command do not mean anything that can be done."""


class Parser(argparse.ArgumentParser):
    """A parser that raises in place of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise WrongUseError, which says where all options are."""
        raise WrongUseError(f"{message}\nall options: {self.prog} --help")


def ended(name: str, command: Callable[[], int]) -> int:
    """The exit code of a command: its own, 1 where it fails, 2 for wrong use, 130.

    What it raises is written to standard error, after `name`, without credentials.
    """
    try:
        return command()
    except WrongUseError as error:
        return _fail(name, error, WRONG_USE)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # a reader that has gone (`| head`) is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (AccelxError, OSError) as error:
        return _fail(name, error, FAILED)


@contextmanager
def aside() -> Generator[None]:
    """What anything prints inside, child processes too, goes to standard error.

    So that a document is all of standard output: gloo of torch 2.9 prints there whom
    it is connected to.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _fail(name: str, error: Exception, code: int) -> int:
    from accelx.checkpoints.tables import plain
    from accelx.storage_at import scrubbed

    lines = scrubbed(f"{name}: {error}").splitlines()
    sys.stderr.write("".join(f"{plain(line)}\n" for line in lines))
    return code
