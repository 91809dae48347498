"""How reports and progress are put on a terminal, or into a pipe, by rich."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from accelx.checkpoints.tables import Table, plain
from accelx.errors import MissingExtraError

WIDE = 10_000  # columns of what is no terminal: nothing is cut there


def check_installed() -> None:
    """Refuse to begin what could not be shown at its end."""
    if find_spec("rich") is None:
        raise MissingExtraError(
            "tables want the package rich, but it is not installed; write "
            "pip install 'accelx[cli]', or --json, which works without"
        )


def write(blocks: Sequence[Table | str]) -> None:
    """Lines and tables to the standard output.

    As wide as the terminal, as the variable COLUMNS says, or without limit; text folds
    where that is too narrow; nothing is cut.
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.text import Text

    wide = shutil.get_terminal_size((WIDE, 0)).columns
    console = Console(width=wide, markup=False, highlight=False, emoji=False)
    made = [_made(b) if isinstance(b, Table) else Text(plain(b)) for b in blocks]
    for one in made:
        if not isinstance(one, Text):
            free = console.options.update(max_width=WIDE)
            need = Measurement.get(console, free, one).minimum
            console.width = max(console.width, need)
    with console.capture() as captured:
        for one in made:
            console.print(one, soft_wrap=isinstance(one, Text))
    _put("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def _made(table: Table) -> Any:
    from rich.table import Table as Rich
    from rich.text import Text

    made = Rich(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for one in table.columns:
        justify = "right" if one.right else "left"
        made.add_column(
            one.name, justify=justify, no_wrap=not one.folds, overflow="fold"
        )
    for row in table.rows:
        made.add_row(*(Text(plain(cell)) for cell in row))
    return made


def write_json(data: Any) -> None:
    """One JSON document to the standard output."""
    _put(json.dumps(data, indent=2) + "\n")


def _put(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def ask(lines: Sequence[str]) -> bool:
    """Put a question on the standard error; whether the answer is yes."""
    sys.stderr.write("\n".join(map(plain, lines)) + " [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextmanager
def progress(
    what: str, total: int | None, shown: bool
) -> Generator[Callable[[int], None]]:
    """A bar on the standard error, if `shown` and that is a terminal.

    Gives what is called with each number of bytes that are done, by any thread. Without
    a total it shows that time goes by.
    """
    if not (shown and sys.stderr.isatty()):
        yield lambda size: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns: list[Any] = [bars.TextColumn("{task.description}"), bars.BarColumn()]
    if total is not None:
        columns += [bars.DownloadColumn(), bars.TimeRemainingColumn()]
    columns.append(bars.TimeElapsedColumn())
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.advance(task, size)
