"""How a call and its results travel between a program and its ranks."""

from __future__ import annotations

import io
import json
import os
import pickle
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from accelx.errors import SpawnError
from accelx.launch import environ
from accelx.launch.failure import loads
from accelx.launch.tether import die_with

MAIN = (
    "__mp_main__"  # the caller's main module, under the name multiprocessing gives it
)
LOADING = "ACCELX_SPAWN_LOADS"  # set while a rank loads that module


def pack(folder: Path, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Write the call into `folder`. Raises SpawnError for what cannot be sent."""
    name = getattr(fn, "__qualname__", repr(fn))
    try:
        work = pickle.dumps((fn, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SpawnError(
            f"spawn sends its function and arguments to other processes, and {name} "
            f"cannot be sent ({error}); write it as a function at the top of a module, "
            "and give it plain data or tensors"
        ) from error
    needs_main = b"__main__" in work or MAIN.encode() in work
    note = {
        "main": _main(name) if needs_main else None,
        "path": sys.path,
        "argv": sys.argv,
        "parent": os.getpid(),
    }
    (folder / "call.pkl").write_bytes(work)
    (folder / "call.json").write_text(json.dumps(note))


def planned(folder: str, num_ranks: int) -> None:
    """In the launcher: leave word of how many ranks there will be."""
    (Path(folder) / "ranks").write_text(str(num_ranks))


def unpack(folder: Path) -> list[Any]:
    """The ranks' results, in their order."""
    if names := unfinished(folder):
        raise SpawnError(
            f"spawn wants a result of each rank, but {names} ended with exit code 0 "
            "before its function had returned; return, where it calls sys.exit"
        )
    return [
        _Unpickler(io.BytesIO(_result(folder, rank).read_bytes())).load()
        for rank in range(_num_ranks(folder))
    ]


def unfinished(folder: Path) -> str:
    """The ranks that have left no result, by name; empty where all have."""
    ranks = [r for r in range(_num_ranks(folder)) if not _result(folder, r).exists()]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else ""


def check_not_loading() -> None:
    """Refuse a call that a rank reaches by loading its caller's main module."""
    path = environ.read().get(LOADING)
    if path is not None:
        raise SpawnError(
            f"spawn wants to be called once, but a rank that loaded {path} came to the "
            'call again; put it under `if __name__ == "__main__":`'
        )


def enter(folder: str) -> None:
    """In the launcher: take over the caller's module path, and end with the caller."""
    note = json.loads((Path(folder) / "call.json").read_text())
    sys.path[:], sys.argv[:] = note["path"], note["argv"]
    die_with(note["parent"], signal.SIGTERM)


def run(folder: str, rank: int) -> None:
    """In a rank: load what the call needs, do it, write the result."""
    note = json.loads((Path(folder) / "call.json").read_text())
    if note["main"] is not None:
        _load_main(**note["main"])
    fn, args = pickle.loads((Path(folder) / "call.pkl").read_bytes())
    result = fn(*args)
    try:
        data = pickle.dumps(result)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SpawnError(
            f"spawn brings each rank's result back, and a {type(result).__name__} "
            f"cannot be sent ({error}); return plain data or tensors"
        ) from error
    path = _result(Path(folder), rank)
    path.with_suffix(".part").write_bytes(data)
    path.with_suffix(".part").replace(path)


def refused(folder: str, text: str) -> None:
    """In the launcher: leave word of why nothing was started."""
    (Path(folder) / "refused.txt").write_text(text)


def complaint(folder: Path, code: int) -> str:
    """Why there are no results: the failing rank's words, or the launcher's."""
    if (folder / "refused.txt").exists():
        return (folder / "refused.txt").read_text()
    if (folder / "failure.json").exists():
        failure = loads((folder / "failure.json").read_bytes())
        return (
            f"rank {failure.rank} failed: {failure.headline}\n{failure.text}".rstrip()
        )
    return f"the launcher ended with exit code {code} before the ranks had results"


class _Unpickler(pickle.Unpickler):
    """Finds what a rank calls `__mp_main__` in this process's own main module."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class("__main__" if module == MAIN else module, name)


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.pkl"


def _num_ranks(folder: Path) -> int:
    path = folder / "ranks"
    return int(path.read_text()) if path.exists() else 0


def _main(name: str) -> dict[str, str | None]:
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return {"name": spec.name, "path": None}
    if file is None or not Path(file).is_file():
        raise SpawnError(
            f"spawn has its ranks import {name}, which was typed into a session and "
            "is in no file; write it to one, such as work.py, and import it from there"
        )
    return {"name": None, "path": str(Path(file).resolve())}


def _load_main(name: str | None, path: str | None) -> None:
    environ.write({LOADING: str(path or name)})
    if name is not None:
        content = runpy.run_module(name, run_name=MAIN, alter_sys=True)
    else:
        content = runpy.run_path(str(path), run_name=MAIN)
    environ.remove(LOADING)
    main = ModuleType(MAIN)
    main.__dict__.update(content)
    sys.modules["__main__"] = sys.modules[MAIN] = main
