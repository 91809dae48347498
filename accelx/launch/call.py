"""How a call and its results travel between a program and its ranks."""

from __future__ import annotations

import json
import linecache
import os
import pickle
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from accelx.errors import SpawnError
from accelx.launch import carry, environ
from accelx.launch.carry import MAIN, Known
from accelx.launch.failure import Failure, loads
from accelx.launch.tether import die_with

LOADING = "ACCELX_SPAWN_LOADS"  # set while a rank loads the caller's main module
UNSENDABLE = (pickle.PicklingError, AttributeError, TypeError)  # as pickle says it


def pack(folder: Path, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Write the call into `folder`. Raises SpawnError for what cannot be sent.

    By name, as pickle does, or whole: what pickle refuses, and what was typed into a
    session, whose main module no rank could import.
    """
    work, main = _by_name(fn, args)
    note = {
        "main": main,
        "whole": work is None,
        "path": sys.path,
        "argv": sys.argv,
        "parent": os.getpid(),
        "sources": _typed() if work is None else {},
    }
    (folder / "call.pkl").write_bytes(work or _whole(fn, args))
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
        carry.load(_result(folder, rank).read_bytes())
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
    """In a rank: load what the call needs, do it, write the result or the error."""
    note = json.loads((Path(folder) / "call.json").read_text())
    if note["main"] is not None:
        _load_main(**note["main"])
    for name, text in note["sources"].items():  # for the lines of a traceback
        linecache.cache[name] = len(text), None, text.splitlines(True), name
    fn, args = pickle.loads((Path(folder) / "call.pkl").read_bytes())
    known = _session(fn, args) if note["whole"] else None
    try:
        result = fn(*args)
    except Exception as error:
        _leave(Path(folder), rank, error, known)
        raise
    _write(_result(Path(folder), rank), _sent(result, known))


def refused(folder: str, text: str) -> None:
    """In the launcher: leave word of why nothing was started."""
    (Path(folder) / "refused.txt").write_text(text)


def complaint(folder: Path, code: int) -> SpawnError:
    """Why there are no results: the failing rank's words, or the launcher's.

    `error` is what that rank raised, where it came out of pickle the same.
    """
    if (folder / "refused.txt").exists():
        return SpawnError((folder / "refused.txt").read_text())
    if not (folder / "failure.json").exists():
        text = f"the launcher ended with exit code {code} before the ranks had results"
        return SpawnError(text)
    failure = loads((folder / "failure.json").read_bytes())
    text = f"rank {failure.rank} failed: {failure.headline}\n{failure.text}".rstrip()
    made = SpawnError(text)
    try:
        made.error = _raised(folder, failure)
    except Exception as error:  # a type that this process cannot import
        made.add_note(f"only its text came back: {error}")
    return made


def _raised(folder: Path, failure: Failure) -> Exception | None:
    path = _error(folder, failure.rank)
    if failure.kind != "exception" or not path.exists():
        return None
    return carry.load(path.read_bytes())


def _leave(folder: Path, rank: int, error: Exception, known: Known | None) -> None:
    """For the caller: the exception itself, if it comes out of pickle the same."""
    for form in (error, carry.Again(error)):
        try:
            data = _bytes(form, known)
            back = carry.load(data)
        except Exception as why:  # it is shown with the traceback, which comes back
            failed = why
        else:
            if (type(back), str(back)) == (type(error), str(error)):
                _write(_error(folder, rank), data)
                return
            failed = TypeError("pickle makes another of it")
    error.add_note(f"only its text came back: {failed}")


def _sent(result: object, known: Known | None) -> bytes:
    try:
        return _bytes(result, known)
    except UNSENDABLE as error:
        raise SpawnError(
            f"spawn brings each rank's result back, and a {type(result).__name__} "
            f"cannot be sent ({error}); return plain data or tensors"
        ) from error


def _bytes(value: object, known: Known | None) -> bytes:
    """By name where the caller has the names: not in a session, but for `known`."""
    if known is not None:
        return carry.whole(value, known)
    try:
        return pickle.dumps(value)
    except UNSENDABLE:
        return carry.whole(value)


def _write(path: Path, data: bytes) -> None:
    path.with_suffix(".part").write_bytes(data)
    path.with_suffix(".part").replace(path)


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.pkl"


def _error(folder: Path, rank: int) -> Path:
    return folder / f"error-{rank}.pkl"


def _num_ranks(folder: Path) -> int:
    path = folder / "ranks"
    return int(path.read_text()) if path.exists() else 0


def _by_name(
    fn: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[bytes | None, dict[str, str | None] | None]:
    """The call by pickle and the main module that it needs; Nones where it cannot."""
    try:
        work = pickle.dumps((fn, args))
    except UNSENDABLE:
        return None, None
    if b"__main__" not in work and MAIN.encode() not in work:
        return work, None
    main = _main()
    return (None, None) if main is None else (work, main)


def _whole(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return carry.whole((fn, args))
    except UNSENDABLE as error:
        name = getattr(fn, "__qualname__", repr(fn))
        raise SpawnError(
            f"spawn sends its function and arguments to other processes, and {name} "
            f"cannot be sent ({error}); give it plain data or tensors, and make locks, "
            "files and connections within it"
        ) from error


def _main() -> dict[str, str | None] | None:
    """Where the main module comes from; None for one that was typed in."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return {"name": spec.name, "path": None}
    if file is None or not Path(file).is_file():
        return None
    return {"name": None, "path": str(Path(file).resolve())}


def _typed() -> dict[str, str]:
    """The cells of a session, which Python keeps under names that are no files."""
    return {
        name: "".join(entry[2])
        for name, entry in list(linecache.cache.items())
        if len(entry) == 4 and not Path(name).is_file()
    }


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


def _session(fn: Callable[..., Any], args: tuple[Any, ...]) -> Known:
    """Be the session that the call was typed into; which of its things have names.

    The functions of one session share their globals here too.
    """
    typed = (f for f in (fn, *args) if isinstance(f, FunctionType))
    names = next((f.__globals__ for f in typed if f.__module__ == "__main__"), {})
    carry.be_main(names)
    return carry.known_of(names)
