"""Tokens of ranks that share layers: the same, of which each sends a share, or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accelx import _torch, comm
from accelx.engines.tensors import ALIKE
from accelx.errors import PlacementError
from accelx.records import Env


def share(env: Env, rows: Tensor) -> Tensor:
    """This rank's part of rows that all ranks of `env` have; their gradient is whole.

    Parts differ by more than a row, or are empty, where ranks do not divide the rows.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh: Any = comm.mesh(env)
    every = DTensor.from_local(rows, mesh, [Replicate()], run_check=False)
    return every.redistribute(placements=[Shard(0)]).to_local()


def joined(env: Env, part: Tensor, like: Tensor) -> Tensor:
    """The rows of all ranks of `env`, as many as `like` has, on each of them."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh: Any = comm.mesh(env)
    shape = like.shape
    stride = torch.empty(shape, device="meta").stride()
    parts = DTensor.from_local(
        part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
    )
    return parts.redistribute(placements=[Replicate()]).to_local()


def weighed(module: Any, tokens: Tensor, index: Tensor, ones: Tensor) -> None:
    """Refuse experts whose results are not multiplied by `weights`, and no more.

    Those that leave out a token for its weight, or divide by a sum of weights, would do
    so by the ones that they are given, as weights stay on the ranks of their tokens.
    """
    if not _torch.has_numbers(tokens):
        return
    some = torch.linspace(0.05, 0.95, len(ones)).to(ones)[:, None]
    made: list[Tensor] = []
    for weights in (ones, some):  # each with the same dropout, if there is any
        devices = [] if tokens.device.type == "cpu" else [tokens.device]
        kind = "cuda" if not devices else tokens.device.type
        with torch.random.fork_rng(devices, device_type=kind), torch.no_grad():
            made.append(type(module).forward(module, tokens, index, weights).float())
    gap, size = (made[1] - some.float() * made[0]).norm(), made[0].norm()
    if made[0].isfinite().all() and gap > ALIKE * size:
        raise PlacementError(
            f"shard_experts wants {type(module).__name__}.forward(tokens, index, "
            "weights) to add up each expert's result times its weight, but it makes "
            "something else of weights; choose, drop and normalize where they are "
            "routed, outside of it"
        )


def compare(env: Env, tokens: Tensor, own: bool) -> None:
    """Refuse tokens that differ over the ranks of `env`, or, if they are `own`, do not.

    Else some would not be sent, or be sent by each rank. Compares sums over tokens, to
    what rounding and their size make of them. A simulated rank has none to compare.
    """
    if not _torch.has_numbers(tokens):
        return
    wide = tokens.detach().float()
    mine = torch.cat([wide.sum(0), wide.norm()[None], wide.new_tensor([len(wide)])])
    table = mine.new_zeros(env.world, len(mine))
    table[env.rank] = mine
    comm.sum_scalars(env, table)
    sums, sizes, counts = table[:, :-2], table[:, -2], table[:, -1]
    if not table.isfinite().all() or not sizes.any():
        return  # float16 that has overflowed, or nothing to tell them by
    gap = (sums - sums.mean(0)).norm(dim=1).max()
    differ = bool(gap > ALIKE * sizes.max() or counts.min() < counts.max())
    if differ and not own:
        raise PlacementError(
            f"the {env.world} ranks that share layers want the same tokens where each "
            'sends a share of them to experts, but theirs differ; write "partial" in '
            "the plan of shard_tensors for the experts, if each rank has positions of "
            "its own there, or give these ranks one seed for dropout: ax.seed(env, 0)"
        )
    if own and not differ:
        raise PlacementError(
            f'"partial" of experts in the plan of shard_tensors wants the {env.world} '
            "ranks that share layers to have positions of their own there, but their "
            "tokens are the same, and would be counted by each; leave it out"
        )
