"""What every test starts from: one thread a process, fixed examples, fixed seeds."""

import os

# Before torch is imported, which reads it once. Ranks share the cores with each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import signal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# A shell ignores both in what it starts in the background, and so would all launchers
# that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# The same examples on every run, so that a red run is red again; no deadline, since a
# test that depends on the machine's speed says nothing about the code.
settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def fixed_seed():
    """Start every test from the same random numbers and the same default dtype."""
    random.seed(0)
    np.random.seed(0)  # what a user's own transform would draw from
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def repository(pytestconfig):
    """The root of this checkout."""
    return pytestconfig.rootpath
