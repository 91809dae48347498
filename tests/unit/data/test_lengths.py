"""Batches by tokens and by length: each item once, in budget, of like length."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader, TensorDataset

from accelx.data.lengths import ByLength, ByTokens, Lengths, by_length, by_tokens
from accelx.errors import DataError
from accelx.permutation import permute

LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=60)
SEEDS = st.integers(-(2**63), 2**63 - 1)
EPOCHS = st.integers(0, 5)
FLAGS = {"shuffle": st.booleans(), "padded": st.booleans()}
BY_TOKENS = st.builds(
    by_tokens, st.integers(12, 40), LENGTHS, window=st.integers(0, 3), **FLAGS
)
BY_LENGTH = st.builds(
    by_length,
    st.integers(1, 7),
    LENGTHS,
    shuffle=st.booleans(),
    window=st.integers(1, 3),
    drop_last=st.booleans(),
)


def greedy(order, lengths, budget, padded):
    """The judge: one item after another, as long as the batch's tokens stay within."""
    found, batch = [], []
    for i in order:
        held = [lengths[j] for j in [*batch, i]]
        if batch and (max(held) * len(held) if padded else sum(held)) > budget:
            found.append(batch)
            batch = []
        batch = [*batch, i]
    return [*found, batch] if batch else found


def ordered(sampler, seed, epoch):
    """The epoch's order of items, before any is cut into batches."""
    n = len(sampler.lengths)
    order = torch.arange(n)
    return (permute(n, seed, epoch, order) if sampler.shuffle else order).tolist()


def flat(batches):
    """One list of many."""
    return [i for batch in batches for i in batch]


@settings(max_examples=300)
@given(BY_TOKENS, SEEDS, EPOCHS)
def test_by_tokens_is_what_a_loop_over_the_order_cuts(sampler, seed, epoch):
    """Without a window: the batches of a plain greedy loop, one after another."""
    plain = attrs.evolve(sampler, window=0)
    lengths, order = sampler.lengths.values.tolist(), ordered(sampler, seed, epoch)
    judged = greedy(order, lengths, sampler.budget, sampler.padded)
    assert list(plain.over(seed, epoch)) == judged
    assert list(plain(order)) == judged
    assert plain.count(seed, epoch) == len(judged)


@settings(max_examples=300)
@given(BY_TOKENS, SEEDS, EPOCHS)
def test_by_tokens_gives_each_item_once_within_the_budget(sampler, seed, epoch):
    """Sorted or not, shuffled or not; and a batch is never empty."""
    batches, values = list(sampler.over(seed, epoch)), sampler.lengths.values
    assert sorted(flat(batches)) == list(range(len(values)))
    for batch in batches:
        rows = len(batch) if sampler.padded else 1
        cost = rows * values[batch].max() if sampler.padded else values[batch].sum()
        assert batch
        assert cost <= sampler.budget
    assert len(batches) == sampler.count(seed, epoch)
    assert not sampler.constant or len(batches) == len(sampler)


@settings(max_examples=300)
@given(st.one_of(BY_TOKENS, BY_LENGTH), SEEDS, EPOCHS)
def test_an_epoch_is_the_stream_of_its_order(sampler, seed, epoch):
    """Planned at once or streamed, batches are the same; their order is shuffled."""
    planned = list(sampler.over(seed, epoch))
    streamed = list(sampler(iter(ordered(sampler, seed, epoch))))
    if sampler.shuffle and sampler.window:
        planned, streamed = sorted(planned), sorted(streamed)
    assert planned == streamed


