"""A plug-in of pytest: the fixture `ranks`, for tests of your own distributed code."""

from __future__ import annotations

import faulthandler
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelx.env_axes import Axes

    Launch = Callable[[Callable[..., Any]], Callable[..., list[Any]]]

TIMEOUT = 60.0  # seconds, the start of the ranks included
MARGIN = 1.0  # seconds before the end when stacks are written, a quarter at most
OPTION = "accelx_timeout"
OWN = f'File "{__file__}"'  # the frame under which a test's function runs


def pytest_addoption(parser: Any) -> None:
    """Tell pytest of the setting."""
    say = f"seconds that the fixture ranks gives a call, by default {TIMEOUT:g}"
    parser.addini(OPTION, say, default=str(TIMEOUT))


def pytest_configure(config: Any) -> None:
    """Give pytest the fixture; pytest itself is imported only here."""
    config.pluginmanager.register(_fixtures(config), "accelx-fixtures")


def _fixtures(config: Any) -> Any:
    import pytest

    text = config.getini(OPTION)
    if not text.replace(".", "", 1).isdecimal() or not float(text):
        raise pytest.UsageError(
            f"{OPTION} wants a number of seconds above 0, got {text!r}; write "
            f"{OPTION} = 30"
        )

    def ranks() -> Callable[..., Launch]:
        """Start ranks: `ranks(2)(fn)(*args)` is each one's result of fn(env, *args).

        As accelx.testing.run, over gloo on CPUs; where they do not come to an end, the
        error shows where each of them stands.
        """

        def launching(
            n: int, *, timeout: float | None = None, axes: Axes | None = None
        ) -> Launch:
            limit = float(text) if timeout is None else timeout
            return run_with_stacks(n, timeout=limit, axes=axes)

        return launching

    found: Any = ModuleType(
        "accelx_fixtures"
    )  # pytest takes them from a module's names
    found.ranks = pytest.fixture(ranks)
    return found


def run_with_stacks(n: int, *, timeout: float, axes: Axes | None = None) -> Launch:
    """`accelx.testing.run`, whose error has the Python stack of each rank that hangs.

    Stacks are written shortly before the time is over. Raises RankError.
    """
    from accelx import testing

    def launch(fn: Callable[..., Any]) -> Callable[..., list[Any]]:
        def call(*args: Any) -> list[Any]:
            import_module("torch.distributed")  # here once, not in each rank: 2 s
            with tempfile.TemporaryDirectory(prefix="accelx-stacks-") as name:
                folder = Path(name)
                at = time.monotonic() + timeout - min(MARGIN, timeout / 4)

                def watched(env: Any, *args: Any) -> Any:
                    return _watched(folder / str(env.rank), at, fn, env, *args)

                try:
                    return testing.run(n, timeout=timeout, axes=axes)(watched)(*args)
                except testing.RankError as error:
                    stacks = _stacks(folder, n)
                    if not stacks:
                        raise
                    raise testing.RankError(f"{error}\n\n{stacks}") from None

        return call

    return launch


def _watched(path: Path, at: float, fn: Callable[..., Any], *args: Any) -> Any:
    """In a rank: run the function, and write where it stands if it still does then."""
    left = max(0.05, at - time.monotonic())
    with path.open("w") as file:
        faulthandler.dump_traceback_later(left, file=file)
        try:
            return fn(*args)
        finally:
            faulthandler.cancel_dump_traceback_later()


def _stacks(folder: Path, n: int) -> str:
    """What each rank was doing, the innermost call first; empty if none was late."""
    told = list[str]()
    for rank in range(n):
        path = folder / str(rank)
        lines = _program_part(path.read_text()) if path.exists() else []
        if lines:
            told += [f"rank {rank} stands at:", *lines]
        elif not path.exists():
            told += [f"rank {rank} has not come to its function"]
    return "\n".join(told) if any(line.startswith(" ") for line in told) else ""


def _program_part(text: str) -> list[str]:
    """Of what faulthandler wrote, the frames of the main thread above our own."""
    _, _, main = text.rpartition("(most recent call first):\n")
    lines = list[str]()
    for line in main.splitlines():
        if OWN in line:
            break
        lines.append(line)
    return lines
