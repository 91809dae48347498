"""The door to ranks on this machine, for a command line and for a program."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

TYPE_CHECKING = False  # importing `typing` would cost `--help` 10 ms
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal

__all__ = ["spawn"]


def spawn(
    fn: Callable[..., Any],
    *args: Any,
    n: int | Literal["auto"],
    timeout: float | None = None,
    prefix: bool | None = None,
) -> list[Any]:
    """Call `fn(*args)` in `n` new processes; their results, in the order of ranks.

    Each rank has the variables of a launched one: `connect()` within `fn` joins them.
    `fn` and `args` travel by pickle, and a script that calls spawn does so under
    `if __name__ == "__main__":`. Lambdas, closures and what was typed into a notebook
    travel by cloudpickle (`accelx[notebook]`), with the globals that they use.
    `n="auto"` is one rank per GPU. `timeout` is in seconds, the start of the ranks
    included. `prefix` starts each line of output with `[rank]`; None does so where
    this process's output is redirected in Python, as to a notebook's cell.

    Effects: processes, none of them forked from this one, which end with it; a
    temporary folder, which is removed. Raises what the rank that failed first has
    raised, from a SpawnError with its traceback; SpawnError alone for other ends.
    """
    from accelx.errors import SpawnError
    from accelx.launch.caller import collect

    try:
        return collect(fn, args, n, timeout, prefix)
    except SpawnError as failed:
        if failed.error is None:
            raise
        raise failed.error from failed


class _Callable(ModuleType):
    """This module, which is called like the function of its name."""

    def __call__(self, *args: Any, **named: Any) -> list[Any]:
        return spawn(*args, **named)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return import_module, (self.__name__,)  # pickle sends a plain module by name


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    from accelx.launch.door import main

    sys.exit(main())
