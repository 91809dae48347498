"""The cell magic of notebooks: `%load_ext accelx`, then `%%accelx -n 2`."""

from __future__ import annotations

import linecache
import shlex
from typing import Any

from accelx.errors import SpawnError
from accelx.launch import carry, cell as cells, config, environ
from accelx.launch.call import UNSENDABLE
from accelx.launch.caller import GRACE, launched
from accelx.launch.options import parse
from accelx.launch.plan import asked_for
from accelx.launch.settings import KNOWN, decide

TARGET = "cell"  # in the place of a script, for messages


def load_ipython_extension(shell: Any) -> None:
    """Add the cell magic `%%accelx`, when IPython does `%load_ext accelx`.

    Effect: registers it with `shell`, the IPython shell.
    """

    def accelx(line: str, cell: str) -> Any:
        """Run the cell on N ranks of this machine: `%%accelx -n N [options]`.

        `env` is each rank's connected Env. Names of the notebook that the cell uses go
        to the ranks, by value; what the cell binds stays there. The result is what the
        last expression gives on rank 0. Options are those of `python -m accelx.spawn`,
        and so are the settings of the environment and of accelx.toml.
        """
        return _ran(shell, line, cell)

    shell.register_magic_function(accelx, "cell", "accelx")


def _ran(shell: Any, line: str, cell: str) -> Any:
    words = options(line)
    source = cells.numbered(cell)
    _check(shell, cell)
    names = [name for name in cells.used(source) if _is_users(shell, name)]
    bearer = cells.bearer(names, shell.user_ns)
    linecache.cache[cells.NAME] = (
        *(len(source), None),
        *(source.splitlines(keepends=True), cells.NAME),
    )
    try:
        results = launched(cells.run, (bearer, source), words)
    except SpawnError as failed:
        if isinstance(failed.__cause__, UNSENDABLE):
            _blame(names, shell.user_ns)
        if failed.error is None:
            raise
        raise failed.error from failed
    return None if cell.rstrip().endswith(";") else results[0]


def options(line: str) -> list[str]:
    """The launcher's options that the magic's line, the environment and the file give.

    Raises SpawnError for what the launcher would not take, and for a script.
    """
    given = parse([*shlex.split(line), TARGET])
    if given.target != TARGET or given.args or given.kind or given.print:
        kind = "-m" if given.kind == "module" else given.kind
        wrong = "--print" if given.print else kind
        raise SpawnError(
            f"%%accelx runs its cell and takes settings alone, got {line.strip()!r}; "
            f"leave {wrong or given.target} out, such as %%accelx -n 2"
        )
    asked = asked_for(given)
    chosen = decide(asked.words, environ.read(), config.read(asked.config))
    said = {k.option: chosen[k.name] for k in KNOWN if k.name != "prefix"}
    said = {o: c.value for o, c in said.items() if c.source != "default"}
    said.setdefault("--grace", GRACE)  # as of a call: somebody waits at the notebook
    words = [w for o, v in said.items() if v is not None for w in (o, str(v))]
    prefix = chosen["prefix"]  # the lines of all ranks stand below one another
    return words + ["--prefix"] * (prefix.value or prefix.source == "default")


def _check(shell: Any, cell: str) -> None:
    """Refuse magics and shell commands: the ranks have no notebook."""
    hook = "get_ipython()"
    if hook in shell.transform_cell(cell) and hook not in cell:
        raise SpawnError(
            "a cell of %%accelx is run by ranks, which have no notebook, and a magic "
            "(%) or a shell command (!) stands in it; write it in a cell of its own"
        )


def _is_users(shell: Any, name: str) -> bool:
    """Whether the name is the notebook's, and not put there by IPython."""
    if name == "env" or name not in shell.user_ns:
        return False
    hidden = shell.user_ns_hidden
    return name not in hidden or shell.user_ns[name] is not hidden[name]


def _blame(names: list[str], session: dict[str, Any]) -> None:
    """Name the object that cannot be sent. Nothing if each can by itself."""
    for name in names:
        try:
            carry.whole(cells.bearer([name], session))
        except UNSENDABLE as error:
            raise SpawnError(
                f"the cell uses {name}, which cannot be sent to other processes "
                f"({error}); make it within the cell"
            ) from error
