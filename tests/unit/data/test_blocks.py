"""The order of blocks: each row once, for any batch, and each block for few readers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings, strategies as st

from accelx.data import blocks as order
from accelx.data.blocks import Blocks, lanes_and_turns, locate, order_at, segments
from accelx.permutation import key, permute

MASK = 2**64 - 1
SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=20)
BATCHES = st.integers(1, 40)


def blocks_of(rows, nbytes=0):
    return Blocks(torch.tensor(rows, dtype=torch.int64), nbytes)


def epoch_of(blocks, batch_size, seed=0, epoch=0):
    """The whole order of an epoch."""
    every = torch.arange(len(blocks))
    return order_at(blocks, every, seed=seed, epoch=epoch, batch_size=batch_size)


@given(SIZES, BATCHES, st.integers(-3, 3), st.integers(0, 2))
def test_an_epoch_has_each_row_once(rows, batch_size, seed, epoch):
    """Whatever the sizes of blocks and batches."""
    found = epoch_of(blocks_of(rows), batch_size, seed, epoch)
    assert sorted(found.tolist()) == list(range(sum(rows)))


@given(st.integers(1, 400), BATCHES, st.integers(1, 9), st.integers(1, 13))
def test_segments_are_a_bijection(n, batch_size, lanes, turns):
    """For any number of lanes and turns, the short batch at the end included."""
    lanes = min(lanes, batch_size)
    found = segments(n, batch_size, lanes, turns, torch.arange(n))
    assert sorted(found.tolist()) == list(range(n))
    full = n // batch_size * batch_size
    assert found[full:].tolist() == list(range(full, n))


@given(SIZES, BATCHES, st.data())
def test_a_position_is_found_alone(rows, batch_size, data):
    """Any positions, in any shape, stand where the whole epoch has them."""
    blocks = blocks_of(rows)
    whole = epoch_of(blocks, batch_size)
    at = st.lists(st.integers(0, len(blocks) - 1), min_size=4, max_size=4)
    asked = torch.tensor(data.draw(at)).view(2, 2)
    found = order_at(blocks, asked, seed=0, epoch=0, batch_size=batch_size)
    assert torch.equal(found, whole[asked])


@given(SIZES, st.data())
def test_a_row_is_located(rows, data):
    """Its block and its place there, as a list of lists has them."""
    plain = [(b, r) for b, n in enumerate(rows) for r in range(n)]
    index = data.draw(st.integers(0, len(plain) - 1))
    block, row = locate(blocks_of(rows), torch.tensor([index]))
    assert (int(block), int(row)) == plain[index]


def mix(x):
    """The splitmix64 finaliser, by integers of any length."""
    x &= MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def signed(x):
    return x - 2**64 if x >= 2**63 else x


def sequence(rows, seed, epoch):
    """The rows of all blocks as the module's text says it, one number at a time."""
    n, found = len(rows), []
    starts = [sum(rows[:b]) for b in range(n)]
    own = signed(key(201, seed))
    for b in permute(n, own, epoch, torch.arange(n)).tolist():
        base = mix(b + key(202, seed, epoch))
        if rows[b] <= 4096:
            inner = sorted(range(rows[b]), key=lambda r: signed(mix(r + base)))
        else:
            inner = permute(rows[b], signed(base), 0, torch.arange(rows[b])).tolist()
        found += [starts[b] + r for r in inner]
    turned = key(203, seed, epoch) % len(found)
    return found[turned:] + found[:turned]


