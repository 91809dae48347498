"""What is left of a run: its last words on the screen, and a file beside the logs."""

from __future__ import annotations

import sys
from pathlib import Path

from accelx.launch.failure import Failure, dumps
from accelx.launch.plan import Plan
from accelx.launch.running import End
from accelx.launch.told import report


def conclude(plan: Plan, end: End) -> int:
    """Say how the run ended, and leave it in a file. Returns the exit code."""
    if plan.asked.kind == "call":
        if end.failure is not None:
            (Path(plan.asked.target) / "failure.json").write_bytes(dumps(end.failure))
        return end.code
    complaint = "" if end.failure is None else leave(plan, end.failure)
    text = "\n".join(filter(None, (complaint, end.text)))
    if text:
        sys.stdout.flush()
        sys.stderr.write(f"{text}\n")
    return end.code


def leave(plan: Plan, failure: Failure, part: str = "") -> str:
    """Write the failure beside the logs, if there are any; why that was not possible.

    `part` is a folder in that of the logs.
    """
    if plan.log_dir is None:
        return ""
    path = Path(plan.log_dir, part, "failure.json")
    try:
        path.write_text(report(failure))
    except OSError as error:  # a full disk may be what the run failed of
        return f"accelx.spawn: no {path}: {error.strerror}"
    return ""
