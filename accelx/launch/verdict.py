"""What is said of a run that has ended, and its exit code."""

from __future__ import annotations

from accelx.launch.failure import Failure, first
from accelx.launch.running import End, Run
from accelx.launch.told import elsewhere, names, odd, told


def verdict(run: Run) -> End:
    """The root cause, what became of the other ranks, and the exit code."""
    failures = [rank.failure for rank in run.ranks if rank.failure is not None]
    notes = [f"{names(run.unkind)} did not end in time and had to be killed"]
    notes *= bool(run.unkind)
    if failures:
        root = _root(run, failures)
        late = _late(failures, root)
        others = sum(bool(r.code) for r in run.ranks if r.number != root.rank)
        text = told(root, run.plan.host, 0 if late else others)
        notes += [*_early(run, root), *late, *run.notes]
        return End(root.code, root, "\n".join([text, *notes]))
    codes = [rank.code for rank in run.ranks if rank.code]
    if run.asked is None or not codes:
        return End(0, None, "\n".join(notes))
    own = [code for code in codes if code < 128]  # a rank's own choice, by sys.exit
    return End(own[0] if own else 128 + run.asked, None, "\n".join(notes))


def _root(run: Run, failures: list[Failure]) -> Failure:
    before = [failure for failure in failures if failure.time <= run.stopped_at]
    root = first(before or failures)
    late = [failure for failure in failures if failure.kind == "timeout"]
    return odd(late) if root in late else root


def _late(failures: list[Failure], root: Failure) -> list[str]:
    late = [failure for failure in failures if failure.kind == "timeout"]
    return elsewhere(late, root) if root in late else []


def _early(run: Run, root: Failure) -> list[str]:
    done = [rank.number for rank in run.ranks if rank.code == 0]
    if not root.follows or not done:
        return []
    return [f"{names(done)} had ended before, with exit code 0"]
