"""Global random generators, lent to a source while it is read."""

from __future__ import annotations

import random
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import attrs
import torch


@attrs.define
class Lent:
    """Where the global generators stand for a source, while it is not read.

    What it draws then depends on the number that it started from, not on what the
    program drew before, whose own generators stay where they are.
    """

    python: Any
    torch: Any
    numpy: Any

    @classmethod
    def of(cls, start: int) -> Lent:
        """Generators of Python, torch and NumPy, where imported, from `start`."""
        numpy = sys.modules.get("numpy")
        drawn = None
        if numpy is not None:
            drawn = numpy.random.RandomState(start % 2**32).get_state()
        return cls(
            random.Random(start).getstate(),
            torch.Generator().manual_seed(start).get_state(),
            drawn,
        )

    @contextmanager
    def lent(self) -> Generator[None]:
        """The global generators stand where these do; afterwards where they were."""
        numpy: Any = sys.modules.get("numpy") if self.numpy is not None else None
        before = random.getstate(), torch.get_rng_state()
        drawn = None if numpy is None else numpy.random.get_state()
        random.setstate(self.python)
        torch.set_rng_state(self.torch)
        if numpy is not None:
            numpy.random.set_state(self.numpy)
        try:
            yield
        finally:
            self.python, self.torch = random.getstate(), torch.get_rng_state()
            random.setstate(before[0])
            torch.set_rng_state(before[1])
            if numpy is not None:
                self.numpy = numpy.random.get_state()
                numpy.random.set_state(drawn)