@settings(max_examples=200)
@given(BY_LENGTH, SEEDS, EPOCHS)
def test_by_length_sorts_windows_of_the_order(sampler, seed, epoch):
    """The judge: each window sorted by a stable sort, cut into equal batches."""
    order, size = ordered(sampler, seed, epoch), sampler.batch_size
    kept = order[: len(order) // size * size] if sampler.drop_last else order
    judged = []
    for low in range(0, len(kept), size * sampler.window):
        window = kept[low : low + size * sampler.window]
        window = sorted(window, key=sampler.lengths.values.tolist().__getitem__)
        judged += [window[i : i + size] for i in range(0, len(window), size)]
    batches = list(sampler.over(seed, epoch))
    assert sorted(batches) == sorted(judged)
    assert batches == judged or sampler.shuffle
    assert sampler.count(seed, epoch) == len(batches) == len(sampler)
    short = [batch for batch in batches if len(batch) < size]
    assert len(short) == (0 if sampler.drop_last else bool(len(order) % size))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: by_tokens(30, n, shuffle=True),
        lambda n: by_tokens(30, n, padded=True, window=2),
        lambda n: by_length(4, n, shuffle=True, window=2),
    ],
)
def test_torch_loads_the_same_batches(make, workers):
    """The judge: torch's own DataLoader takes it as a batch sampler, and its length."""
    lengths = (torch.arange(50) * 7 % 13).tolist()
    sampler = make(lengths)
    data = TensorDataset(torch.arange(50))
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
    found = [batch.tolist() for (batch,) in loader]
    assert found == list(sampler.over(0, 0)) == list(sampler)
    assert len(loader) == len(found) == len(sampler)


def test_shuffled_epochs_differ_and_are_repeatable():
    """Seed and epoch order items and batches; the same ones do so again."""
    lengths = torch.arange(200) % 17
    for make in (
        lambda **k: by_tokens(40, lengths, **k),
        lambda **k: by_tokens(40, lengths, window=3, **k),
        lambda **k: by_length(8, lengths, **k),
    ):
        mixed = make(shuffle=True)
        orders = [flat(mixed.over(s, e)) for s, e in [(0, 0), (0, 1), (1, 0), (0, 0)]]
        assert orders[0] == orders[3]
        assert orders[0] != orders[1] != orders[2] != orders[0]
        still = make()
        assert list(still.over(0, 0)) == list(still.over(3, 7))


def padding(sampler):
    """Tokens of an epoch that only fill rows up."""
    values = sampler.lengths.values
    cost = [len(b) * int(values[b].max()) for b in sampler.over(0, 0)]
    return sum(cost) - int(values.sum())


