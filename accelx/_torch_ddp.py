"""torch's DistributedDataParallel in halves, its gradients laid out once."""

# Private names are what this file is for.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import nn


def ddp(model: nn.Module, find_unused: bool, left: set[str], **options: Any) -> Any:
    """A DistributedDataParallel over `model` that leaves buffers alone in forward.

    It does not touch the weights and buffers called `left`. `options` are its own.
    """
    from torch.nn.parallel import DistributedDataParallel

    known = inspect.signature(DistributedDataParallel.__init__).parameters
    # 2.13 renamed the option; before, it also left buffers alone when they are to start
    # alike, so it is set afterwards
    new = "forward_sync_buffers" in known
    buffers = {"forward_sync_buffers": False} if new else {}
    told, held = "_ddp_params_and_buffers_to_ignore", vars(model)
    own: Any = held.get(told)
    held[told] = {*(own or ()), *left}  # the one way to say it
    try:
        made = (DistributedDataParallel if find_unused else _last_first())(
            model,
            find_unused_parameters=find_unused,
            gradient_as_bucket_view=True,
            **buffers,  # type: ignore[reportArgumentType]
            **options,
        )
        if not new:
            made.broadcast_buffers = False
        if not find_unused:
            _lay_out(made.reducer)
        return made
    finally:
        del held[told]
        held |= {} if own is None else {told: own}


@cache
def _last_first() -> Any:
    """A DistributedDataParallel that counts weights from the model's last one on."""
    from torch.nn.parallel import DistributedDataParallel

    class LastFirst(DistributedDataParallel):
        def _build_params_for_reducer(self) -> Any:
            weights, sparse = super()._build_params_for_reducer()
            return weights[::-1], sparse[::-1]

    return LastFirst


def _lay_out(reducer: Any) -> None:
    """Cut gradients into buckets now, those of the last layers first, as they come.

    torch does it after the first step of a process (2.13), from one bucket to several.
    A sum over more than two ranks then rounds otherwise, so a run that goes on would
    not be, to the bit, the one that did not stop. Effect: a small broadcast.
    """
    reducer._push_all_rebuilt_params()
    reducer._rebuild_buckets()


def before(ddp: Any, args: Any, kwargs: Any) -> Any:
    """What a DistributedDataParallel does ahead of its module's forward."""
    return ddp._pre_forward(*args, **kwargs)


def behind(ddp: Any, output: Any) -> Any:
    """What a DistributedDataParallel does after its module's forward."""
    return ddp._post_forward(output)


def finished(ddp: Any) -> None:
    """Raise, as the next forward would, if a bucket of gradients is not reduced."""
    ddp.reducer._rebuild_buckets()
