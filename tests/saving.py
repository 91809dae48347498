"""A run that is saved and goes on: the model of the laws over a shuffled dataset."""

import torch
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax
from tests.laws.training import LENGTH, TOKENS, curve, grouped, made, masked

ROWS, BATCH = 17, 5  # four batches an epoch, the last of two rows
EPOCH = -(-ROWS // BATCH)


def loader():
    """17 rows of tokens and ragged masks, shuffled, in batches of 5."""
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(TOKENS, (ROWS, LENGTH), generator=draw)
    mask = (torch.rand(ROWS, LENGTH, generator=draw) < 0.6).double()
    mask[:, 1] = 1
    return DataLoader(TensorDataset(tokens, mask), BATCH, shuffle=True)


def chain(env, kind, *more):
    """The pipeline of these tests, with `more` at its end."""
    return ax.chain(
        ax.shard_loader(env, seed=3),
        ax.shard_model(env, kind, "layers.*"),
        ax.clip(0.9),
        ax.with_schedule(curve),
        *more,
    )


def train(tx, stop, optim=grouped, model=None, loss=masked):
    """From where `tx` starts up to batch `stop`: the last state, and each loss."""
    state = ax.init(tx, model or made(), optim)
    step, losses = ax.step(tx, loss), []
    for batch in ax.feed(tx, loader(), start=state, stop=stop):
        state, out = step(state, batch)
        losses.append(float(out.loss))
    return state, losses


def weights(state):
    """Every weight and buffer in full, by name; a collective under fsdp2."""
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
        for name, t in state.model.state_dict().items()
    }
