"""Plain data comes back in its own types, and tensors where they were."""

import json
import math
from collections import Counter, OrderedDict, defaultdict

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from accelx.errors import CheckpointError, DamagedError
from accelx.saves.optim import TORCH, WORDS, key_of, word
from accelx.saves.strict import DEPTH, dumps, loads
from accelx.saves.typed import LEVELS, decode, encode, settle
from tests.laws import odd

TENSORS = st.sampled_from([torch.float32, torch.int64, torch.bool]).map(
    lambda dtype: odd.drawn(dtype, (2,))
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.sampled_from([torch.bfloat16, torch.qint8, 2**63, -(2**63) - 1, 10**400]),
)
KEYS = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.just("$"))
VALUES = st.recursive(
    st.one_of(SCALARS, TENSORS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.builds(odd.Settings, inner, inner),
    ),
    max_leaves=12,
)


def through(value, like):
    """`value` after a file: encoded, written as JSON, read, decoded, settled."""
    kept = {}

    def keep(path, tensor):
        if path in kept:
            raise CheckpointError(path)
        kept[path] = tensor

    raw = encode(value, "x", keep)
    raw = loads(dumps(raw, ordered=False), "a test")
    return settle(decode(raw, "x", like, lambda path, like, cpu: kept[path].clone()))


def flat(value):
    """How records and tensors compare: as data."""
    return odd.viewed(value, torch.clone)


def blank(value):
    """What stands where `value` is restored: records of its kind, nothing else."""
    if isinstance(value, odd.Settings):
        return odd.Settings(blank(value.rate), blank(value._names))
    if isinstance(value, dict):
        return {k: blank(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [blank(v) for v in value]
    return None


@given(VALUES)
def test_nested_data_comes_back(value):
    """Types, order of keys, nan, bytes and big numbers too; or a clash is refused."""
    try:
        back = through(value, blank(value))
    except CheckpointError:
        paths = []
        encode(value, "x", lambda path, _: paths.append(path))
        assert len(set(paths)) < len(paths)
        return
    assert odd.same(flat(value), flat(back))
    assert type(back) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        Counter({"b": 2, "a": 0}),
        OrderedDict([("z", 1), ("a", [2])]),
        defaultdict(list, {3: [1]}),
    ],
)
def test_a_dict_of_another_kind_stays_one_where_one_stands(value):
    """A scheduler's Counter is a Counter again, a defaultdict has its default."""
    like = type(value)(list) if isinstance(value, defaultdict) else type(value)()
    for restored in (through(value, like), through({"in": value}, {"in": like})["in"]):
        assert (type(restored), restored) == (type(value), value)
        assert list(restored) == list(value)
    assert like == {}
    assert type(through(value, None)) is dict


def test_an_object_is_loaded_in_place():
    """The object that stands there takes the state, tensors in it included."""
    there = odd.Tally(1)
    back = through([odd.Tally(5)], [there])
    assert back == [there]
    assert (there.count, there.sums.tolist()) == (5, [5.0, 5.0])
    with pytest.raises(CheckpointError, match=r"x\.0 was saved from an object.*int"):
        through([odd.Tally(5)], [3])


@attrs.define
class Both:
    """A record with a state of its own."""

    value: int = 0

    def state_dict(self):
        """Its state, under another name."""
        return {"kept": self.value}

    def load_state_dict(self, state):
        """Take the state."""
        self.value = state["kept"]


def test_an_object_that_is_also_a_record_says_itself_what_is_kept():
    """Its own state_dict counts, not its fields."""
    there = Both()
    assert through(Both(4), there) is there
    assert there.value == 4


def test_a_record_needs_its_kind_and_keeps_new_fields():
    """Fields that the file does not know stay; where no record stands it is refused."""

    @attrs.frozen
    class Later:
        rate: float = 0.0
        added: str = "new"

    assert through(odd.Settings(2.0), Later()) == Later(2.0, "new")
    with pytest.raises(CheckpointError, match=r"x was saved as a record.*dict"):
        through(odd.Settings(2.0), {})


def test_numpy_floats_are_floats():
    """A rate that NumPy computed is kept as the number that it is."""
    assert through({"lr": np.float64(0.1)}, None) == {"lr": 0.1}
    assert math.isnan(through(np.float64("nan"), None))


def nested(depth, wrap):
    """A value in `depth` wrappers."""
    value = torch.ones(1)
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    "wrap", [lambda v: [v], lambda v: (v,), lambda v: {1: v}, odd.Settings]
)
def test_whatever_may_be_saved_can_be_read(wrap):
    """The deepest nesting that is taken is within what a reader takes; one more not."""
    deep = nested(LEVELS, wrap)
    kept = []
    raw = encode(deep, "x", lambda path, _: kept.append(path))
    for _ in range(6):  # where a manifest and an optimizer put it
        raw = {"v": raw}
    assert loads(dumps(raw), "a test")
    with pytest.raises(CheckpointError, match=f"deeper than {LEVELS} levels"):
        encode(nested(LEVELS + 1, wrap), "x", lambda path, _: None)
    assert len(kept) == 1
    assert LEVELS * 3 + 6 < DEPTH


@pytest.mark.parametrize(
    "raw",
    [
        {"$": "float", "v": "1.5"},
        {"$": "int", "v": "zz"},
        {"$": "bytes", "v": "?"},
        {"$": "dtype", "v": "nn"},
        {"$": "dict", "v": [[1]]},
        {"$": "dict", "v": [[[], 1]]},
        {"$": "tuple", "v": 3},
        {"$": "lambda", "v": []},
        {"$": []},
    ],
)
def test_what_no_accelx_wrote_is_refused(raw):
    """With its path, and no error of Python's own."""
    with pytest.raises((CheckpointError, DamagedError), match="x"):
        decode(raw, "x", None, lambda *_: torch.ones(1))


@given(st.one_of(st.sampled_from([*WORDS, *TORCH]), st.text()), st.integers(0, 3))
def test_words_for_moments_are_one_to_one(key, marks):
    """Any key of an optimizer's state comes back; torch's own are in our words."""
    key = "_" * marks + key
    assert key_of(word(key)) == key
    assert word("exp_avg") == "first_moment"
    assert word("momentum") != "momentum"
    assert key_of(word(3)) == 3


def test_json_is_kept_in_order_or_made_equal():
    """`ordered` gives equal bytes for equal dicts; without it the order stays."""
    one, other = {"b": 1, "a": 2}, {"a": 2, "b": 1}
    assert dumps(one) == dumps(other)
    assert dumps(one, ordered=False) != dumps(other, ordered=False)
    assert json.loads(dumps(one, ordered=False)) == one
