"""The shuffled order is a bijection, looks random, and never changes."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from math import factorial, sqrt

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from accelx.errors import DataError
from accelx.permutation import MAX, ORDER_VERSION, permute

MASK = 2**64 - 1


def order(n, seed=0, epoch=0):
    """The whole order of an epoch."""
    return permute(n, seed, epoch, torch.arange(n))


def mix(x):
    """The splitmix64 finaliser, by arbitrary-precision integers."""
    x &= MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def reference(n, seed, epoch, position):
    """One index of order version 1, one Python integer at a time."""
    base = 0
    for part in (1, n, seed, epoch):
        base = mix((base ^ part & MASK) + 0x9E3779B97F4A7C15)
    if n <= 4096:
        signed = [(mix(i + base) ^ 2**63, i) for i in range(n)]
        return sorted(signed)[position][1]
    bits = (n - 1).bit_length()
    widths = bits // 2, bits - bits // 2
    x = position
    while True:
        high, low = x >> widths[1], x & (1 << widths[1]) - 1
        for r in range(8):
            a, b = mix(base + 2 * r + 1) | 1, mix(base + 2 * r + 2)
            if r % 2 == 0:
                high ^= (a * low + b & MASK) >> 64 - widths[0]
            else:
                low ^= (a * high + b & MASK) >> 64 - widths[1]
        x = high << widths[1] | low
        if x < n:
            return x


def surprise(counts, cells):
    """How many standard deviations chi-square lies above that of even counts."""
    counts = list(counts) + [0] * (cells - len(counts))
    even = sum(counts) / cells
    chi = sum((c - even) ** 2 for c in counts) / even
    return (chi - (cells - 1)) / sqrt(2 * (cells - 1))


def cells_of(n, seeds, cell):
    """How often (position, index) falls in each cell over many seeds."""
    counts = Counter()
    for seed in range(seeds):
        counts.update(map(cell, range(n), order(n, seed).tolist()))
    return counts.values()


@given(st.integers(1, 2000) | st.integers(4097, 9000), st.integers(-9, 9))
@example(4096, 0)
@example(4097, 0)
@example(8192, 0)
@example(8193, 0)
def test_each_index_comes_once(n, seed):
    """Over all positions of an epoch the order is a bijection on [0, n)."""
    assert sorted(order(n, seed, abs(seed)).tolist()) == list(range(n))


SEEDS = st.integers(-(2**63), 2**63 - 1)
SIZES = st.integers(1, 99) | st.integers(4097, MAX)


@given(SIZES, SEEDS, SEEDS, st.data())
def test_the_order_is_as_written_down(n, seed, epoch, data):
    """Tensor arithmetic agrees with plain integers, at every size."""
    at = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    found = permute(n, seed, abs(epoch), torch.tensor(at)).tolist()
    assert found == [reference(n, seed, abs(epoch), p) for p in at]


@settings(max_examples=25)
@given(st.integers(4097, 9000) | st.integers(4097, 70000), SEEDS, st.integers(0, 9))
def test_an_epoch_at_once_is_the_one_in_parts(n, seed, epoch):
    """However many positions are asked for, and so by whichever way they are found."""
    parts = torch.arange(n).split(n // 20)
    found = torch.cat([permute(n, seed, epoch, part) for part in parts])
    assert torch.equal(order(n, seed, epoch), found)


def test_golden_values():
    """Data orders of old runs stay reproducible; a new order needs a new version."""
    assert ORDER_VERSION == 1
    assert order(10, 0, 0).tolist() == [9, 5, 8, 2, 6, 1, 4, 7, 3, 0]
    at = torch.tensor([0, 1, 10**9 - 1])
    assert permute(10**9, 7, 3, at).tolist() == [186964335, 447287066, 391395844]
    assert permute(MAX, 1, 0, at).tolist() == [
        3192043810218463839,
        3606591453726652222,
        3352038002816302988,
    ]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_small_orders_come_equally_often(n):
    """All n! orders appear, each as often as chance has it."""
    counts = Counter(tuple(order(n, seed).tolist()) for seed in range(2400))
    assert set(counts) == set(permutations(range(n)))
    if n > 1:
        assert surprise(counts.values(), factorial(n)) < 4


@pytest.mark.parametrize("n", [96, 4112, 8192])
def test_position_says_nothing_about_index(n):
    """Coarse and fine, every position meets every index equally often."""

    def coarse(p, i):
        return p * 16 // n, i * 16 // n

    def fine(p, i):
        return p % 8, i % 8

    seeds = 400_000 // n // 4
    assert surprise(cells_of(n, seeds, coarse), 256) < 4
    assert surprise(cells_of(n, seeds, fine), 64) < 4
    assert surprise([n] * 16, 256) > 4  # the control: the order of the dataset itself


@pytest.mark.parametrize("n", [200, 5000])
def test_neighbours_are_not_kept(n):
    """Items side by side in the dataset are apart in the order."""
    kept = 0
    for seed in range(40):
        found = order(n, seed)
        kept += int((found.diff() == 1).sum())
    assert kept < 40 * 3  # 40 by chance; the dataset's own order keeps 40 * (n - 1)


@pytest.mark.parametrize("n", [64, 5000])
def test_seed_epoch_and_size_each_change_the_order(n):
    """Orders of other seeds, epochs and sizes agree by chance alone."""
    here = order(n, 1, 1)
    for other in (order(n, 2, 1), order(n, 1, 2), order(n, 2, 2), order(n + 1, 1, 1)):
        assert int((here == other[:n]).sum()) < 8
    assert torch.equal(here, order(n, 1, 1))


def test_shape_is_kept_and_the_positions_are_untouched():
    """A block of batches comes back as a block."""
    at = torch.arange(12).view(3, 4)
    assert permute(5000, 0, 0, at).shape == (3, 4)
    assert at.tolist() == torch.arange(12).view(3, 4).tolist()


@pytest.mark.parametrize(
    ("n", "seed", "epoch", "words"),
    [
        (0, 0, 0, "1 to 2\\*\\*62 items, got 0"),
        (MAX + 1, 0, 0, "split the dataset"),
        (5, 2**63, 0, "seed must be an integer"),
        (5, 0.5, 0, "got 0.5; write seed=0"),
        (5, 0, -1, "epoch must be at least 0, got -1"),
    ],
)
def test_what_is_out_of_range_is_refused(n, seed, epoch, words):
    """A size, seed or epoch that has no order of its own is an error."""
    with pytest.raises(DataError, match=words):
        permute(n, seed, epoch, torch.arange(1))
