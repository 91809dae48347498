"""Mixtures hold exact shares, each source in epochs of its own, from any position."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader, Dataset

from accelx.data.mix import Mixture, mix
from accelx.errors import DataError

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)
SEEDS = st.integers(-(2**63), 2**63 - 1)


class Items(Dataset):
    """Items that know their source, read one by one."""

    def __init__(self, name, size):
        self.name, self.size, self.reads = name, size, []

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        self.reads.append([i])
        return f"{self.name}{i}"


class Many(Items):
    """Items that are read together."""

    epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitems__(self, indices):
        self.reads.append(indices)
        return [f"{self.name}{i}" for i in indices]


@st.composite
def mixtures(draw):
    """Mixtures of few small sources, with whole weights."""
    sizes = draw(SIZES)
    weights = draw(
        st.lists(st.integers(1, 7), min_size=len(sizes), max_size=len(sizes))
    )
    return mix(
        {"abcd"[i]: Items("abcd"[i], size) for i, size in enumerate(sizes)},
        weights,
        draw(SEEDS),
        shuffle=draw(st.booleans()),
        length=draw(st.none() | st.integers(1, 40)),
    )


def rows(mixture, low, high):
    """(source, item) of rows of the endless mixture, an epoch after another."""
    places = []
    for row in range(low, high):
        epoch, at = divmod(row, len(mixture))
        index = int(mixture.order_at(torch.tensor(at), epoch=epoch))
        name = mixture.source_of(index)
        places.append((name, int(mixture[index].removeprefix(name))))
    return places


@settings(max_examples=100)
@given(mixtures(), st.integers(0, 50))
def test_each_period_holds_exact_shares(mixture, turn):
    """In any period each source comes exactly its share of times."""
    period = sum(mixture.counts.values())
    found = rows(mixture, turn * period, (turn + 1) * period)
    assert Counter(name for name, _ in found) == mixture.counts
    assert mixture.proportions == mixture.asked
    total = sum(mixture.weights.values())
    for name, weight in mixture.weights.items():
        assert mixture.proportions[name] == Fraction(weight, total)
    assert period == math.lcm(*(p.denominator for p in mixture.asked.values()))


@settings(max_examples=60)
@given(mixtures())
def test_sources_are_spread_evenly(mixture):
    """After any rows a source is off its share by (1 + sources * share) / 2 at most."""
    found, seen = rows(mixture, 0, 60), Counter()
    for t, (name, _) in enumerate(found, 1):
        seen[name] += 1
        for one, share in mixture.proportions.items():
            off = abs(seen[one] - t * share)
            assert off <= (1 + len(mixture.sources) * share) / 2


@settings(max_examples=100)
@given(mixtures())
def test_a_source_goes_through_its_items_each_once(mixture):
    """Its own epochs run on over those of the mixture, each holding every item."""
    found = rows(mixture, 0, 90)
    for name, source in mixture.sources.items():
        items, n = [item for one, item in found if one == name], len(source)
        for low in range(0, len(items) - n + 1, n):
            assert sorted(items[low : low + n]) == list(range(n))
        if not mixture.shuffle:
            assert all(b == (a + 1) % n for a, b in pairwise(items))


@settings(max_examples=60)
@given(mixtures(), st.integers(0, 3), st.data())
def test_any_positions_at_once_are_those_one_by_one(mixture, epoch, data):
    """Of any shape and order, repeated or not; loaders' settings change nothing."""
    position = st.integers(0, len(mixture) - 1)
    wanted = data.draw(st.lists(position, min_size=6, max_size=6))
    at = torch.tensor(wanted).view(2, 3)
    many = mixture.order_at(at, shuffle=True, seed=9, epoch=epoch, batch_size=4)
    ones = [int(mixture.order_at(torch.tensor(p), epoch=epoch)) for p in wanted]
    assert many.shape == at.shape
    assert many.dtype == torch.int64
    assert many.flatten().tolist() == ones == [mixture.order(epoch)[p] for p in wanted]


