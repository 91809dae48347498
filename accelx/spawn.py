"""The door to ranks on this machine, for a command line and for a program."""

from __future__ import annotations

import sys
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
) -> list[Any]:
    """Call `fn(*args)` in `n` new processes; their results, in the order of ranks.

    Each rank has the variables of a launched one: `connect()` within `fn` joins them.
    `fn` and `args` travel by pickle: `fn` stands at the top of a module, and a script
    that calls spawn does so under `if __name__ == "__main__":`. `n="auto"` is one rank
    per GPU. `timeout` is in seconds, the start of the ranks included.

    Effects: processes, which end with this one; a temporary folder, which is removed.
    Raises SpawnError with the traceback of the rank that failed first.
    """
    from accelx.launch.caller import collect

    return collect(fn, args, n, timeout)


class _Callable(ModuleType):
    """This module, which is called like the function of its name."""

    def __call__(self, *args: Any, **named: Any) -> list[Any]:
        return spawn(*args, **named)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    from accelx.launch.door import main

    sys.exit(main())
