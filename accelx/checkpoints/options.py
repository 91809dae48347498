"""What the words of the tool's command line mean, and what to write instead."""

from __future__ import annotations

import argparse
import sys

from accelx.doors import Parser, WrongUseError

TYPE_CHECKING = False  # importing `typing` would cost `--help` 10 ms
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

PROGRAM = "python -m accelx.checkpoint"
URL = "a path, or a URL such as s3://bucket/run"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The words as they were given, every URL among them in `urls`.

    Raises WrongUseError; `--help` prints and exits.
    """
    given = _parser().parse_args(list(argv))
    if given.command == "prune":
        _check_answerable(given, sys.stdin.isatty())
    names = ("url", "a", "b", "out")
    given.urls = [value for n in names if (value := getattr(given, n, None))]
    return given


def _check_answerable(given: argparse.Namespace, terminal: bool) -> None:
    if not (given.yes or given.dry_run or terminal):
        raise WrongUseError(
            "prune wants to ask before it removes anything, and there is no terminal "
            "to ask at; write --yes to remove without asking, or --dry-run to see what "
            "would go"
        )


def whole_number(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"wants a whole number of at least 1, got {text!r}; write 3"
        )
    return int(text)


def best(text: str) -> tuple[str, str]:
    """`loss:min` as ("loss", "min")."""
    metric, _, direction = text.rpartition(":")
    if not metric or direction not in ("min", "max"):
        raise argparse.ArgumentTypeError(
            f"wants a metric and min or max, got {text!r}; write loss:min"
        )
    return metric, direction


def text(text: str) -> str:
    """A text that is not empty, as an unset variable of a shell would give."""
    if not text:
        raise argparse.ArgumentTypeError(f"wants {URL}, got nothing; write it")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="List, show, compare, check, export and remove checkpoints.",
        epilog=f"URL is {URL}: the one that save_state was given, which means the "
        "newest whole checkpoint under it, or that of one checkpoint.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help_: str, *urls: str) -> Any:
        made = commands.add_parser(
            name, help=help_, description=help_, allow_abbrev=False
        )
        for url in urls:
            made.add_argument(url, metavar=url.upper(), type=text, help=URL)
        say = "print one JSON document in place of tables"
        made.add_argument("--json", action="store_true", help=say)
        return made

    command("ls", "list every checkpoint under a URL, whole or not", "url")
    show = command("show", "say what a checkpoint holds, and in which files", "url")
    glob = "only names that fit, such as 'model.**' or '**.bias'"
    show.add_argument("--tensors", metavar="GLOB", type=text, help=glob)
    command("diff", "say what differs between two checkpoints", "a", "b")
    verify = command("verify", "read every byte of every file and check it", "url")
    every = "every checkpoint, not the newest alone"
    verify.add_argument("--all", action="store_true", help=every)
    _export(command("export", "write a model for other libraries", "url", "out"))
    _prune(command("prune", "remove checkpoints that are not needed any more", "url"))
    return parser


def _export(parser: Any) -> None:
    say = parser.add_argument
    say("--dtype", type=text, help="such as bfloat16; by default as it was saved")
    size = "of one file, by default 5GB"
    say("--max-shard-size", metavar="SIZE", type=text, default="5GB", help=size)


def _prune(parser: Any) -> None:
    say = parser.add_argument
    number = {"type": whole_number, "metavar": "N"}
    say("--last", required=True, help="how many of the newest stay", **number)
    say("--every", help="steps that N divides stay too", **number)
    metric = "the best by a metric stays too: loss:min"
    say("--best", type=best, metavar="METRIC:min|max", help=metric)
    either = parser.add_mutually_exclusive_group().add_argument
    either("--dry-run", action="store_true", help="show what would go, remove nothing")
    either("--yes", action="store_true", help="remove without asking")
