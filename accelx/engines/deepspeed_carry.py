"""How the loss of a microbatch travels with its gradients, under ZeRO's second stage.

Each backward pass adds gradients up over ranks there. One number more in what is sent
costs nothing; a collective for it costs a small step a sixth of its time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from accelx.records import Env


@attrs.define(eq=False)
class Carried:
    """A scalar whose gradient is the mean over ranks of what was carried for it."""

    leaf: Tensor
    waiting: Tensor | None = None  # (1,), what goes along with the next bucket

    def along(self, value: Tensor, backward: Callable[[], None], world: int) -> None:
        """Go backward, and add `value`, its mean over ranks, to the leaf's gradient."""
        one = self.waiting = value.reshape(1).clone()
        backward()
        self.waiting = None
        mean = one[0] / world
        self.leaf.grad = mean if self.leaf.grad is None else self.leaf.grad + mean


def carried(zero: Any, stage: int, env: Env) -> Carried | None:
    """What carries, or None where a setting of the user's has gradients sent otherwise.

    DeepSpeed's function that adds slices of gradients up gets one slice more, which all
    ranks are to have.
    """
    usual = (
        stage == 2
        and zero.contiguous_gradients
        and zero.reduce_scatter
        and zero.use_multi_rank_bucket_allreduce
        and zero.communication_data_type == torch.float32
    )
    if not usual:
        return None
    made = Carried(torch.zeros((), device=env.device))
    everyone, send = frozenset(range(env.world)), zero.allreduce_and_scatter

    def along(slices: list[Any], *args: Any, **kwargs: Any) -> None:
        if made.waiting is not None:
            slices = [*slices, (everyone, made.waiting, None)]
            made.waiting = None
        send(slices, *args, **kwargs)

    zero.allreduce_and_scatter = along
    return made
