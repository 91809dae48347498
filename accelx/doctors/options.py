"""What the words of the doctor's command line mean, and what to write instead."""

from __future__ import annotations

import argparse

from accelx.doors import Parser

TYPE_CHECKING = False  # importing `typing` would cost `--help` 10 ms
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

PROGRAM = "python -m accelx.doctor"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The words as they were given. Raises WrongUseError; `--help` prints and exits."""
    return _parser().parse_args(list(argv))


def whole_number(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"wants a whole number of at least 1, got {text!r}; write 2"
        )
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Report on this machine, try its network or a store, or say why a "
        "run hangs.",
        epilog="Without a command: a report to paste, without secrets. Exit code: 0, "
        "1 if something tried has failed or a rank is odd, 2 for wrong use.",
        allow_abbrev=False,
    )
    json: Any = {"action": "store_true", "help": "print one JSON document"}
    parser.add_argument("--json", **json)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, help_: str) -> Any:
        made = commands.add_parser(
            name, help=help_, description=help_, allow_abbrev=False
        )
        # not over what was said before the command
        made.add_argument("--json", default=argparse.SUPPRESS, **json)
        return made

    net = command("net", "names, ports, clocks and speed between ranks")
    number: Any = {"type": whole_number, "metavar": "N"}
    many = "ranks to start here, by default 2; those of a launcher count themselves"
    net.add_argument("-n", default=2, help=many, **number)
    limit = "seconds until what has not come is given up, by default 120"
    net.add_argument("--timeout", type=float, default=120.0, help=limit)
    hang = command("hang", "which rank of a run that hangs is the odd one")
    hang.add_argument("folder", help="what accelx.spawn --logs was given")
    store = command("store", "write, read, check and remove at a checkpoint URL")
    store.add_argument("url", help="a path, or a URL such as s3://bucket/run")
    amount = "MiB of the largest object, by default 16"
    store.add_argument("--size", default=16, help=amount, **number)
    return parser
