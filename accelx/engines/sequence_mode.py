"""Attention over ranks in place of scaled_dot_product_attention, for one loss alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from accelx import _torch_attention, comm, tree
from accelx.comm_wire import group
from accelx.engines import sequence_checks as checks, sequence_uneven
from accelx.engines.forwards import wrap
from accelx.engines.sequence import Site
from accelx.engines.sequence_attention import attend
from accelx.env_device import widest
from accelx.errors import LossError
from accelx.records import Mean

if TYPE_CHECKING:
    from collections.abc import Iterable

    from accelx.match import Selector

Unbound = Callable[..., Any]


class Exchanged(TorchFunctionMode):
    """Inside, on this thread, attention is that of whole sequences."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.vouched = 0  # how many modules that are vouched for are running

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What torch calls in place of each of its functions."""
        kwargs = kwargs or {}
        if self.vouched:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return attend(self.site, *args, **kwargs)
        checks.check_call(self.site, func, args, kwargs)
        out = func(*args, **kwargs)
        sequence_uneven.note(self.site, func, args, kwargs, out)
        return out


def dress(model: nn.Module, site: Site, allow: Iterable[Selector]) -> None:
    """Have each module of `model` exchange tokens by itself, where a step is under way.

    A loss does so already. But what is computed again in backward is called module by
    module, later, and on a GPU by another thread. Modules that `allow` takes compute
    with their own rank's tokens. Raises PlacementError for modules that mix tokens.
    """
    group(site.env, "shard_sequence")  # made by all ranks, before any is at work
    known = checks.vouched(model, allow)
    checks.check_modules(model, known)
    for around, inside in ((_exchanging(site), False), (_by_itself(site), True)):
        _wrap_those(model, around, lambda m, i=inside: (m in known) is i)


def _wrap_those(model: nn.Module, around: Any, takes: Any) -> None:
    def called(m: nn.Module) -> bool:
        return takes(m) and type(m).forward is not nn.Module.forward

    if called(model):
        wrap(model, None, "shard_sequence", around)
    if any(called(m) for m in model.modules() if m is not model):
        wrap(model, lambda name, m: called(m), "shard_sequence", around)


def _exchanging(site: Site) -> Callable[[Unbound], Unbound]:
    def around(inner: Unbound) -> Unbound:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if site.here is None or _torch_attention.function_modes(Exchanged):
                return inner(self, *args, **kwargs)
            with Exchanged(site):
                return inner(self, *args, **kwargs)

        return forward

    return around


def _by_itself(site: Site) -> Callable[[Unbound], Unbound]:
    def around(inner: Unbound) -> Unbound:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            site.attended = True
            active: list[Exchanged] = _torch_attention.function_modes(Exchanged)
            for mode in active:
                mode.vouched += 1
            try:
                return inner(self, *args, **kwargs)
            finally:
                for mode in active:
                    mode.vouched -= 1

        return forward

    return around


def attended(site: Site, model: nn.Module) -> None:
    """Refuse a loss in which no attention was seen: it was one rank's, or is none."""
    if site.attended:
        return
    kind = type(model).__name__
    raise LossError(
        f"shard_sequence exchanges tokens in scaled_dot_product_attention, which "
        f"{kind} did not call, so that other attention (flash_attn, flex_attention) "
        "would be among one rank's tokens; call it, or, if no token needs another, "
        f"vouch for the model: allow={kind}"
    )


def summed(site: Site, result: Any) -> Any:
    """Numbers of an evaluation over all tokens of its rows: Means add, others average.

    The same on each rank of a sequence, as ranks with the same rows must have.
    """

    def is_mean(node: Any) -> bool:
        return isinstance(node, Mean)

    flat = tree.flatten(result, is_mean)
    each = [x for _, leaf in flat for x in _numbers(leaf, site.env.world)]
    device = next((x.device for x in each if x.dim()), site.env.device)
    wide = widest(site.env.device)
    sums = torch.cat([x.reshape(-1).to(device, wide) for x in each])
    comm.sum_scalars(site.env, sums)
    parts = iter(sums.split([x.numel() for x in each]))
    made = [
        Mean(*(_like(x, next(parts)) for x in _numbers(leaf, 1)))
        if is_mean(leaf)
        else _like(torch.as_tensor(leaf) / 1, next(parts))
        for _, leaf in flat
    ]
    return tree.unflatten(result, made, is_mean)


def _numbers(leaf: Any, world: int) -> list[Tensor]:
    """What adds up over ranks to a leaf of the whole sequence."""
    if isinstance(leaf, Mean):
        return [torch.as_tensor(leaf.total), torch.as_tensor(leaf.weight)]
    return [torch.as_tensor(leaf) / world]


def _like(old: Any, new: Tensor) -> Tensor:
    tensor = torch.as_tensor(old)
    return new.view(tensor.shape).to(tensor.device, tensor.dtype)
