"""Trains, and says of each phase when it begins: `phases.py PHASE FOLDER`.

It stays in that phase until it is told to end.
"""

import sys
import time

import torch

print(f"in {sys.argv[1]}" if sys.argv[1] == "start" else "began", flush=True)
if sys.argv[1] == "start":
    time.sleep(600)

import accelx as ax  # noqa: E402 the phase before it is one of them

PHASE, FOLDER = sys.argv[1:]
env = ax.connect()


def reached(phase: str) -> None:
    """Say so, and stay, if this is the phase that is asked for."""
    if phase == PHASE:
        print(f"in {phase}", flush=True)
        for _ in range(6000):
            time.sleep(0.1)  # as steps do, between which a signal is heard


class Slow:
    """A checkpoint's own value, which takes its time to be written."""

    def state_dict(self) -> dict:
        """Reached while a save is under way."""
        reached("save")
        return {"value": 1}

    def load_state_dict(self, values: dict) -> None:
        """What was saved."""
        assert values == {"value": 1}


def loss(model, x):
    """Reached at each step, also of an evaluation."""
    reached("train" if model.training else "evaluate")
    return model(x).square().mean()


def net():
    """Two layers, of a seed of their own."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))


def slow_compiler(graph, inputs):
    """A backend that takes its time."""
    reached("compile")
    return graph.forward


tx = ax.chain(
    ax.shard_model(env),
    ax.compile("0", backend=slow_compiler),
    ax.load_state(env, FOLDER, missing="fresh"),
)
state = ax.init(tx, net, lambda m: torch.optim.SGD(m.parameters(), 0.1))
print(f"at {state.step}", flush=True)
ax.save_state(env, FOLDER)(state)
step = ax.step(tx, loss)
state, _ = step(state, torch.ones(2, 4))
ax.measure(tx, loss)(state, torch.ones(2, 4))
ax.save_state(env, FOLDER)(ax.with_slot(state, "slow", Slow()))
print(f"done {state.step}", flush=True)
