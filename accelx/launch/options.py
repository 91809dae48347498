"""What the words of the launcher's command line mean, and what to write instead."""

from __future__ import annotations

import argparse

from accelx.errors import SpawnError

TYPE_CHECKING = False  # importing `typing` would cost `--help` 10 ms
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

PROGRAM = "python -m accelx.spawn"
GRACE = 30.0  # seconds, as torchrun's
# What other launchers call what is `-n` here.
FOREIGN = ("--nproc-per-node", "--num-processes", "--np", "--ntasks")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SpawnError(f"{message}\nall options: {PROGRAM} --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The words as they were given; `settings` says what their values mean.

    Raises SpawnError, with the nearest option for one that does not exist; `--help`
    prints and exits.
    """
    parser = _parser()
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        _unknown(parser, unknown[0])
    return given


def _unknown(parser: _Parser, word: str) -> NoReturn:
    import re

    from accelx.launch.nearest import nearest

    options = re.findall(r"(?<![\w-])--?[a-z][\w-]*", parser.format_help())
    name = word.partition("=")[0]
    near = "-n" if nearest(name, FOREIGN, 0.8) else nearest(name, options)
    instead = f"did you mean {near}?" if near else "write the script's after the script"
    parser.error(f"there is no option {name}; {instead}")


def _parser() -> _Parser:
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} -n N [options] [-m] script [args ...]",
        description="Start a script as N ranks on this machine, or on each of several.",
        epilog="A setting may also be ACCELX_NAME in the environment, or stand in "
        "accelx.toml; --print shows all, with their sources.",
        allow_abbrev=False,
    )
    say = parser.add_argument
    count = "number of ranks: 8; auto is one per GPU, or per NUMA node"
    say("-n", "--num-ranks", dest="num_ranks", metavar="N", help=count)
    _add_kinds(parser)
    _add_nodes(parser)
    logs = "write each rank's output to DIR/rank-N.log too, a failure to failure.json"
    say("--logs", "--log-dir", dest="log_dir", metavar="DIR", help=logs)
    _add_prefix(parser)
    say("--print", action="store_true", help="show every setting and start nothing")
    wait = f"seconds from a request to stop until SIGKILL, by default {GRACE:g}"
    say("--grace", metavar="S", help=wait)
    whole = "seconds that the run may take; then ranks show their stacks and end"
    say("--timeout", metavar="S", help=whole)
    cores = "each rank's cores: its own (auto, always), those of a NUMA node, never"
    say("--bind", metavar="HOW", help=cores)
    file = "read settings from FILE, by default from accelx.toml if it is here"
    say("--config", metavar="FILE", help=file)
    say("target", metavar="script", help="a Python file, or a module after -m")
    rest = "handed to the script as they are"
    say("args", nargs=argparse.REMAINDER, default=[], help=rest)
    return parser


def _add_prefix(parser: _Parser) -> None:
    prefix = "start each line of output with [rank]"
    for flag, const, text in (
        ("--prefix", "yes", prefix),
        ("--no-prefix", "no", argparse.SUPPRESS),  # over a file that says yes
    ):
        parser.add_argument(
            flag, action="store_const", dest="prefix", const=const, help=text
        )


def _add_nodes(parser: _Parser) -> None:
    say = parser.add_argument_group("several machines, and starting again").add_argument
    for flag, name, metavar, text in (
        ("--nodes", None, "N", "machines: 2, or 1:4 for as many as there are"),
        ("--min", "min_ranks", "R", "the same, as ranks: the fewest over all machines"),
        ("--max", "max_ranks", "R", "and the most"),
        (
            "--rendezvous",
            None,
            "HOST:PORT",
            "where they meet: an address of one of them",
        ),
        ("--node-rank", None, "K", "which of them this is, from 0; auto by default"),
        ("--job-id", None, "NAME", "machines of other jobs are refused"),
        ("--restarts", None, "N", "how often ranks start again after a failure"),
        ("--last-call", None, "S", "seconds to wait for more machines than the fewest"),
        ("--join-timeout", None, "S", "seconds to wait for the fewest"),
        ("--lost-after", None, "S", "seconds without a sign until a machine is gone"),
    ):
        dest = name or flag.strip("-").replace("-", "_")
        say(flag, dest=dest, metavar=metavar, help=text)


def _add_kinds(parser: _Parser) -> None:
    kind = parser.add_mutually_exclusive_group()
    for flags, text in (
        (("-m", "--module"), "the script is named as in python -m package.module"),
        (("--call",), argparse.SUPPRESS),  # a folder that `spawn` has written
    ):
        const = flags[-1].removeprefix("--")
        kind.add_argument(
            *flags, action="store_const", dest="kind", const=const, help=text
        )
