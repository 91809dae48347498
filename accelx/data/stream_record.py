"""What is known of a stream: a frozen record of what is read, and for which rank."""

from __future__ import annotations

from typing import Any

import attrs
from torch.utils.data import default_collate

from accelx import fetch
from accelx.errors import DataError
from accelx.permutation import check_seed
from accelx.records import Env, code


def _rows(_: object, __: object, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if value is not None and not whole:
        raise DataError(
            f"batch_size must be a whole number of at least 1, got {value!r}; write "
            "batch_size=1 or more, or None for a stream that gives whole batches"
        )


@attrs.frozen(repr=False)
class Stream:
    """A source whose items have no index, and how its rows come to this rank.

    With a `batch_size` the source gives rows, which are collated here; with None it
    gives whole batches, which are cut.
    """

    source: Any = attrs.field(eq=id, repr=False)
    batch_size: int | None = attrs.field(validator=_rows)  # rows over all ranks
    drop_last: bool = attrs.field(default=False, kw_only=True)  # no short batch
    collate: fetch.Collate = attrs.field(default=default_collate, kw_only=True)
    rank: int = attrs.field(default=0, kw_only=True)
    world: int = attrs.field(default=1, kw_only=True)
    device: str = attrs.field(default="cpu", kw_only=True)  # where batches arrive
    seed: int = attrs.field(default=0, kw_only=True)  # of what is drawn while reading
    env: Env | None = attrs.field(default=None, kw_only=True)  # with which ranks meet
    # The rest is handed to torch's workers, which end with each epoch.
    num_workers: int = attrs.field(default=0, kw_only=True)
    timeout: float = attrs.field(default=0, kw_only=True)  # seconds
    worker_init_fn: fetch.Init = attrs.field(default=None, kw_only=True)
    multiprocessing_context: Any = attrs.field(default=None, kw_only=True)
    prefetch_factor: int | None = attrs.field(default=None, kw_only=True)
    persistent_workers: bool = attrs.field(default=False, kw_only=True)
    pin_memory: bool = attrs.field(default=False, kw_only=True)  # CUDA always has it

    def __attrs_post_init__(self) -> None:
        check_seed(self.seed)
        if self.world > 1 and (self.env is None or self.env.world != self.world):
            raise DataError(
                f"a stream over {self.world} ranks wants the Env by which they meet, "
                f"got env={self.env!r}; write ax.shard_loader(env)(source), or put "
                "shard_loader(env) into the chain that feed gets"
            )

    def __repr__(self) -> str:
        name = type(self.source).__name__
        return code(f"Stream(<{name}>, ", self).replace(", (", ", ", 1)

    def share(self, m: int, i: int, of: int) -> int:
        """How many of `m` rows are those of the i-th of `of` ranks."""
        return m * (i + 1) // of - m * i // of


@attrs.frozen
class Spot:
    """Where a reading stands: at `step`, in an epoch that began at step `first`."""

    epoch: int = 0
    first: int = 0
    step: int = 0
    live: tuple[int, ...] | None = None  # ranks with rows left; None for all of them
    used: int = 0  # rows taken of the chunk that comes next
    state: Any = None  # of this rank's source, before that chunk
