"""What counts as a container and what as a leaf, in batches, metrics and states.

Containers are dict and any Mapping, list, tuple, named tuple, and instances of
dataclasses and attrs classes. All else is a leaf: tensors, numbers, text, None, sets.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar, cast

import attrs

T = TypeVar("T")
IsLeaf = Callable[[Any], bool]


def leaves(tree: Any, is_leaf: IsLeaf | None = None) -> list[Any]:
    """The leaves, in the order of their containers."""
    found = list[Any]()
    _gather(tree, is_leaf, found)
    return found


def flatten(tree: Any, is_leaf: IsLeaf | None = None) -> list[tuple[str, Any]]:
    """Each leaf with its path, `("['image'][0].mask", leaf)`; the root's is ""."""
    return list(_walk(tree, "", is_leaf))


def unflatten(like: T, values: Iterable[Any], is_leaf: IsLeaf | None = None) -> T:
    """A tree as `like`, same types throughout, with other leaves in the same order.

    Frozen records too; their validators and `__post_init__` do not run. `like` itself
    is untouched.
    """
    rest = iter(values)
    made = map_leaves(lambda _: next(rest), like, is_leaf)
    assert next(rest, rest) is rest, "more values than leaves"
    return made


def map_leaves(fn: Callable[[Any], Any], tree: T, is_leaf: IsLeaf | None = None) -> T:
    """The same tree with `fn(leaf)` for each leaf; the tree itself is untouched."""
    inside = None if is_leaf is not None and is_leaf(tree) else _inside(tree)
    if inside is None:
        return cast("T", fn(tree))
    return _rebuilt(tree, [map_leaves(fn, child, is_leaf) for child in inside])


def children(tree: Any) -> bool:
    """Whether `tree` is a container with something in it."""
    return bool(_inside(tree))


def _gather(tree: Any, is_leaf: IsLeaf | None, found: list[Any]) -> None:
    inside = None if is_leaf is not None and is_leaf(tree) else _inside(tree)
    if inside is None:
        found.append(tree)
        return
    for child in inside:
        _gather(child, is_leaf, found)


def _walk(tree: Any, path: str, is_leaf: IsLeaf | None) -> Iterator[tuple[str, Any]]:
    inside = None if is_leaf is not None and is_leaf(tree) else _inside(tree)
    if inside is None:
        yield path, tree
        return
    for key, child in zip(_keys(tree), inside, strict=True):
        yield from _walk(child, path + key, is_leaf)


def _inside(tree: Any) -> list[Any] | tuple[Any, ...] | None:
    """What a container holds; None for a leaf."""
    form = _form(type(tree), tree.__class__)
    if form is None:
        return None
    if form == "sequence":
        return tree
    if form == "mapping":
        return list(tree.values())
    return [getattr(tree, name) for name in _names(tree)]


def _keys(tree: Any) -> list[str]:
    """What reaches each thing that a container holds, as code."""
    form = _form(type(tree), tree.__class__)
    if form == "mapping":
        return [f"[{key!r}]" for key in tree]
    names = _names(tree) if form == "record" else getattr(tree, "_fields", None)
    if names:
        return [f".{name}" for name in names]
    return [f"[{i}]" for i in range(len(tree))]


@functools.lru_cache(maxsize=512)  # asked for each leaf, it would take 2 us
def _form(kind: type, shown: type) -> str | None:
    """What an instance of `kind` is, that gives itself out as a `shown`."""
    if issubclass(kind, Mapping) or issubclass(shown, Mapping):
        return "mapping"
    if issubclass(kind, (list, tuple)) or issubclass(shown, (list, tuple)):
        return "sequence"
    if issubclass(kind, type):
        return None
    return "record" if attrs.has(kind) or dataclasses.is_dataclass(kind) else None


def _names(record: Any) -> list[str]:
    kind = cast("Any", type(record))
    fields = attrs.fields(kind) if attrs.has(kind) else dataclasses.fields(kind)
    return [field.name for field in fields]


def _rebuilt(tree: Any, values: list[Any]) -> Any:
    kind = cast("Any", type(tree))
    if kind is list:
        return values
    if _form(kind, tree.__class__) == "mapping":
        return _rebuilt_mapping(tree, dict(zip(tree, values, strict=True)))
    if isinstance(tree, tuple):
        return getattr(kind, "_make", kind)(values)
    made = copy.copy(tree)
    if isinstance(tree, list):
        made[:] = values
        return made
    for name, value in zip(_names(tree), values, strict=True):
        object.__setattr__(made, name, value)  # also where the record is frozen
    return made


def _rebuilt_mapping(tree: Mapping[Any, Any], pairs: dict[Any, Any]) -> Any:
    kind = cast("Any", type(tree))
    if kind is dict:
        return pairs
    if not isinstance(tree, MutableMapping):
        return kind(pairs)
    made = copy.copy(tree)  # keeps a default factory
    for key, value in pairs.items():
        made[key] = value
    return made
