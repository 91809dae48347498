"""What the words of the launcher's command line mean, and what to write instead."""

from __future__ import annotations

import argparse

from accelx.errors import SpawnError

TYPE_CHECKING = False  # importing `typing` would cost `--help` 10 ms
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal, NoReturn

PROGRAM = "python -m accelx.spawn"
GRACE = 30.0  # seconds, as torchrun's


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SpawnError(f"{message}\nall options: {PROGRAM} --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The words as they were given. Raises SpawnError; `--help` prints and exits."""
    return _parser().parse_args(list(argv))


def check_system(system: str, target: str) -> None:
    """Refuse a system (`sys.platform`) that cannot fork."""
    if system == "win32":
        raise SpawnError(
            f"{PROGRAM} starts ranks by fork, which Windows does not have; one process "
            f"needs no launcher: python {target}"
        )


def num_ranks(text: str) -> int | Literal["auto"]:
    """`8` or `auto`; anything else raises with what to write."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"the number of ranks is 1 or more, got {text!r}; "
            "write -n 2, or -n auto for one rank per GPU"
        )
    return int(text)


def seconds(text: str) -> float:
    """A number of seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(
            f"a time in seconds is 0 or more, got {text!r}; write --grace 30"
        )
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} -n N [options] [-m] script [args ...]",
        description="Start a script as N ranks on this machine.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "-n",
        required=True,
        type=num_ranks,
        metavar="N",
        help="number of ranks: 8, or auto",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        *("-m", "--module"),
        action="store_const",
        dest="kind",
        const="module",
        help="the script is named as a module, as in python -m package.module",
    )
    kind.add_argument(
        *("--call",),
        action="store_const",
        dest="kind",
        const="call",
        help=argparse.SUPPRESS,
    )
    add(
        "--log-dir",
        metavar="DIR",
        help="also write each rank's output to DIR/rank-0.log",
    )
    add("--prefix", action="store_true", help="start each line of output with [rank]")
    add("--print", action="store_true", help="show every setting and start nothing")
    add(
        *("--grace",),
        type=seconds,
        metavar="S",
        help=f"seconds from a stop signal to SIGKILL, {GRACE:g} by default",
    )
    add("--no-bind", action="store_true", help="leave the ranks' CPU affinity alone")
    add("target", metavar="script", help="a Python file, or a module after -m")
    add("args", nargs=argparse.REMAINDER, help="handed to the script as they are")
    return parser
