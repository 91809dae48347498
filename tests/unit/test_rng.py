"""Seeding starts every generator, alike or apart."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from accelx.records import Env
from accelx.rng import seed

ONE, TWO = Env(0, 2, 0, 2), Env(1, 2, 1, 2)


def draw(env, n, per_rank=False):
    """A number of each generator, right after seeding."""
    seed(env, n, per_rank)
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_every_generator_starts_from_the_number():
    """Equal seeds draw alike on all ranks, others apart, in each of the three."""
    first = draw(ONE, 7)
    assert first == draw(ONE, 7) == draw(TWO, 7)
    assert all(a != b for a, b in zip(first, draw(ONE, 8), strict=True))
    torch.manual_seed(7)
    assert first[2] == float(torch.rand(()))  # torch's own, from the same number


def test_ranks_can_be_set_apart():
    """With per_rank, rank 1 draws what seed n + 1 draws."""
    assert draw(ONE, 7, per_rank=True) == draw(ONE, 7)
    assert draw(TWO, 7, per_rank=True) == draw(ONE, 8)


def test_large_seeds_are_taken():
    """The largest seed torch takes works; ranks must not pass it."""
    assert len(draw(ONE, 2**63 - 1)) == 3
    with pytest.raises(ValueError, match="got 9223372036854775807"):
        seed(ONE, 2**63 - 1, per_rank=True)


@pytest.mark.parametrize("n", [-1, 2**63])
def test_other_numbers_are_refused(n):
    """The error shows the range and the number."""
    with pytest.raises(ValueError, match=rf"0 to 9223372036854775807, got {n}"):
        seed(ONE, n)
