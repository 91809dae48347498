"""The example of three dimensions: the numbers of one process, on eight ranks."""

import importlib.util
from pathlib import Path

import pytest

import accelx as ax
from accelx import testing
from tests.laws import training as t

pytestmark = [
    pytest.mark.multi,
    t.quiet_views,
    pytest.mark.filterwarnings("ignore:While redistributing:UserWarning"),
]
EXAMPLE = Path(__file__).parents[2] / "examples" / "three_d.py"
NEAR = 2e-5  # losses of 4, in float32


def example():
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("three_d", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def far(trace, judge):
    """The largest difference of a loss or a norm."""
    pairs = zip(trace, judge, strict=True)
    return max(
        abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True)
    )


def test_it_prints_what_one_process_does():
    """Copies and slices of stages that are cut inside layers."""
    three = example()
    judge = three.train(ax.Env(), steps=3)

    def rank(env):
        return [three.train(env, kind, steps=3) for kind in ("ddp", "fsdp2")]

    for kinds in testing.run(8, axes="data=2,stage=2,tensor=2", timeout=150)(rank)():
        for trace in kinds:
            assert far(trace, judge) < NEAR
    assert far(judge[1:], judge[:-1]) > 1e-2  # the control: steps differ by more
