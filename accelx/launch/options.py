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
    say = parser.add_argument
    count = "number of ranks: 8; auto is one per GPU, or per NUMA node"
    say("-n", required=True, type=num_ranks, metavar="N", help=count)
    _add_kinds(parser)
    logs = "also write each rank's output to DIR/rank-N.log"
    say("--log-dir", metavar="DIR", help=logs)
    say("--prefix", action="store_true", help="start each line of output with [rank]")
    say("--print", action="store_true", help="show every setting and start nothing")
    wait = f"seconds from a request to stop until SIGKILL, by default {GRACE:g}"
    say("--grace", type=seconds, metavar="S", help=wait)
    cores = "give each rank cores of its own; auto: where each gets two or more"
    say("--bind", choices=("auto", "always", "never"), help=cores)
    say("target", metavar="script", help="a Python file, or a module after -m")
    rest = "handed to the script as they are"
    say("args", nargs=argparse.REMAINDER, default=[], help=rest)
    return parser


def _add_kinds(parser: argparse.ArgumentParser) -> None:
    kind = parser.add_mutually_exclusive_group()
    for flags, text in (
        (("-m", "--module"), "the script is named as in python -m package.module"),
        (("--call",), argparse.SUPPRESS),  # a folder that `spawn` has written
    ):
        const = flags[-1].removeprefix("--")
        kind.add_argument(
            *flags, action="store_const", dest="kind", const=const, help=text
        )
