"""Evaluation of a model in stages: one after the other, and all get the output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelx import _torch, _torch_stages, tree
from accelx.comm_wire import dist, group
from accelx.engines.stage_homes import owner
from accelx.engines.stage_route import Route, Through, led
from accelx.engines.stage_walk import Walk
from accelx.errors import PlacementError

if TYPE_CHECKING:
    from accelx.engines.stages import Stages


def seen(stages: Stages) -> Callable[..., Any]:
    """What a call of the model does outside a step: `model(...)` without gradients.

    Every rank along the axis calls it with the same arguments and gets the output. The
    stages work one after the other.
    """

    def outside(call: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            raise PlacementError(
                "a model in stages goes forward and backward by ax.step alone, but it "
                "was called with gradients outside it; write the call into the loss, "
                "or `with ax.evaluating(state) as model:`"
            )
        from accelx.engines.stage_step import way

        route, _ = way(stages, _called, (args, kwargs))
        return _output(stages, route, _relayed(stages, route, call, args, kwargs))

    return outside


def _called(model: Any, args: Any, kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _relayed(stages: Stages, route: Route, call: Any, args: Any, kwargs: Any) -> Any:
    """Each stage in turn, by the rank that has it; what the model returned here."""
    env, schedule = stages.env, stages.spec.schedule
    passed: tuple[Tensor, ...] = ()
    output: Any = None
    for stage in range(stages.homes.count):
        here = owner(stage, env.world, schedule)
        before = owner(stage - 1, env.world, schedule) if stage else here
        if before != here and env.rank in (before, here):
            passed = _sent(stages, route, stage, passed, before, here)
        if env.rank == here:
            walk = Walk(stages.homes, route, stage, passed)
            with led(stages.way, walk), contextlib.suppress(Through):
                walk.model(call, args, kwargs)
            passed, output = walk.sent, walk.output
    return output


def _sent(
    stages: Stages,
    route: Route,
    stage: int,
    passed: tuple[Tensor, ...],
    before: int,
    here: int,
) -> tuple[Tensor, ...]:
    """What crosses into `stage`, from the rank `before` to the rank `here`."""
    env = stages.env
    ours = group(env, "evaluating")
    if env.rank == before:
        for one in passed:
            dist().send(one.contiguous(), group=ours, group_dst=here)
        return ()
    made = [_empty(like, env.device) for like in route.crossings[stage - 1].like]
    for one in made:
        dist().recv(one, group=ours, group_src=before)
    return tuple(made)


def _output(stages: Stages, route: Route, output: Any) -> Any:
    """The last stage's output on every rank: tensors travel, the rest is alike."""
    env = stages.env
    last = owner(stages.homes.count - 1, env.world, stages.spec.schedule)
    ours = group(env, "evaluating")
    mine = env.rank == last
    likes = tree.leaves(route.output)
    made: list[Any] = tree.leaves(output) if mine else [None] * len(likes)
    there = torch.tensor(
        [float(not _torch_stages.is_fake(leaf)) for leaf in made], device=env.device
    )
    dist().broadcast(there, group=ours, group_src=last)
    leaves: list[Any] = []
    for leaf, like, some in zip(made, likes, there.tolist(), strict=True):
        if not _torch_stages.is_fake(like):
            leaves.append(leaf if mine else like)
        elif not some:  # of another stage: a shape, of which numbers cannot be had
            leaves.append(None)
        else:
            real = _whole(leaf) if mine else _empty(like, env.device)
            dist().broadcast(real, group=ours, group_src=last)
            leaves.append(real)
    return tree.unflatten(route.output, leaves)


def _whole(leaf: Any) -> Tensor:
    """What the last stage computed; logits that its ranks share are joined."""
    leaf = leaf.full_tensor() if _torch.is_dtensor(leaf) else leaf
    return leaf.detach().contiguous()


def _empty(like: Tensor, device: str) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=device)
