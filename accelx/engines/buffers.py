"""Buffers that a forward pass makes different on each rank: said, once."""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from accelx._torch import version_of
from accelx.comm_trees import gather_objects
from accelx.engines.placed import across
from accelx.errors import NeutralityWarning
from accelx.records import Env

if TYPE_CHECKING:
    from accelx.state import State


def say_parted(state: State, env: Env) -> None:
    """Warn of persistent buffers that ranks, all alike at first, have unlike now.

    Running statistics, which a step averages, are none of them. Effect: one exchange
    of digests, where the model has others.
    """
    digests = {name: _digest(buffer) for name, buffer in _kept(state.model)}
    if not digests:
        return
    here = gather_objects(env, digests)
    names = [n for n in digests if any(other.get(n) != digests[n] for other in here)]
    if names:
        warnings.warn(
            f"forward changes {', '.join(names[:5])} by the rows of one rank, so each "
            "rank keeps buffers of its own, and no number made of them is that of one "
            "process; reduce over ranks what goes into them, "
            'ax.reduce(env, x, "mean"), or keep them out of what the loss and the '
            "evaluation read",
            NeutralityWarning,
            stacklevel=2,
        )


def marks(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Each persistent buffer, and how often it was written into."""
    return {name: (b, version_of(b)) for name, b in _kept(model)}


def say_cut(model: nn.Module, before: dict[str, tuple[Tensor, int]], n: int) -> None:
    """Warn of buffers that each of `n` microbatches has changed, where one should.

    `before`: the `marks` from before the first of them.
    """
    now = marks(model)
    names = [
        name
        for name, (buffer, version) in before.items()
        if name in now and (now[name][0] is not buffer or now[name][1] != version)
    ]
    if names:
        warnings.warn(
            f"forward changes {', '.join(names[:5])}, and accumulate({n}) runs it {n} "
            "times a step, on parts of the rows, so no number made of them is that of "
            "a whole batch: spectral_norm, for one, goes on more quickly to the same "
            "norm. Leave accumulate out, or keep them out of what the loss reads "
            "(weight_norm has none)",
            NeutralityWarning,
            stacklevel=2,
        )


def _kept(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds, those of batch normalisation left out."""
    saved = {id(t) for t in model.state_dict(keep_vars=True).values()}
    known = {*across(model)}
    named = [(n, b) for n, b in model.named_buffers() if id(b) in saved]
    return [(n, b) for n, b in named if n.rpartition(".")[0] not in known]


def _digest(buffer: Tensor) -> bytes:
    plain = buffer.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.blake2b(plain.numpy().tobytes(), digest_size=16).digest()
