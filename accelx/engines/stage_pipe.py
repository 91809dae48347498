"""A schedule of torch's over the stages of this rank, for microbatches of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from accelx import _torch_stages
from accelx.comm_wire import group
from accelx.engines.stage_homes import owner
from accelx.engines.stage_route import Route
from accelx.records import Env

SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "looped_bfs": "LoopedBFS",
    "zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
}
SINGLE = ("gpipe", "1f1b")  # with one stage a rank
HALVES = ("zero_bubble", "zbv")  # go backward in two halves
Work = Callable[[int, int, tuple[Tensor, ...]], Any]  # (stage, microbatch, received)


class _Stage(nn.Module):
    """What torch calls for each microbatch of a stage, in their order."""

    def __init__(self, stage: int, weights: tuple[Any, ...]) -> None:
        super().__init__()
        self.stage, self.number = stage, 0
        self.work: Work | None = None
        self._mine = weights

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The weights whose gradients a backward pass in two halves looks for."""
        return iter(self._mine)

    def forward(self, *received: Tensor) -> Any:
        """The work on the next microbatch."""
        assert self.work is not None
        self.number += 1
        return self.work(self.stage, self.number - 1, received)


@attrs.frozen(eq=False)
class Pipe:
    """The schedule, and the stages of this rank."""

    schedule: Any
    stages: tuple[_Stage, ...]
    n: int  # microbatches
    last: bool  # whether the last stage is here

    def run(self, work: Work) -> None:
        """Forward and backward of all microbatches; gradients are added up."""
        for stage in self.stages:
            stage.work, stage.number = work, 0
        try:
            _torch_stages.pipe_step(self.schedule, self.n, self.last)
        finally:
            for stage in self.stages:
                stage.work = None


def pipe(
    route: Route,
    env: Env,
    schedule: str,
    count: int,
    n: int,
    weights: tuple[Any, ...],
) -> Pipe:
    """The pipe of this rank of `env`, the ranks along the axis; shapes are known."""
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import get_schedule_class

    ours = [s for s in range(count) if owner(s, env.world, schedule) == env.rank]
    modules = tuple(_Stage(s, weights) for s in ours)
    stages = [
        PipelineStage(
            module,
            module.stage,
            count,
            torch.device(env.device),
            input_args=_likes(route, module.stage - 1, count),
            output_args=_likes(route, module.stage, count),
            group=group(env, "shard_stages"),
        )
        for module in modules
    ]
    made: Any = get_schedule_class(SCHEDULES[schedule])
    of = stages[0] if schedule in SINGLE else stages
    run = made(of, n, loss_fn=lambda output, _: output, scale_grads=False)
    return Pipe(run, modules, n, count - 1 in ours)


def _likes(route: Route, stage: int, count: int) -> tuple[Tensor, ...]:
    """What the stage hands on: nothing before the first, a loss after the last."""
    if stage < 0:
        return ()
    if stage == count - 1:
        return (torch.empty((), device="meta", requires_grad=True),)
    return tuple(
        torch.empty(
            like.shape,
            dtype=like.dtype,
            device="meta",
            requires_grad=like.is_floating_point(),
        )
        for like in route.crossings[stage].like
    )
