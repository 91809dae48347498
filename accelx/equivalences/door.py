"""The command line of the comparison: which file, which layouts, which exit code."""

from __future__ import annotations

import argparse
import sys

from accelx.doors import FAILED, Parser, WrongUseError, aside, ended

TYPE_CHECKING = False  # importing `typing` would cost `--help` 10 ms
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

PROGRAM = "python -m accelx.equivalence"
NAME = "accelx_equivalence"  # `__name__` in the file: not "__main__", so none trains


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print. Returns 0 equal, 1 not equal or failed, 2 wrong use."""
    words = sys.argv[1:] if argv is None else list(argv)
    return ended("accelx.equivalence", lambda: _run(_parser().parse_args(words)))


def _run(given: argparse.Namespace) -> int:
    import json
    from contextlib import nullcontext

    build = _build(given.file)
    from accelx.equivalences.check import check_equivalence

    named = {k: v for k, v in vars(given).items() if k not in ("file", "json")}
    try:
        with aside() if given.json else nullcontext():
            report = check_equivalence(build, **named)
    except (ValueError, TypeError) as error:
        raise WrongUseError(str(error)) from error
    sys.stdout.write(f"{json.dumps(report.data, indent=2) if given.json else report}\n")
    return 0 if report.equal else FAILED


def _build(file: str) -> Any:
    """The function `build` of a file, which is run under another name than a script."""
    import runpy
    from pathlib import Path

    path = Path(file)
    if not path.is_file():
        raise WrongUseError(
            f"wants a Python file, but {file} is none; write the path of the file that "
            "has the function build"
        )
    sys.path.insert(0, str(path.resolve().parent))
    found = runpy.run_path(str(path), run_name=NAME)
    build = found.get("build")
    if not callable(build):
        raise WrongUseError(
            f"wants a function build in {file}, found none; write def build(): return "
            "model, optim, loss, data (and what trains under "
            'if __name__ == "__main__":)'
        )
    return build


def _numbers(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(
            f"wants whole numbers of at least 1, got {text!r}; write 1,2"
        )
    return tuple(map(int, words))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _dtype(text: str) -> str | None:
    return None if text == "own" else text


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Train by the function build of a file in several layouts and say "
        "where they part from one process with one batch.",
        epilog="build() returns (model, optim, loss, data), as accelx.check_equivalence"
        " says. Exit code: 0 equal, 1 not, 2 wrong use.",
        allow_abbrev=False,
    )
    say: Any = parser.add_argument
    say("file", help="a Python file with a function build")
    several = {"type": _numbers, "metavar": "N,N"}
    say("--ranks", default=(1, 2), help="numbers of ranks, by default 1,2", **several)
    say("--micro", default=(1, 2), help="of microbatches, by default 1,2", **several)
    kinds = "how the model is placed, by default ddp,fsdp2"
    words = {"type": _words, "metavar": "KIND,KIND"}
    say("--kinds", default=("ddp", "fsdp2"), help=kinds, **words)
    say("--steps", type=int, default=3, help="updates, by default 3")
    say("--tol", type=float, help="the largest relative gap that is rounding")
    own = "that all is cast to, by default float64; own leaves the model's"
    say("--dtype", default="float64", type=_dtype, help=own)
    say("--blocks", metavar="GLOB", help="as in shard_model, such as 'layers.*'")
    say("--timeout", type=float, default=120.0, help="seconds, by default 120")
    say("--json", action="store_true", help="print one JSON document")
    return parser
