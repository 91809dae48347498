"""Which value each setting of the launcher has, and who decided it; pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from accelx.errors import SpawnError
from accelx.launch import texts
from accelx.launch.nearest import nearest
from accelx.launch.options import GRACE, PROGRAM

PREFIX = "ACCELX_"
# Variables of that name which are no settings: what the launcher tells its ranks.
TOLD = {"LAUNCHER", "REPORTS", "SPAWN_LOADS"}
NEAR = 0.7  # how like a setting a variable's name must be to be taken for a slip
YES, NO = {"yes", "true", "on", "1"}, {"no", "false", "off", "0"}


@attrs.frozen
class Known:
    """A setting: `name` in the file, `ACCELX_NAME` in the environment."""

    name: str
    option: str  # on the command line
    wanted: str  # what a value of it is, for a message
    example: str  # as the file has it
    read: Callable[[str], Any]  # raises ValueError
    default: Any = None
    more: str = ""  # what else to write


@attrs.frozen
class File:
    """What a settings file holds."""

    path: str
    values: Mapping[str, object]


@attrs.frozen
class Choice:
    """The value of a setting, and who decided it."""

    value: Any
    source: str  # "command line", "environment: NAME", a file's path, or "default"


def decide(
    words: Mapping[str, str], environ: Mapping[str, str], file: File | None
) -> dict[str, Choice]:
    """Every setting with its source: command line, environment, file, default.

    `words` are the command line's, by the names of settings. Each later source is asked
    only where the earlier ones are silent; an empty variable is silent. Raises
    SpawnError for a value that cannot be meant, and for a name that is no setting, with
    the nearest that is one.
    """
    if file is not None:
        _check_keys(file)
    _check_variables(environ)
    return {known.name: _choice(known, words, environ, file) for known in KNOWN}


def num_ranks(text: str) -> int | str:
    """`8` or `auto`."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(text)
    return int(text)


def seconds(text: str) -> float:
    """A number of seconds, 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(text)
    return value


def whole(text: str) -> float:
    """A number of seconds, 1 or more."""
    if not (value := seconds(text)) >= 1:
        raise ValueError(text)
    return value


def limit(text: str) -> float | None:
    """A number of seconds above 0, or `none`."""
    if text == "none":
        return None
    if not (value := seconds(text)):
        raise ValueError(text)
    return value


def switch(text: str) -> bool:
    """`yes` or `no`, or another word for it."""
    if text.lower() not in YES | NO:
        raise ValueError(text)
    return text.lower() in YES


def folder(text: str) -> str | None:
    """A path, or `none`."""
    if not text:
        raise ValueError(text)
    return None if text == "none" else text


def binding(text: str) -> str:
    """`auto`, `always`, `numa` or `never`."""
    if text not in ("auto", "always", "numa", "never"):
        raise ValueError(text)
    return text


KNOWN = (
    Known(
        *("num_ranks", "-n", "the number of ranks is 1 or more", "2", num_ranks),
        more=", or {} for one rank per GPU",
    ),
    Known("log_dir", "--log-dir", "the folder of logs is a path", '"logs"', folder),
    Known("prefix", "--prefix", "prefix is yes or no", "true", switch, False),
    Known(
        *("grace", "--grace", "a time in seconds is 0 or more", "30", seconds, GRACE),
    ),
    Known(
        *("timeout", "--timeout", "a time limit in seconds is more than 0, or none"),
        *("600", limit),
    ),
    Known(
        *("bind", "--bind", "bind is auto, always, numa or never", '"auto"', binding),
        "auto",
    ),
    Known(
        *("nodes", "--nodes", "nodes is a number from 1, or a range such as 1:4"),
        *("2", texts.nodes),
    ),
    Known(
        *("min_ranks", "--min", "the fewest ranks are a number from 1", "4"),
        texts.several,
    ),
    Known(
        *("max_ranks", "--max", "the most ranks are a number from 1", "8"),
        texts.several,
    ),
    Known(
        *("node_rank", "--node-rank", "the rank of a node is a number from 0, or auto"),
        *('"auto"', texts.node_rank),
    ),
    Known(
        *("rendezvous", "--rendezvous", "nodes meet at an address, host:port"),
        *('"node0:29400"', texts.endpoint),
    ),
    Known(
        *("job_id", "--job-id", "a job's name is one word"),
        *('"run-7"', texts.name),
    ),
    Known(
        *("restarts", "--restarts", "restarts are a number, 0 or more", "3"),
        *(texts.count, 0),
    ),
    Known(
        *("last_call", "--last-call", "a time in seconds is 0 or more", "10"),
        *(seconds, 10.0),
    ),
    Known(
        *("join_timeout", "--join-timeout", "a time in seconds is 1 or more", "600"),
        *(whole, 600.0),
    ),
    Known(
        *("lost_after", "--lost-after", "a time in seconds is 1 or more", "10", whole),
    ),
)


def _choice(
    known: Known,
    words: Mapping[str, str],
    environ: Mapping[str, str],
    file: File | None,
) -> Choice:
    variable = PREFIX + known.name.upper()
    if known.name in words:
        text, where, form = words[known.name], "", f"{known.option} {{}}"
        return Choice(_read(known, text, text, where, form), "command line")
    if environ.get(variable):
        text, where, form = environ[variable], f" in {variable}", f"{variable}={{}}"
        return Choice(_read(known, text, text, where, form), f"environment: {variable}")
    if file is not None and known.name in file.values:
        raw = file.values[known.name]
        where, form = f" in {file.path}", f"{known.name} = {{}}"
        return Choice(_read(known, raw, _text(raw), where, form), file.path)
    return Choice(known.default, "default")


def _read(known: Known, raw: object, text: str, where: str, form: str) -> Any:
    try:
        return known.read(text)
    except ValueError:
        pair = known.example, '"auto"'
        write, auto = (w if " = " in form else w.strip('"') for w in pair)
        raise SpawnError(
            f"{known.wanted}, got {raw!r}{where}; write {form.format(write)}"
            + known.more.format(form.format(auto))
        ) from None


def _text(raw: object) -> str:
    """A value of the file as the command line would have it; empty for a list."""
    if isinstance(raw, bool):
        return "yes" if raw else "no"
    return str(raw) if isinstance(raw, int | float | str) else ""


def _check_keys(file: File) -> None:
    names = [known.name for known in KNOWN]
    for key in file.values:
        if key not in names:
            near = nearest(key, names)
            instead = f"did you mean {near}?" if near else "remove it"
            raise SpawnError(
                f"{file.path} holds settings of {PROGRAM} ({', '.join(names)}), got "
                f"{key!r}; {instead}"
            )


def _check_variables(environ: Mapping[str, str]) -> None:
    """Refuse a slip. Others may be named so: a Kubernetes service called accelx is."""
    names = [known.name for known in KNOWN]
    for variable in environ:
        name = variable.removeprefix(PREFIX)
        if name in (variable, *TOLD) or name.lower() in names:
            continue
        near = nearest(name, names, NEAR)
        if near:
            raise SpawnError(
                f"the environment has {variable}, which is no setting of {PROGRAM}; "
                f"did you mean {PREFIX}{near.upper()}?"
            )
