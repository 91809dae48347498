"""Weights that stay whole on each rank where the others are cut in slices."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from accelx import _torch
from accelx.comm_wire import group
from accelx.errors import PlacementError
from accelx.match import Selector, fits
from accelx.records import Env


def ignored(
    model: nn.Module, selector: Selector | Iterable[Selector] | None
) -> set[nn.Parameter]:
    """Weights that `selector` takes by any of their names.

    It is a glob over names of weights or of modules (then all that they hold), a class
    of modules, or a function (name, weight) -> bool. Raises PlacementError where one
    takes none.
    """
    one = selector is None or isinstance(selector, str | type) or callable(selector)
    each: list[Any] = [selector] if one else list(selector)  # type: ignore[arg-type]
    found: set[nn.Parameter] = set()
    for part in [] if selector is None else each:
        taken = _taken(model, part)
        if not taken:
            names = [name for name, _ in model.named_parameters()]
            raise PlacementError(
                f"ignored={part!r} matches no weight of {type(model).__name__}; its "
                f"weights are called {', '.join(map(repr, names[:6]))}: write a glob "
                "such as '**.scale', a class, or a function (name, weight) -> bool"
            )
        found |= taken
    return found


def _taken(model: nn.Module, selector: Selector) -> set[nn.Parameter]:
    found: set[nn.Parameter] = set()
    if not isinstance(selector, type):
        named = model.named_parameters(remove_duplicate=False)
        found |= {p for name, p in named if fits(selector, name, p)}
    if isinstance(selector, str | type):
        inside = [m for n, m in model.named_modules() if n and fits(selector, n, m)]
        found |= {p for module in inside for p in module.parameters()}
    return found


def reduce(grads: list[Tensor], env: Env, wire: torch.dtype | None = None) -> None:
    """Take the mean of whole gradients over ranks, in place: a collective a dtype.

    `wire` is the dtype that they travel in; by default their own.
    """
    import torch.distributed as dist

    groups: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        groups.setdefault(grad.dtype, []).append(grad)
    for dtype in sorted(groups, key=str):
        flat = torch.cat([grad.reshape(-1) for grad in groups[dtype]])
        flat = flat.to(device=env.device, dtype=wire or dtype)
        dist.all_reduce(flat, group=group(env, "reduce"))
        flat /= env.world
        sizes = [grad.numel() for grad in groups[dtype]]
        for grad, new in zip(groups[dtype], flat.split(sizes), strict=True):
            grad.copy_(new.view_as(grad))


def reduce_at_once(weights: Iterable[nn.Parameter], env: Env) -> None:
    """Have `loss.backward()` itself take the mean: for a loop of the user's own.

    Gradients that add up over several backward passes are means already, and so stay.
    """

    def hook(weight: Tensor) -> None:
        if weight.grad is not None:
            reduce([weight.grad], env)

    for weight in weights:
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(hook)


def parted(grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients as (this rank's slices, those that are whole)."""
    slices = [_torch.local_of(grad) for grad in grads if _torch.is_dtensor(grad)]
    return slices, [grad for grad in grads if not _torch.is_dtensor(grad)]


@contextmanager
def one_by_one(optimizers: Iterable[Any]) -> Generator[None]:
    """Have groups with slices and whole weights updated a weight at a time inside.

    torch's update of many weights at once, which a GPU gets where a group says nothing,
    takes weights of one kind (torch 2.13).
    """
    parts = [part for one in optimizers for part in one.param_groups]
    unsaid = [part for part in parts if part.get("foreach", True) is None]
    both = [part for part in unsaid if _torch.mixed(part["params"])]
    for part in both:
        part["foreach"] = False
    try:
        yield
    finally:
        for part in both:
            part["foreach"] = None
