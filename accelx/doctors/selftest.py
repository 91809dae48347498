"""The self-test of an installation: which ranks run it, and what is made of it."""

from __future__ import annotations

import argparse
import sys

from accelx.doctors.options import whole_number
from accelx.doors import FAILED, Parser, aside, ended

TYPE_CHECKING = False  # importing `typing` would cost `--help` 10 ms
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Rows = list[dict[str, Any]]

PROGRAM = "python -m accelx.test"
TIMEOUT = 50.0  # seconds: the answer comes in less than a minute


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and print a table. Returns 0, 1 where one failed, 2 wrong use."""
    words = sys.argv[1:] if argv is None else list(argv)
    return ended("accelx.test", lambda: _run(_parser().parse_args(words)))


def _run(given: argparse.Namespace) -> int:
    import json
    from contextlib import nullcontext

    with aside() if given.json else nullcontext():
        data = tested(given.n, given.device, given.timeout)
    shown = json.dumps(data, indent=2) if given.json else "\n".join(lines(data))
    sys.stdout.write(f"{shown}\n")
    return 0 if data["sound"] else FAILED


def tested(n: int, device: str | None, timeout: float) -> dict[str, Any]:
    """What the checks found on `n` ranks. Raises SpawnError if a rank is lost."""
    from accelx.launch.caller import collect

    each: list[Rows] = collect(ran, (device, timeout), n, timeout)
    rows = merged(each)
    placed = each[0][0] if each[0] else {}
    return {
        "ranks": n,
        "device": placed.get("device"),
        "backend": placed.get("backend"),
        "checks": rows,
        "sound": all(row["result"] == "ok" for row in rows),
    }


def ran(device: str | None, timeout: float) -> Rows:
    """In a rank: every check up to the first that fails here."""
    import time
    import traceback

    from accelx.doctors.checks import CHECKS
    from accelx.env import close, connect

    env = connect(device=device, timeout=timeout)
    rows: Rows = []
    for name, check in CHECKS.items():
        began, error, text = time.perf_counter(), "", ""
        try:
            check(env)
        except Exception as failure:  # told in the table, with its traceback
            error = f"{type(failure).__name__}: {failure}"
            text = traceback.format_exc()
        rows.append(
            {
                "check": name,
                "seconds": time.perf_counter() - began,
                "error": error,
                "traceback": text,
                "time": time.monotonic(),
                "device": env.device,
                "backend": env.backend,
            }
        )
        if error:
            break  # the others would wait for this rank in the next one
    close(env)
    return rows


def merged(each: Sequence[Rows]) -> Rows:
    """One row a check: the slowest rank's time, and who failed first."""
    from accelx.doctors.checks import CHECKS
    from accelx.launch.failure import FOLLOWS

    found: Rows = []
    for i, name in enumerate(CHECKS):
        ranks = {r: rows[i] for r, rows in enumerate(each) if len(rows) > i}
        bad = {r: row for r, row in ranks.items() if row["error"]}

        def order(rank: int, bad: Mapping[int, Any] = bad) -> tuple[bool, float]:
            return FOLLOWS.search(bad[rank]["error"]) is not None, bad[rank]["time"]

        first = min(bad, key=order, default=-1)
        result = "FAILED" if bad else "ok" if len(ranks) == len(each) else "not run"
        found.append(
            {
                "check": name,
                "seconds": max((row["seconds"] for row in ranks.values()), default=0.0),
                "result": result,
                "rank": first if bad else None,
                "error": bad[first]["error"] if bad else "",
                "traceback": bad[first]["traceback"] if bad else "",
            }
        )
    return found


def lines(data: Mapping[str, Any]) -> list[str]:
    """The table, and what failed."""
    from accelx.doctors import text

    over = f" over {data['backend']}" if data["backend"] else ""
    failed = [row for row in data["checks"] if row["error"]]
    last = "all is well" if data["sound"] else "NOT well: see python -m accelx.doctor"
    return [
        f"{data['ranks']} ranks on {data['device']}{over}",
        "",
        *text.columns("check >time result", map(_cells, data["checks"])),
        "",
        *(f"rank {row['rank']}: {row['traceback']}" for row in failed),
        last,
    ]


def _cells(row: Mapping[str, Any]) -> tuple[str, str, str]:
    from accelx.doctors.text import duration

    took = duration(row["seconds"]) if row["seconds"] else "-"
    return row["check"], took, row["result"]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Try this installation on several ranks: collectives, placing, "
        "data, checkpoints. Exit code: 0 all is well, 1 not, 2 wrong use.",
        allow_abbrev=False,
    )
    say: Any = parser.add_argument
    many = "ranks on this machine, by default 2"
    say("-n", type=whole_number, default=2, metavar="N", help=many)
    say("--device", help="such as cpu; by default what accelx.connect chooses")
    limit = f"seconds for all of it, by default {TIMEOUT:g}"
    say("--timeout", type=float, default=TIMEOUT, help=limit)
    say("--json", action="store_true", help="print one JSON document")
    return parser
