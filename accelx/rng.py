"""From which number every random generator of a rank starts."""

from __future__ import annotations

import operator
import random
import sys
from typing import TYPE_CHECKING, SupportsIndex

from accelx.env_part import rows_env

if TYPE_CHECKING:
    from accelx.records import Env

LAST = 2**63 - 1  # what torch takes on every device


def seed(env: Env, n: int, per_rank: bool = False) -> None:
    """Start the global generators of Python, NumPy and torch from `n`.

    The same on all ranks, so that they make the same weights; with `per_rank` rank r
    starts from `n + r`, for noise that differs; ranks that share rows draw alike.
    torch's covers the CPU and every device; NumPy's is set (to `n` modulo 2**32) if
    NumPy is imported by now. These generators are global: this is an effect on the
    whole process.
    Raises ValueError unless the number is in 0 to 2**63 - 1 on every rank.
    """
    rows = rows_env(env)  # ranks that share rows must draw alike
    last = LAST - (rows.world - 1 if per_rank else 0)
    if not isinstance(n, SupportsIndex) or not 0 <= n <= last:  # type: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"seed wants an integer from 0 to {last}, got {n!r}; "
            "write for example seed(env, 0)"
        )
    import torch

    from accelx import rng_device

    n = operator.index(n)
    start = n + rows.rank if per_rank else n
    random.seed(start)
    torch.manual_seed(start)
    rng_device.seed(env.device, start)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(start % 2**32)