def test_the_epoch_of_a_source_is_shuffled_anew():
    """Its second epoch has another order, another seed too, and sources differ."""
    mixture = mix({"a": range(64), "b": range(64)}, [1, 1], 3)

    def epochs(one):
        return [
            [i for i in one.order(e) if one.source_of(i) == name]
            for e in (0, 1)
            for name in "ab"
        ]

    a0, b0, a1, _ = epochs(mixture)
    assert sorted(a0) == sorted(a1) == list(range(64))
    assert len({tuple(a0), tuple(a1), tuple(i - 64 for i in b0)}) == 3
    other = attrs.evolve(mixture, seed=4)
    assert epochs(other)[0] != a0
    still = attrs.evolve(mixture, shuffle=False)
    assert epochs(still)[0] == list(range(64))


def test_the_order_never_changes():
    """What was read last year is read again: an epoch as it was first written down."""
    mixture = mix({"a": range(5), "b": range(3)}, [2, 1], seed=1)
    assert mixture.order(3) == [0, 5, 1, 4, 7, 3, 4, 6]


def test_a_position_far_away_is_found_at_once():
    """Row 10**15 by hand: the period, the source's draw, its epoch and item."""
    mixture = mix({"a": range(10**6), "b": range(10)}, [2, 1], shuffle=False)
    epoch, at = divmod(10**15, len(mixture))
    index = int(mixture.order_at(torch.tensor(at), epoch=epoch))
    cycle, slot = divmod(10**15, 3)  # a period is a b a: (1/4, 1/2, 3/4)
    assert slot == 1
    assert index == 10**6 + cycle % 10


def test_the_weave_is_the_one_of_the_midpoints():
    """The judge by hand: 5 a, 3 b and 2 c at the midpoints of their parts."""
    mixture = mix({"a": range(9), "b": range(9), "c": range(9)}, [0.5, 0.3, 0.2])
    # a .1 .3 .5 .7 .9; b .17 .5 .83; c .25 .75; equal ones in the order of the sources
    assert [mixture.source_of(i) for i in mixture.order(0)[:10]] == list("abcaabacba")


def test_decimals_are_taken_as_they_are_written():
    """0.1 is a tenth; any sum will do; fractions and arrays' numbers are weights."""
    sources = {"a": [1], "b": [1]}
    for weights in (
        {"b": 0.3, "a": 0.7},
        [0.7, 0.3],
        (70, 30),
        [Fraction(7, 3), 1],
        [np.float64(0.7), np.float32(0.3)],
        [np.int64(7), np.int64(3)],
    ):
        mixture = mix(sources, weights)
        assert mixture.counts == {"a": 7, "b": 3}
        assert "given" not in repr(mixture)
        assert "np." not in repr(mixture)


def test_odd_weights_get_the_nearest_counts_and_say_so():
    """With a denominator too large, 10,000 rows by the largest remainders, printed."""
    weights = {"a": 1, "b": math.sqrt(2), "c": 0.01}
    mixture = mix({name: range(5) for name in weights}, weights)
    assert sum(mixture.counts.values()) == 10_000
    for name, share in mixture.asked.items():
        assert abs(mixture.proportions[name] - share) < Fraction(1, 10_000)
    assert mixture.proportions != mixture.asked
    assert "1.4142135623730951" in repr(mixture)
    assert repr(mixture).endswith("# given: a 4125/10000, b 5834/10000, c 41/10000")