def test_like_lengths_pad_less():
    """Sorted windows pad under a third of what the order does, which is the control."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (3000,), generator=draw)
    mixed = padding(by_length(16, lengths, shuffle=True, window=1))
    unsorted = sum(
        16 * int(lengths[i : i + 16].max()) for i in range(0, 2992, 16)
    ) - int(lengths[:2992].sum())
    assert abs(mixed - unsorted) < 0.1 * unsorted
    assert padding(by_length(16, lengths, shuffle=True)) < unsorted / 10
    plain = by_tokens(3200, lengths, shuffle=True, padded=True)
    sorted_too = attrs.evolve(plain, window=20)
    assert padding(sorted_too) < padding(plain) / 3
    assert len(sorted_too) < len(plain)


def test_batches_of_a_window_are_shuffled_over_the_epoch():
    """Short and long batches do not come in a row: the first half has both."""
    sampler = by_length(10, range(1000), shuffle=True, window=100)
    tops = [max(batch) for batch in sampler.over(0, 0)]
    assert sorted(tops) == list(range(9, 1000, 10))  # one window: all sorted
    assert min(tops[:50]) < 300
    assert max(tops[:50]) > 700
    for seed, epoch in ((1, 0), (0, 1)):  # the batches are the same, their order is not
        others = [max(batch) for batch in sampler.over(seed, epoch)]
        assert sorted(others) == sorted(tops)
        assert others != tops


def test_the_order_never_changes():
    """What was read last year is read again: an epoch as it was first written down."""
    sampler = by_length(2, [3, 1, 4, 1, 5, 9, 2], shuffle=True, window=2)
    assert list(sampler.over(1, 2)) == [[5], [1, 6], [3, 4], [0, 2]]


def test_longer_items_are_refused_or_left_out():
    """An item that fits no batch is named with its length; `longest` leaves it out."""
    lengths = [3, 9, 4, 12]
    with pytest.raises(DataError, match=r"a batch of 10 tokens, got item 3 of 12.*10"):
        by_tokens(10, lengths)
    sampler = by_tokens(10, lengths, longest=10)
    assert list(sampler) == [[0], [1], [2]]
    assert list(sampler(range(4))) == [[0], [1], [2]]
    assert (sampler.left_out, by_tokens(12, lengths).left_out) == (1, 0)
    assert list(attrs.evolve(sampler, longest=4)) == [[0, 2]]
    assert list(attrs.evolve(sampler, longest=4, window=1)(range(4))) == [[0, 2]]
    with pytest.raises(DataError, match=r"longest=2 tokens, got none; .* has 3"):
        by_tokens(10, lengths, longest=2)


@pytest.mark.parametrize(
    "values",
    [
        [3, 1, 2],
        range(1, 4),
        torch.tensor([3, 1, 2]),
        torch.tensor([3, 1, 2], dtype=torch.uint16),
        np.array([3, 1, 2], dtype=np.int32),
        Lengths(torch.tensor([3, 1, 2])),
    ],
)
def test_lengths_may_be_lists_tensors_and_arrays(values):
    """All of them are held as int64 of their own."""
    held = by_tokens(8, values).lengths.values
    assert held.dtype == torch.int64
    assert sorted(held.tolist()) == [1, 2, 3]


def test_lengths_are_not_changed_from_outside():
    """The plan of yesterday holds, whatever becomes of the tensor that was given."""
    given_lengths = torch.tensor([3, 1, 2])
    sampler = by_tokens(4, given_lengths)
    given_lengths.fill_(4)
    assert list(sampler) == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([], "at least one item, got shape"),
        ([1.0, 2.0], "of torch.float32"),
        ([True, False], "of torch.bool"),
        ([[1], [2]], r"got shape \(2, 1\)"),
        ([1, -2, 3], "at least 0, got -2 for item 1"),
        (["a"], "got list"),
        ([1, [2]], "got list"),
        (None, "got NoneType"),
        ([2**70], "got list"),
    ],
)
def test_lengths_that_are_none_are_refused(values, match):
    """Both samplers say what came."""
    with pytest.raises(DataError, match=match):
        by_tokens(8, values)
    with pytest.raises(DataError, match=match):
        by_length(8, values)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: by_tokens(0, [1]), "budget must be .* at least 1, got 0"),
        (lambda: by_tokens(2.5, [1]), "budget must be .* got 2.5"),
        (lambda: by_tokens(8, [1], window=-1), "window must be .* got -1"),
        (lambda: by_tokens(8, [1], longest=-1), "longest must be .* got -1"),
        (lambda: by_length(0, [1]), "batch_size must be .* got 0"),
        (lambda: by_length(True, [1]), "batch_size must be .* got True"),
        (lambda: by_length(1, [1], window=0), "window must be .* got 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, match):
    """The message names the setting and what came."""
    with pytest.raises(DataError, match=match):
        make()


def test_they_print_as_the_code_that_makes_them():
    """Short lengths in full, long ones by their number; equal ones are equal."""
    for made in (
        by_tokens(8, [3, 1], shuffle=True, padded=True, longest=3, window=2),
        by_tokens(8, [3, 1]),
        by_length(2, [3, 1], drop_last=True, window=7),
        by_length(2, [3, 1]),
    ):
        again = eval(repr(made))
        assert (again, hash(again), repr(again)) == (made, hash(made), repr(made))
    assert repr(by_tokens(8, [3, 1])) == "by_tokens(8, [3, 1])"
    assert repr(by_length(2, range(9))) == "by_length(2, <9 lengths>)"
    assert by_tokens(8, [3, 1]) != by_tokens(8, [1, 3])
    assert by_tokens(8, [3, 1]) != by_tokens(9, [3, 1])
    assert isinstance(by_tokens(8, [3]), ByTokens)
    assert isinstance(by_length(8, [3]), ByLength)
    assert Lengths(torch.tensor([3])) != [3]
