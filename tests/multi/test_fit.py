"""Ranks agree on a microbatch, also where one of them has less memory."""

import json
import subprocess
import sys
from functools import cache

import pytest
import torch
import torch._dynamo  # optimizers import it when first made: here, not in each rank
import torch.distributed.fsdp
from torch import nn

import accelx as ax
from accelx.fit import fit_batch
from accelx.rows import mark
from accelx.testing import run
from tests.limits import limit

pytestmark = pytest.mark.multi
MB = 2**20
ROWS = 8  # of a rank; a row's activations are some 3 MB


class Scale(nn.Module):
    """Two weights for any number of features."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.9, 0.1]))

    def forward(self, x):
        return torch.tanh(x * self.weight[0] + self.weight[1])


class Wide(nn.Module):
    """Few weights, in layers, and activations that are wide."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Scale(), Scale()])

    def forward(self, x):
        x = x.expand(-1, MB // 8)
        for layer in self.layers:
            x = layer(x)
        return x


def loss(model, x):
    return model(x).square().mean()


def adam(model):
    return torch.optim.AdamW(model.parameters(), 0.01)


def batch(env):
    x = torch.linspace(-1, 1, ROWS * env.world).view(-1, 1)
    part = x[env.rank * ROWS :][:ROWS].clone()
    return mark(part, ROWS, ROWS * env.world)


def started(env, kind):
    tx = ax.chain(ax.shard_model(env, kind, blocks="layers.*"), ax.clip(1.0))
    return tx, ax.init(tx, Wide, adam)


def weights(state):
    """Copies of this rank's slices."""
    own = [p.detach() for p in state.model.parameters()]
    return [(p.to_local() if hasattr(p, "to_local") else p).clone() for p in own]


def unequal(env, kind, low):
    """Rank 1 gets little; what it finds alone, what all find, and a step with it."""
    tx, state = started(env, kind)
    state, _ = ax.step(tx, loss)(state, batch(env)[:1].clone())  # imports and pools
    _, whole = ax.step(tx, loss)(ax.fork(state), batch(env))
    wanted = float(whole.loss)
    if env.rank == 1:
        limit(low)
    alone = ax.init(ax.identity, Wide, adam)
    mine = mark(batch(env).clone(), ROWS, ROWS)
    single = fit_batch(ax.Env(), ax.identity, loss, mine, state=alone)
    before = weights(state)
    found = fit_batch(env, tx, loss, batch(env), state=state)
    assert all(map(torch.equal, before, weights(state)))
    _, out = ax.step(ax.chain(tx, found), loss)(state, batch(env))
    assert out.stepped
    assert float(out.loss) == pytest.approx(wanted, rel=1e-6)
    return single.find("accumulate").n, found.find("accumulate").n


def staged(env, low):
    """Of a model in stages: what fits, what does where rank 1 gets little, a loss."""
    cut = ax.shard_stages(env, "layers.1", 2, "gpipe")
    tx, x = ax.chain(cut, ax.shard_model(env), ax.clip(1.0)), batch(ax.Env())
    state = ax.init(tx, Wide, adam)
    ax.step(tx, loss)(state, x[:1].clone())  # imports and pools
    state = ax.init(tx, Wide, adam)
    rich = fit_batch(env, tx, loss, x, state=state)
    if env.rank == 1:
        limit(low)
    before = weights(state)
    found = fit_batch(env, tx, loss, x, state=state)
    assert all(map(torch.equal, before, weights(state)))
    _, out = ax.step(ax.chain(tx, found), loss)(state, x)
    return rich.find("accumulate").n, found.find("accumulate").n, float(out.loss)


@cache
def in_a_new_process():
    """What ranks of a process find whose heap no other test has used."""
    program = [sys.executable, "-m", "tests.multi.test_fit"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=150)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_all_take_what_the_rank_with_least_memory_can(kind):
    """A real limit on rank 1: both get its n, the step runs, its loss is the same.

    The control is each rank by itself, which would take another.
    """
    (rich, first), (poor, second) = in_a_new_process()[kind]
    assert rich == 1 < poor
    assert first == second > 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_stages_take_what_the_rank_with_least_memory_can():
    """All fits without the limit, the control; the loss is that of one process."""
    wanted = loss(Wide(), batch(ax.Env())).item()
    (rich, first, got), (other, second, same) = in_a_new_process()["stage"]
    assert rich == other == 1
    assert first == second > 1
    assert got == same == pytest.approx(wanted, rel=1e-6)


def bypassing(model, x):
    """Does not call the model itself, so that ranks would train apart."""
    return model.layers[1](model.layers[0](x)).mean()


def one_fails(env):
    tx, state = started(env, "ddp")

    def broken(model, x):
        if env.rank == 1:
            raise ValueError("no such token")
        return loss(model, x)

    with pytest.raises((ValueError, ax.CollectiveError)) as caught:
        fit_batch(env, tx, broken, batch(env)[:2].clone(), state=state)
    _, out = ax.step(tx, loss)(ax.fork(state), batch(env)[:2].clone())
    fit_batch(env, tx, loss, batch(env)[:2].clone(), state=state)
    with pytest.raises(ax.PlacementError, match=r"write model\(\.\.\.\) in the loss"):
        ax.step(tx, bypassing)(state, batch(env)[:2].clone())
    return type(caught.value).__name__, str(caught.value), out.stepped


def test_an_error_on_one_rank_is_told_to_all():
    """None waits for a rank that has gone; the state is good for a step.

    And a trial is no call of the model that would hide a loss without one.
    """
    (first, text, done0), (second, own, done1) = run(2)(one_fails)()
    assert first == "CollectiveError"
    assert "ValueError: no such token on rank 1" in text
    assert (second, own) == ("ValueError", "no such token")
    assert done0
    assert done1


if __name__ == "__main__":
    tried = {kind: run(2)(unequal)(kind, 16 * MB) for kind in ("ddp", "fsdp2")}
    tried["stage"] = run(2, axes="stage=2")(staged)(16 * MB)
    print(json.dumps(tried))
