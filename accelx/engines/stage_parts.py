"""How a batch is cut into the microbatches of a pipeline: of one shape, at least n."""

from __future__ import annotations

from collections.abc import Callable

from accelx.cut import Args, pieces
from accelx.errors import DataError
from accelx.rows import Rows, leading, stamp


def microbatches(
    args: Args, n: int, rows: Rows, count: Callable[[int], int]
) -> list[Args]:
    """`args` in groups of equally many rows, as few as `n` and its rows allow.

    Groups that only fill up, to `count(groups)`, repeat rows and are marked as none.
    Raises DataError for a batch without rows.
    """
    length = leading(*args)
    if not length:
        got = "no tensor with a dimension" if length is None else "tensors of 0 rows"
        raise DataError(
            f"shard_stages(n={n}) wants a batch with rows to cut, got {got}; give step "
            "the batch as an argument, as ax.feed makes it, which has a row, of no "
            "weight, for a rank without any"
        )
    if rows.rows > length or (rows.rows != length and rows.rows and not rows.padded):
        raise DataError(
            f"the batch says that it has {rows.rows} rows here, but its tensors have "
            f"{length}; do not add or drop rows after ax.feed"
        )
    groups = next((d for d in range(n, length) if not length % d), length)
    size = length // groups
    parts = [
        stamp(part, Rows(min(max(rows.rows - i * size, 0), size), *_rest(rows)))
        for i, part in enumerate(pieces(args, "", [size] * groups))
    ]
    none = Rows(0, *_rest(rows))
    for _ in range(count(max(groups, n)) - groups):
        parts.append(stamp(pieces(parts[0], "", [size])[0], none))
    return parts


def _rest(rows: Rows) -> tuple[int, bool]:
    return rows.total, rows.padded


def legal(schedule: str, ranks: int, stages: int) -> Callable[[int], int]:
    """How many microbatches a schedule takes, for at least so many."""

    def count(least: int) -> int:
        if schedule == "1f1b":
            return max(least, stages)
        if schedule in ("interleaved", "zero_bubble"):  # in rounds of one size
            while least % max(1, least // ranks):
                least += 1
        return least

    return count
