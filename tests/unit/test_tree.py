"""Trees keep their types, and their leaves are found in one order."""

from __future__ import annotations

import collections
import dataclasses
import types
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from hypothesis import given, strategies as st

from accelx.tree import flatten, leaves, map_leaves, unflatten


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: Any
    b: Any = dataclasses.field(default=0, init=False)


@attrs.frozen
class Slotted:
    _a: Any
    b: Any = attrs.field(default=1, init=False)


class Picky(list):
    """A list whose constructor takes no items."""

    def __init__(self):
        super().__init__()


def picky(*items):
    """A Picky with `items`."""
    made = Picky()
    made.extend(items)
    return made


TREES = {
    "dict": {"a": 1, "b": {"c": 2}},
    "list": [1, [2, 3]],
    "tuple": (1, (2,)),
    "namedtuple": Point(1, Point(2, 3)),
    "dataclass": Frozen((1, 2)),
    "attrs": Slotted({"k": 1}),
    "ordered": collections.OrderedDict(b=1, a=2),
    "default": collections.defaultdict(list, {"a": 1}),
    "user": collections.UserDict({"a": 1}),
    "proxy": types.MappingProxyType({"a": 1}),
    "list subclass": picky(1, 2),
    "leaf": 5,
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_mapping_keeps_every_type_and_leaves_the_original(tree):
    """Negating twice gives the tree again; once does not, and does not touch it."""
    before = repr(tree)
    negated = map_leaves(lambda x: -x, tree)
    assert type(negated) is type(tree)
    assert leaves(negated) == [-x for x in leaves(tree)]
    assert repr(map_leaves(lambda x: -x, negated)) == before == repr(tree)
    assert repr(negated) != before


nested = st.recursive(
    st.integers() | st.text() | st.none(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(), inner)
        | st.builds(Point, inner, inner)
        | st.builds(Frozen, inner)
    ),
    max_leaves=12,
)


@given(nested)
def test_unflatten_inverts_flatten(tree):
    """A tree is its shape and its leaves."""
    paths, values = zip(*flatten(tree), strict=True) if flatten(tree) else ((), ())
    assert unflatten(tree, values) == tree
    assert len(set(paths)) == len(paths)


@given(nested)
def test_flatten_agrees_with_torch_pytree(tree):
    """On dicts, lists and tuples the leaves are those that torch's own pytree finds."""
    from torch.utils import _pytree

    plain = map_leaves(lambda leaf: 0 if leaf is None else leaf, tree)
    if "Frozen" not in repr(plain):
        assert leaves(plain) == _pytree.tree_leaves(plain)


def test_paths_read_as_the_code_that_reaches_the_leaf():
    """`tree<path>` is Python that gives the leaf."""
    tree = {"a": [Point(1, Frozen({"k": 2}))], 3: Slotted(4)}
    for path, leaf in flatten(tree):
        assert eval(f"tree{path}") == leaf


def test_leaves_are_tensors_text_sets_and_classes():
    """What has no children in our sense is a leaf, and so is what the caller says."""
    items = [torch.zeros(2, 2), "text", {1, 2}, Frozen, None, range(3)]
    assert all(leaves(item)[0] is item for item in items)
    assert leaves([Point(1, 2), 3], lambda x: isinstance(x, Point)) == [Point(1, 2), 3]
    assert leaves([Point(1, 2), 3]) == [1, 2, 3]


def test_too_few_or_too_many_values_are_noticed():
    """Values must match the leaves one to one."""
    with pytest.raises((StopIteration, RuntimeError)):
        unflatten([1, 2], [1])
    with pytest.raises(AssertionError):
        unflatten([1, 2], [1, 2, 3])
