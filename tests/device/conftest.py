"""What the tests on an accelerator share; without one they are skipped."""

import pytest
import torch

import accelx as ax


def pytest_collection_modifyitems(items):
    """Mark everything in this folder, and skip it on a machine without a GPU."""
    here = [item for item in items if "tests/device" in item.path.as_posix()]
    for item in here:
        item.add_marker(pytest.mark.device)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def env():
    """One process on the first GPU."""
    found = ax.connect(ax.detect({}))
    yield found
    ax.close(found)
