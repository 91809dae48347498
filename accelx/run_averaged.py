"""Evaluation of averaged weights."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from accelx.passes.with_ema import swapped
from accelx.run import evaluating
from accelx.state import State


@contextmanager
def averaged(state: State) -> Generator[Any]:
    """The model with the weights that `with_ema` averaged, in evaluation mode.

    Without gradients; `ax.measure` and `ax.export` inside see the averages, too. At the
    end, also after an error, the weights are to the bit those that were there. Memory:
    a copy of this rank's trained weights. The state is not spent; to step or save it
    inside is refused. Raises PlacementError for a state without `with_ema`.
    """
    with evaluating(state) as model, swapped(state):
        yield model
