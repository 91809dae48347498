"""How what fails on one rank is heard by all, so that none waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import attrs

from accelx import comm
from accelx.errors import CheckpointError, DamagedError
from accelx.records import Env

T = TypeVar("T")


@attrs.frozen
class Failure:
    """What the first rank that failed says."""

    text: str
    damaged: bool = False  # bytes are not those that were saved
    unread: bool = False  # the store did not give them

    @property
    def error(self) -> CheckpointError:
        """The error that each rank raises."""
        return (DamagedError if self.damaged else CheckpointError)(self.text)


def outcome(env: Env, do: Callable[[], T]) -> tuple[T | None, Failure | None]:
    """What `do()` gives here, or the failure of a rank, the same on all of them.

    One small collective, after `do`. One process raises what is no error of accelx's
    nor of a store, as it is.
    """
    made: T | None = None
    told: Failure | None = None
    try:
        made = do()
    except Exception as error:  # told to all ranks
        known = isinstance(error, CheckpointError | OSError)
        if not known and env.world == 1:
            raise
        text = str(error) if known else f"{type(error).__name__}: {error}"
        kinds = (isinstance(error, kind) for kind in (DamagedError, OSError))
        told = Failure(text, *kinds)
    for rank, failure in enumerate(comm.gather_objects(env, told)):
        if failure is not None:
            where = "" if env.world == 1 else f"rank {rank}: "
            return None, attrs.evolve(failure, text=where + failure.text)
    return made, None


def alike(env: Env | None, do: Callable[[], T]) -> T:
    """What `do()` gives here; raises on all ranks if it fails on one."""
    if env is None or env.world == 1:
        return do()
    made, failure = outcome(env, do)
    if failure is not None:
        raise failure.error
    return cast(T, made)


def from_main(env: Env | None, do: Callable[[], T]) -> T:
    """What `do()` gives on rank 0."""
    if env is None or env.world == 1:
        return do()
    made: Any = alike(env, lambda: do() if env.main else None)
    return comm.gather_objects(env, made)[0]
