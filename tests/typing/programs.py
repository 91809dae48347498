"""What a type checker accepts of a user's program, and what it refuses.

Checked by pyright, never run. A line with an ignore must be an error: an ignore that is
not needed is reported.
"""

# pyright: basic, reportUnnecessaryTypeIgnoreComment=true

from torch import Tensor, nn
from torch.optim import SGD

import accelx as ax


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """A user's loss."""
    return model(batch).mean()


def accepted(model: nn.Module, batch: Tensor) -> float:
    """The whole pipeline."""
    env: ax.Env = ax.connect()
    tx: ax.Transform = ax.chain(
        ax.shard_loader(env, seed=0), ax.with_precision("bf16"), ax.accumulate(2)
    )
    state: ax.State = ax.init(tx, model, lambda m: SGD(m.parameters(), 0.1))
    step = ax.step(tx, loss)
    state, out = step(state, batch)
    number: int = state.step
    return float(out.loss) + number


def refused(env: ax.Env) -> None:
    """Wrong types of arguments, and changing a record."""
    ax.accumulate("4")  # pyright: ignore[reportArgumentType]
    ax.clip([1.0])  # pyright: ignore[reportArgumentType]
    ax.chain(ax.accumulate)  # pyright: ignore[reportArgumentType]
    ax.Axis(name="data")  # pyright: ignore[reportCallIssue]
    ax.Env(rank="0")  # pyright: ignore[reportArgumentType]
    env.rank = 1  # pyright: ignore[reportAttributeAccessIssue]
    ax.chian()  # pyright: ignore[reportAttributeAccessIssue]
