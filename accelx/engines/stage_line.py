"""A few numbers added up over the ranks of a pipeline, by the way of its gradients."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from accelx import comm
from accelx.comm_wire import dist, group
from accelx.env_device import widest
from accelx.records import Env

UP, DOWN = 1, 2  # tags: those of a schedule's messages are 0
Expected = tuple[Tensor, Any]  # where a message comes to, and what waits for it


@attrs.frozen(eq=False)
class Line:
    """One sum over the ranks along the axis, whose messages are awaited ahead.

    A rank adds to what comes from the one after it, as the last gradient did, and the
    first, which was to be the last at work, sends the sum back. So it waits for nobody:
    a sum of torch's, of which it would wait for all, is six hops on four gloo ranks.
    """

    env: Env
    after: Expected | None = None  # from the rank after this one
    before: Expected | None = None  # from the one before

    def add(self, numbers: list[float]) -> list[float]:
        """The sums over ranks of numbers, as many on each; the same on all."""
        device = self.env.device
        total = torch.tensor(numbers, dtype=widest(device), device=device)
        if self.after is None and self.before is None:  # of a device, or one rank
            comm.sum_scalars(self.env, total)
            return total.tolist()
        if self.after is not None:
            total += _come(self.after)
        if self.before is not None:
            sent = self._send(total, -1, UP)
            total = _come(self.before)
            sent.wait()
        if self.after is not None:
            self._send(total, 1, DOWN).wait()  # awaited already, so gone at once
        return total.tolist()

    def _send(self, total: Tensor, way: int, tag: int) -> Any:
        ours = group(self.env, "shard_stages")
        return dist().isend(total, group=ours, group_dst=self.env.rank + way, tag=tag)


def line(env: Env, count: int) -> Line:
    """The sum that is to come of `count` numbers; `add` must follow on every rank.

    Effect: receives are open. On devices there are none: NCCL knows no tags, and adds
    up in one kernel.
    """
    if env.device != "cpu":
        return Line(env)
    rank, ours = env.rank, group(env, "shard_stages")

    def expected(src: int, tag: int) -> Expected | None:
        if not 0 <= src < env.world:
            return None
        into = torch.empty(count, dtype=torch.float64)
        return into, dist().irecv(into, group=ours, group_src=src, tag=tag)

    return Line(env, expected(rank + 1, UP), expected(rank - 1, DOWN))


def _come(expected: Expected) -> Tensor:
    tensor, work = expected
    work.wait()
    return tensor
