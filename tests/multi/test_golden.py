"""What earlier versions have saved is read, to the bit, by this one."""

import json

import pytest
import torch

import accelx as ax
from accelx import testing
from tests.goldens import GOLDEN, digests
from tests.laws import odd
from tests.laws.test_l5_restore import chain, made
from tests.laws.training import quiet_views

pytestmark = [pytest.mark.multi, quiet_views]
CASES = sorted(path.parent for path in GOLDEN.glob("accelx-*/*/expected.json"))


def loaded(env, folders):
    """Every golden checkpoint on these ranks, as digests of the state it makes."""
    torch.set_default_dtype(torch.float64)
    found = []
    for folder in folders:
        _, kind, name = folder.name.split("-")
        kind = "ddp" if kind == "plain" and env.world > 1 else kind
        tx = chain(env, kind, ax.load_state(env, str(folder), verify="full"))
        found.append(digests(odd.described(made(9, name, tx))))
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_a_golden_checkpoint_makes_the_state_that_was_saved(world):
    """Weights, buffers, optimizers, groups, slots and counters, on one rank and two."""
    assert CASES
    wanted = [json.loads((f / "expected.json").read_text()) for f in CASES]
    for rank in testing.run(world)(loaded)(CASES):
        for folder, one, got in zip(CASES, wanted, rank, strict=True):
            odd_ones = {k for k in {*one, *got} if one.get(k) != got.get(k)}
            assert not odd_ones, folder.name


def test_control_another_state_has_other_digests():
    """A state that was not loaded differs in nearly all of it."""
    torch.set_default_dtype(torch.float64)
    fresh = digests(odd.described(made(9, "adamw", chain(ax.Env(), "plain"))))
    folder = next(f for f in CASES if f.name == "1-plain-adamw")
    wanted = json.loads((folder / "expected.json").read_text())
    assert sum(fresh.get(k) != wanted[k] for k in wanted) > 20
