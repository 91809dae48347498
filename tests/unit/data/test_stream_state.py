"""Where streams stand, as plain data in a State."""

from __future__ import annotations

import json
import random

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import accelx as ax
from accelx.data.lent import Lent
from accelx.data.stream import Reading, as_stream
from accelx.data.stream_record import Spot
from tests.streaming import Counting, Parted, Plain


def kept(source, *spots, **fields):
    """A memory of `source` with these spots."""
    memory = Reading(ax.Env())
    stream = as_stream(source, batch_size=2, **fields)
    for spot in spots:
        memory.keep(stream, spot)
    return memory, stream


def carried(memory):
    """The same after a checkpoint, whose values are JSON here but for keys."""
    other = Reading(ax.Env())
    state = memory.state_dict()
    if state:
        text = json.dumps(state["streams"])
        state = {"streams": json.loads(text)}
    other.load_state_dict(state)
    return other


STATES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(STATES, st.integers(0, 5), st.integers(1, 50))
def test_a_state_comes_back_as_it_was(state, used, step):
    """However deep, and whatever it is: one that is nothing is none."""
    memory, stream = kept(Counting(3), Spot(1, 0, step, None, used, state))
    for one in (memory, carried(memory)):
        spot = one.spot(stream, step)
        assert (spot.epoch, spot.first, spot.step) == (1, 0, step)
        assert (spot.used, spot.state) == (used, state)


def test_what_is_no_json_is_kept_as_it_is():
    """Tensors, tuples, and keys that are no text; a checkpoint holds them typed."""
    for state in ({"t": torch.ones(2)}, {"pair": (1, 2)}, {3: "key"}):
        memory, stream = kept(Counting(3), Spot(state=state, step=1))
        other = Reading(ax.Env())
        other.load_state_dict(memory.state_dict())
        assert other.spot(stream, 1).state is state


def test_a_source_without_a_state_begins_its_epoch():
    """It is not read from the start of the run: epochs before are known to be over."""
    memory, stream = kept(Plain(3), Spot(4, 40, 43), Spot(5, 44, 46))
    for one in (memory, carried(memory)):
        assert one.spot(stream, 46) == Spot(5, 44, 44)
        assert one.spot(stream, 43) == Spot(4, 40, 40)
        assert one.spot(stream, 42) == Spot(4, 40, 40)
        assert one.spot(stream, 30) == Spot()


def test_it_remembers_a_few_steps():
    """The newest ones: a save is at most a batch behind what is read."""
    memory, stream = kept(Counting(9), *(Spot(step=k, state=k) for k in range(1, 9)))
    assert memory.spot(stream, 8).state == 8
    assert memory.spot(stream, 5).state == 5
    assert memory.spot(stream, 4) == Spot()
    assert list(memory.state_dict()["streams"][0]["spots"]) == [5, 6, 7, 8]


def test_a_save_after_a_load_holds_both():
    """What was loaded stays until it is out of reach."""
    memory, stream = kept(Counting(9), Spot(step=5, state=5))
    other = Reading(ax.Env())
    other.load_state_dict(memory.state_dict())
    assert other.state_dict() == memory.state_dict()
    other.keep(stream, Spot(step=6, state=6))
    assert list(other.state_dict()["streams"][0]["spots"]) == [5, 6]
    other.load_state_dict({})
    assert other.empty


@pytest.mark.parametrize(
    ("source", "kind"), [(Counting(9), "same-ranks"), (Plain(9), "replay")]
)
def test_parts_want_as_many_ranks(source, kind):
    """Read by two, gone on with by one: refused, with the guarantee and both numbers.

    What is read by one rank alone, the control, goes on.
    """
    memory, stream = kept(source, Spot(step=3, state=3))
    assert memory.spot(stream, 3).epoch == 0
    state = memory.state_dict()
    state["streams"][0]["readers"] = 2
    memory.load_state_dict(state)
    said = rf"by 2 ranks.*step 3 \(guarantee: {kind}\).*got 1; go on with 2 ranks"
    with pytest.raises(ax.DataError, match=said):
        memory.spot(stream, 3)


def test_a_stream_over_ranks_has_the_parts_of_its_ranks():
    """Rank 1 of two finds its own state, and not that of rank 0."""

    class Stated(Parted):
        state_dict = load_state_dict = dict

    for kind in (Stated, Parted):
        memory, stream = kept(kind([1, 2]), Spot(step=2, used=1))
        state = memory.state_dict()
        state["streams"][0] |= {"readers": 2, "exact": kind is Stated}
        spot = state["streams"][0]["spots"][2]
        spot["readers"], spot["live"] = [[1, "a"], [2, "b"]], [1]
        memory.load_state_dict(state)
        env = ax.Env(1, 2, 1, 2)
        here = attrs.evolve(stream, rank=1, world=2, env=env)
        wanted = Spot(0, 0, 2, (1,), 2, "b") if kind is Stated else Spot()
        assert memory.spot(here, 2) == wanted
        assert memory.state_dict() == state


def test_lent_generators_go_on_where_they_were():
    """What the program draws in between moves nothing; generators of torch, Python and
    NumPy from the same start are the judge, another start the control.
    """
    start, lent, other = 5, Lent.of(5), Lent.of(6)
    found = []
    for _ in range(2):
        with lent.lent():
            found.append((torch.rand(3), random.random(), np.random.rand()))
        torch.rand(7), random.random(), np.random.rand()
    judge = torch.Generator().manual_seed(start)
    python, numpy = random.Random(start), np.random.RandomState(start)
    for drawn in found:
        assert torch.equal(drawn[0], torch.rand(3, generator=judge))
        assert drawn[1:] == (python.random(), numpy.rand())
    with other.lent():
        assert not torch.equal(torch.rand(3), found[0][0])
