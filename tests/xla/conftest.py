"""What the tests on XLA share; without torch_xla they are skipped.

On how many devices they run is said outside, before torch_xla starts and for the whole
process: PJRT_DEVICE=CPU CPU_NUM_DEVICES=4 pytest tests/xla. scripts/test-xla does it.
"""

from importlib.util import find_spec

import pytest
import torch

import accelx as ax
from tests.laws import training as t


def pytest_collection_modifyitems(items):
    """Skip everything in this folder where torch_xla is not installed."""
    for item in items:
        if "tests/xla" in item.path.as_posix() and find_spec("torch_xla") is None:
            item.add_marker(pytest.mark.skip(reason="needs torch_xla"))


@pytest.fixture
def env():
    """One process with all its XLA devices."""
    return ax.connect(ax.detect({}), device="xla")


@pytest.fixture(autouse=True)
def width(monkeypatch):
    """Weights that four devices divide, beside those of 11 rows, which they do not."""
    monkeypatch.setattr(t, "WIDTH", 8)


@pytest.fixture
def compilations():
    """A function: how many programs torch_xla has compiled in this process."""
    from torch_xla.debug import metrics

    def count():
        found = metrics.metric_data("CompileTime")
        return found[0] if found else 0

    return count


@pytest.fixture
def train(env):
    """A function: a run by a chain on XLA, as `by_hand` trains; its trace and state."""
    from accelx._xla import host, put

    def run(*passes, loss=t.bare, optim=t.grouped, rows=(8, 8, 6), model=None):
        placed = ax.shard_model(env, "xla")
        tx = ax.chain(placed, *passes, ax.clip(t.LIMIT), ax.with_schedule(t.curve))
        state = ax.init(tx, model or t.made(torch.float32), optim)
        step, trace = ax.step(tx, loss), []
        for batch in t.batches(rows, torch.float32):
            state, out = step(state, [put(tensor) for tensor in batch])
            kept = {n: host(w) for n, w in t.weights(state.model).items()}
            trace.append(t.Step(float(out.loss), float(out.norm), kept))
        return trace, state

    return run