def reference(rows, batch_size, seed, epoch, lanes=8, turns=12):
    """The order by walking each segment with a list of its own."""
    whole, lanes = sequence(rows, seed, epoch), min(lanes, batch_size)
    full = len(whole) // batch_size
    places = {}
    for lane in range(lanes):
        slots = range(lane * batch_size // lanes, (lane + 1) * batch_size // lanes)
        for turn in sorted(range(turns), key=lambda t: (t % 2, t % 4, t)):
            for step in range(turn, full, turns):
                for slot in slots:
                    places[step * batch_size + slot] = len(places)
    return [whole[places.get(p, p)] for p in range(len(whole))]


@settings(max_examples=40)
@given(SIZES, BATCHES, st.integers(-3, 3), st.integers(0, 2))
def test_the_order_is_what_its_text_says(rows, batch_size, seed, epoch):
    """Against the definition, walked row by row in plain Python."""
    ours = epoch_of(blocks_of(rows), batch_size, seed, epoch).tolist()
    assert ours == reference(rows, batch_size, seed, epoch)


def test_large_blocks_are_ordered_as_the_text_says():
    """Blocks above and below the size up to which rows are sorted, mixed."""
    rows = [3, 5000, 1, 4096, 4097, 7]
    assert epoch_of(blocks_of(rows), 10, 5, 1).tolist() == reference(rows, 10, 5, 1)


def test_the_order_never_changes():
    """Golden values of version 1: data read last year are read again."""
    assert order.ORDER_VERSION == 1
    blocks = blocks_of([3, 5, 2, 4097, 6])
    at = torch.tensor([0, 1, 2, 3, 100, 1000, 4000, len(blocks) - 1])
    found = order_at(blocks, at, seed=3, epoch=2, batch_size=10)
    assert found.tolist() == GOLDEN


GOLDEN = [2475, 2972, 1945, 3061, 3096, 1887, 254, 464]


def test_seeds_and_epochs_differ():
    """Each has an order of its own, also of the rows within one block."""
    for blocks in (blocks_of([4] * 10), blocks_of([40])):
        pairs = [(0, 0), (0, 1), (1, 0), (-1, 0)]
        orders = {tuple(epoch_of(blocks, 8, *pair).tolist()) for pair in pairs}
        assert len(orders) == 4


@pytest.mark.parametrize(
    ("nbytes", "batch_size", "wanted"),
    [
        *((0, 64, (8, 12)), (2**20, 64, (8, 12)), (2**20, 3, (3, 12))),
        *((30 * 2**20, 64, (8, 4)), (100 * 2**20, 64, (4, 4))),
        *((200 * 2**20, 64, (2, 4)), (2**30, 64, (1, 4)), (2**40, 1, (1, 4))),
    ],
)
def test_large_blocks_have_fewer_lanes(nbytes, batch_size, wanted):
    """So that those that are read at once fit into memory, all readers together."""
    lanes, turns = lanes_and_turns(blocks_of([1], nbytes), batch_size)
    assert (lanes, turns) == wanted
    assert lanes * turns * nbytes <= 2 * 2**30 or (lanes, turns) == (1, 4)


def readers(found, blocks, batch_size, ranks, workers):
    """For each block the (rank, worker)s that read it, by the loader's arithmetic."""
    block, _ = locate(blocks, found)
    seen = {}
    for p, b in enumerate(block.tolist()):
        step, slot = divmod(p, batch_size)
        rank = next(r for r in range(ranks) if slot < (r + 1) * batch_size // ranks)
        seen.setdefault(b, set()).add((rank, step % workers))
    return seen


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 2), (4, 3), (8, 4)])
def test_a_block_has_one_reader_but_at_borders(ranks, workers):
    """Of 400 blocks, only those where a segment ends are read by two."""
    blocks, batch_size = blocks_of([25] * 400), 16
    found = epoch_of(blocks, batch_size)
    counts = [
        len(s) for s in readers(found, blocks, batch_size, ranks, workers).values()
    ]
    assert len(counts) == 400
    assert sum(counts) - 400 <= 8 * 12 + 1  # a border each


def test_control_a_full_permutation_has_every_reader_in_every_block():
    """Of four readers, each of which then reads all that is stored."""
    blocks = blocks_of([25] * 400)
    full = permute(len(blocks), 0, 0, torch.arange(len(blocks)))
    every = readers(full, blocks, 16, 2, 2).values()
    assert sum(map(len, every)) > 3.9 * 400


def test_a_batch_comes_from_many_blocks():
    """As many as there are lanes, and the next step from others again."""
    blocks = blocks_of([50] * 400)
    block, _ = locate(blocks, epoch_of(blocks, 32))
    steps = block[: 32 * 600].view(600, 32)
    per_step = [len(set(step.tolist())) for step in steps]
    assert min(per_step) >= 8
    assert max(per_step) <= 16  # a lane may be at the end of a block
    assert len(set(steps[:12].flatten().tolist())) >= 90  # 12 turns of 8 lanes


def test_blocks_are_evenly_placed():
    """Over many epochs each row is equally often in the first batch."""
    blocks, counts = blocks_of([3, 5, 4, 4, 2, 6]), Counter()
    for epoch in range(3000):
        at = torch.arange(4)
        found = order_at(blocks, at, seed=1, epoch=epoch, batch_size=4)
        counts.update(found.tolist())
    even = 3000 * 4 / 24
    chi = sum((counts[row] - even) ** 2 / even for row in range(24))
    assert abs(chi - 23) / 46**0.5 < 4


def test_a_position_costs_the_same_anywhere():
    """Of 10**9 rows in 10**6 blocks, one batch needs no more memory than its blocks."""
    blocks = blocks_of([1000] * 10**6)
    at = torch.arange(64) + 64 * 7_812_499
    found = order_at(blocks, at, seed=0, epoch=0, batch_size=64)
    assert len(set(found.tolist())) == 64
    assert len(set(locate(blocks, found)[0].tolist())) <= 16
