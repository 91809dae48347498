"""Random streams: to the bit on the same rank, and well defined on any other."""

import random

import numpy as np
import pytest
import torch

from accelx.errors import DamagedError
from accelx.saves import streams


def draws():
    """The next numbers of every stream."""
    return (
        [random.random() for _ in range(3)],
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.randn(),
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
    )


def seeded(n):
    """Start every stream from `n`, and draw an odd number of normals."""
    random.seed(n)
    np.random.seed(n)
    torch.manual_seed(n)
    random.gauss(0, 1)
    np.random.randn()
    torch.randn(1)


def saved(seeds):
    """The rows of ranks that were seeded so, and what each would draw next."""
    rows, wanted = [], []
    for n in seeds:
        seeded(n)
        rows.append(streams.now("cpu"))
        wanted.append(draws())
    return torch.cat(rows), wanted


def restored(rows, rank):
    """What a rank draws after it has loaded."""
    seeded(99)
    low, high = streams.rows_for(rank, len(rows))
    streams.restore(rows[low:high].clone(), rank, len(rows), "cpu")
    return draws()


def test_a_rank_goes_on_to_the_bit():
    """Uniform and normal draws, with the half of a pair that is kept for later."""
    rows, wanted = saved([1, 2, 3])
    assert rows.shape == (3, streams.SIZE)
    assert [restored(rows, rank) for rank in range(3)] == wanted
    assert len({str(w) for w in wanted}) == 3


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_on_other_ranks_streams_of_their_own_stay_so(world):
    """Two ranks that differ become any number: no two alike, and always the same."""
    rows, wanted = saved([1, 2])
    found = [restored(rows, rank) for rank in range(world)]
    assert found[:2] == wanted[:world]
    assert len({str(each) for each in found}) == world
    assert [restored(rows, rank) for rank in range(world)] == found
    others, _ = saved([1, 3])
    if world > 2:
        assert restored(others, 3) != restored(rows, 3)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_on_other_ranks_a_shared_stream_stays_shared(world):
    """Ranks that were seeded alike draw alike, also those that are new."""
    rows, wanted = saved([7, 7])
    assert [restored(rows, rank) for rank in range(world)] == [wanted[0]] * world


def test_saving_draws_nothing():
    """The streams stand where they stood."""
    seeded(5)
    wanted = draws()
    seeded(5)
    streams.now("cpu")
    assert draws() == wanted


def test_control_without_restoring_the_draws_are_others():
    """What `restored` starts from is not what was saved."""
    _, (wanted,) = saved([1])
    seeded(99)
    assert draws() != wanted


def test_rows_of_another_length_are_refused_with_a_way_on():
    """A checkpoint of another release says how to load the rest."""
    with pytest.raises(DamagedError, match=r"got 9; leave them out.*only="):
        streams.restore(torch.zeros(1, 9, dtype=torch.uint8), 0, 1, "cpu")