@settings(max_examples=60)
@given(mixtures(), st.integers(0, 2))
def test_torch_loads_the_order_as_a_sampler(mixture, epoch):
    """The judge: torch's own DataLoader, given the order, reads the single items."""
    order = mixture.order(epoch)
    loader = DataLoader(mixture, 4, sampler=order, collate_fn=list)
    assert [item for batch in loader for item in batch] == [mixture[i] for i in order]
    assert len(loader) == -(-len(mixture) // 4)


def test_a_batch_reads_each_source_once():
    """Items of a source are read together where it can, and put back in order."""
    many, single = Many("m", 5), Items("s", 5)
    mixture = mix({"m": many, "s": single}, [1, 1])
    assert mixture.__getitems__([0, 7, 3, 5, 0]) == ["m0", "s2", "m3", "s0", "m0"]
    assert many.reads == [[0, 3, 0]]
    assert single.reads == [[2], [0]]
    mixture.set_epoch(4)
    assert many.epoch == 4
    assert pickle.loads(pickle.dumps(mixture)).order(1) == mixture.order(1)


def test_what_a_source_raises_names_it():
    """The error keeps its type and says which source and item it was."""

    class Bad(Items):
        def __getitem__(self, i):
            raise KeyError(i)

    mixture = mix({"good": range(3), "bad": Bad("b", 2)}, [1, 1])
    with pytest.raises(KeyError) as caught:
        mixture[4]
    notes = " ".join(caught.value.__notes__)
    assert "item 1" in notes
    assert "source 'bad'" in notes


@pytest.mark.parametrize("index", [-1, 8])
def test_an_index_of_no_item_is_refused(index):
    """The message says which there are."""
    mixture = mix({"a": range(3), "b": range(5)}, [1, 1])
    with pytest.raises(IndexError, match=f"one of 0 to 7, got {index}"):
        mixture[index]


AB = {"a": [1], "b": [2]}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (({}, []), "datasets by name, got none"),
        (([[1], [2]], [1, 1]), "datasets by name, got list"),
        (({"a": iter([1])}, [1]), "list_iterator for 'a'"),
        (({"a": [1], "b": []}, [1, 1]), "got none in 'b'"),
        (({"a": mix(AB, [1, 1])}, [1]), "the mixture 'a'; mix the sources inside"),
        ((AB, {"a": 1}), r"\['a', 'b'\], got weights for \['a'\]"),
        ((AB, {"a": 1, "c": 1}), r"got weights for \['a', 'c'\]"),
        ((AB, [1]), "2 sources, got 1; .*'a'"),
        ((AB, [1, 0]), "above 0, got 0 for 'b'"),
        ((AB, [-0.5, 1]), "above 0, got -0.5 for 'a'"),
        ((AB, [1, math.inf]), "above 0, got inf for 'b'"),
        ((AB, [1, math.nan]), "above 0, got nan for 'b'"),
        ((AB, [1, "2"]), "above 0, got '2' for 'b'"),
        ((AB, [1, 1e-6]), "share of 1e-06 for 'b'"),
        ((AB, [1, 1], 0.5), "seed must be an integer"),
    ],
)
def test_what_cannot_be_mixed_is_refused(arguments, match):
    """With what came, by the names of the sources."""
    with pytest.raises(DataError, match=match):
        mix(*arguments)


@pytest.mark.parametrize("length", [0, -3, 2.5, True])
def test_an_epoch_needs_rows(length):
    """The length of an epoch is a whole number of at least 1."""
    with pytest.raises(DataError, match=f"length must be .*got {length}"):
        mix(AB, [1, 1], length=length)


def test_it_prints_as_the_code_that_makes_it():
    """Settings at their default are left out; sources show their type and length."""
    full = mix(AB, {"b": 0.3, "a": 0.7}, seed=4, shuffle=False, length=9)
    assert repr(full) == (
        "mix({'a': <list of 1>, 'b': <list of 1>}, {'a': 0.7, 'b': 0.3}, seed=4, "
        "shuffle=False, length=9)"
    )
    assert repr(mix({"a": [1]}, [1])) == "mix({'a': <list of 1>}, {'a': 1})"
    assert isinstance(full, Mixture)
    assert (len(full), len(mix(AB, [1, 1]))) == (9, 2)


class Backward(list):
    """A dataset with an order of its own: backward in odd epochs."""

    def order_at(self, positions, *, shuffle, seed, epoch, batch_size):
        assert batch_size == 1
        return len(self) - 1 - positions if epoch % 2 else positions


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_source_with_an_order_of_its_own_is_read_in_it(shuffle):
    """Its draws are the positions of its own epochs."""
    mixture = mix({"a": Backward(range(4)), "b": range(100)}, [1, 1], shuffle=shuffle)
    found = [mixture[i] for i in mixture.order(0)[:24] if mixture.source_of(i) == "a"]
    assert found == [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3]
