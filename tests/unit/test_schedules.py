"""Curves are closed forms of the step."""

import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR

import accelx as ax

shapes = pytest.mark.parametrize("make", [ax.warmup_cosine, ax.warmup_linear])


@shapes
@given(warmup=st.integers(0, 50), more=st.integers(0, 100), floor=st.floats(0, 1))
def test_curves_rise_then_fall_to_the_floor_and_stay(make, warmup, more, floor):
    """Never 0 while warming up, 1 at its end, the floor from `total` on."""
    curve = make(warmup, warmup + more, floor)
    factors = [curve(k) for k in range(warmup + more + 5)]
    up, down = factors[:warmup], factors[warmup:]
    assert all(f > 0 for f in up)
    assert up == sorted(up)
    assert not up or up[-1] == 1.0
    assert down == sorted(down, reverse=True)
    assert factors[-1] == pytest.approx(floor)
    assert all(min(floor, 1) - 1e-12 <= f <= 1 for f in down)


def test_the_cosine_is_torchs():
    """Without warm-up it is CosineAnnealingLR."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    scheduler, curve = (
        CosineAnnealingLR(optimizer, 10, 0.2),
        ax.warmup_cosine(0, 10, 0.2),
    )
    for k in range(11):
        assert curve(k) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_the_line_is_straight():
    """Half-way down it is half of what lies above the floor."""
    curve = ax.warmup_linear(2, 10, 0.5)
    assert [curve(k) for k in (0, 1, 2, 6, 10, 99)] == [0.5, 1, 1, 0.75, 0.5, 0.5]
    assert ax.warmup_cosine(2, 10, 0.5)(6) == pytest.approx(0.75)
    assert not math.isclose(ax.warmup_cosine(2, 10)(4), ax.warmup_linear(2, 10)(4))


@shapes
@pytest.mark.parametrize(("warmup", "total"), [(-1, 5), (6, 5)])
def test_impossible_curves_are_refused(make, warmup, total):
    """The values are in the message."""
    with pytest.raises(ValueError, match=f"warmup={warmup}, total={total}"):
        make(warmup, total)
