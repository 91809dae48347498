"""What counts as a container and what as a leaf, in batches, metrics and states.

Containers are dict and any Mapping, list, tuple, named tuple, and instances of
dataclasses and attrs classes. All else is a leaf: tensors, numbers, text, None, sets.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeGuard, TypeVar, cast

import attrs

T = TypeVar("T")
IsLeaf = Callable[[Any], bool]


def leaves(tree: Any, is_leaf: IsLeaf | None = None) -> list[Any]:
    """The leaves, in the order of their containers."""
    return [leaf for _, leaf in flatten(tree, is_leaf)]


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
    children = None if is_leaf is not None and is_leaf(tree) else _children(tree)
    if children is None:
        return cast("T", fn(tree))
    return _rebuilt(tree, [map_leaves(fn, child, is_leaf) for _, child in children])


def children(tree: Any) -> bool:
    """Whether `tree` is a container with something in it."""
    return bool(_children(tree))


def _walk(tree: Any, path: str, is_leaf: IsLeaf | None) -> Iterator[tuple[str, Any]]:
    children = None if is_leaf is not None and is_leaf(tree) else _children(tree)
    if children is None:
        yield path, tree
        return
    for key, child in children:
        piece = f".{key}" if _has_fields(tree) else f"[{key!r}]"
        yield from _walk(child, path + piece, is_leaf)


def _children(tree: Any) -> list[tuple[Any, Any]] | None:
    """The keys and values of a container; None for a leaf."""
    if _is_mapping(tree):
        return list(tree.items())
    if _is_sequence(tree):
        names = getattr(tree, "_fields", None)
        return list(zip(names, tree, strict=True)) if names else list(enumerate(tree))
    if _is_record(tree):
        return [(name, getattr(tree, name)) for name in _names(tree)]
    return None


def _is_mapping(tree: Any) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(tree, Mapping)


def _is_sequence(tree: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(tree, (list, tuple))


def _kind(tree: Any) -> Any:
    return cast("Any", type(tree))


def _is_record(tree: Any) -> bool:
    kind = _kind(tree)
    if issubclass(kind, type):
        return False
    return attrs.has(kind) or dataclasses.is_dataclass(kind)


def _has_fields(tree: Any) -> bool:
    if _is_mapping(tree):
        return False
    return hasattr(tree, "_fields") or _is_record(tree)


def _names(record: Any) -> list[str]:
    kind = _kind(record)
    fields = attrs.fields(kind) if attrs.has(kind) else dataclasses.fields(kind)
    return [field.name for field in fields]


def _rebuilt(tree: Any, values: list[Any]) -> Any:
    if _is_mapping(tree):
        return _rebuilt_mapping(tree, dict(zip(tree, values, strict=True)))
    kind = _kind(tree)
    if kind is list:
        return values
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
    kind = _kind(tree)
    if kind is dict:
        return pairs
    if not isinstance(tree, MutableMapping):
        return kind(pairs)
    made = copy.copy(tree)  # keeps a default factory
    for key, value in pairs.items():
        made[key] = value
    return made
