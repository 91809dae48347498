"""What the code of a dataset asks for: its rank, or the number of its worker.

A dataset that divides itself by rank gives rank 0 its part, and the rest of the rows
never comes; one that does not divide itself by worker gives each row to every worker.
torch says nothing of either, so that its code is looked at, and a warning given.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from accelx.data.plan import inside
from accelx.data.stream_parts import of_hub
from accelx.data.stream_record import Stream
from accelx.errors import NeutralityWarning

RANK = {"get_rank", "get_world_size", "get_global_rank", "split_by_node"}
WORKER = {"get_worker_info", "split_by_rank"}
MOST = 2000  # functions that are looked at
_TORCH = ("torch", "builtins", "typing", "abc")


def warn_of_parts(stream: Stream, readers: int) -> None:
    """Warn where rows would be lost, or come several times, by the code's own words."""
    source, name = stream.source, type(stream.source).__name__
    if stream.batch_size is None or of_hub(source) or hasattr(source, "split_by_rank"):
        return
    datasets = [source, *inside(source)]
    asked = RANK & _names(f for one in datasets for f in _functions(one))
    if stream.world > 1 and readers == 1 and asked:
        warnings.warn(
            f"{name} is read by rank 0 alone, for all {stream.world} ranks, but its "
            f"code says {' and '.join(sorted(asked))}: if it gives each rank a part, "
            "the others' rows never come. Let it give all rows, or write "
            "split_by_rank(rank, world) for that part, which each rank then reads",
            NeutralityWarning,
            stacklevel=2,
        )
    if stream.num_workers < 2 or stream.worker_init_fn is not None:
        return
    if _functions(source) and not _mentions(datasets, WORKER):
        warnings.warn(
            f"{stream.num_workers} workers read {name}, whose code does not ask for "
            "get_worker_info(): each gives all rows, as torch has it, so that a row "
            f"comes {stream.num_workers} times. Write num_workers=1, let the code "
            "divide the rows, or write split_by_rank(rank, world)",
            NeutralityWarning,
            stacklevel=2,
        )


def _functions(one: Any) -> list[types.FunctionType]:
    """The methods of an object, and the functions that it holds."""
    held = list(getattr(one, "__dict__", {}).values())
    lists = [some for some in held if isinstance(some, list) and len(some) < MOST]
    held += [each for some in lists for each in some]
    for kind in type(one).__mro__:
        if kind.__module__.partition(".")[0] not in _TORCH:
            held += vars(kind).values()
    return [f for each in held if (f := _function(each)) is not None]


def _function(one: Any) -> types.FunctionType | None:
    """The user's function in a method, a property, a partial or a decorated one."""
    if isinstance(one, property):
        one = one.fget
    elif isinstance(one, functools.partial):
        one = one.func  # type: ignore[reportUnknownMemberType]
    elif isinstance(one, (staticmethod, classmethod, types.MethodType)):
        one = one.__func__
    while isinstance(one, types.FunctionType) and hasattr(one, "__wrapped__"):
        one = one.__wrapped__  # type: ignore[attr-defined]
    return one if isinstance(one, types.FunctionType) else None


def _names(functions: Iterable[types.FunctionType]) -> set[str]:
    """Each name in the code of functions, of those inside them too, and their own."""
    found = set[str]()
    for one in functions:
        found.add(one.__name__)
        found.update(name for code in _codes(one.__code__) for name in code.co_names)
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)


def _mentions(datasets: list[Any], wanted: set[str]) -> bool:
    """Whether the code, or what it calls, has one of the names."""
    todo, seen = [f for one in datasets for f in _functions(one)], set[int]()
    while todo and len(seen) < MOST:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        names = _names([one])
        if names & wanted:
            return True
        todo += _called(one, names)
    return bool(todo)  # too much to know


def _called(one: types.FunctionType, names: set[str]) -> list[types.FunctionType]:
    """Functions of those names among the globals, and in modules and classes there."""
    known = [one.__globals__[name] for name in names if name in one.__globals__]
    wide = [each for each in known if isinstance(each, (types.ModuleType, type))]
    known += [getattr(some, name, None) for some in wide for name in names]
    known += [
        m for kind in known if isinstance(kind, type) for m in vars(kind).values()
    ]
    return [
        each
        for each in known
        if isinstance(each, types.FunctionType)
        and each.__module__.partition(".")[0] not in _TORCH
    ]
