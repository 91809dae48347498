"""How ddp sends gradients in fewer bits: torch's own communication hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from accelx.engines.options import Hook, PowerSGD
from accelx.errors import NeutralityWarning
from accelx.records import Transform

Send = Callable[[Any, Any], Any]  # (state, bucket) -> a future of the bucket's mean


def attach(ddp: Any, hook: Hook | None) -> None:
    """Have a DistributedDataParallel reduce its buckets by `hook`."""
    if hook is None:
        return
    if hook == "powersgd":
        hook = PowerSGD()
    if isinstance(hook, PowerSGD):
        ddp.register_comm_hook(*_powersgd(hook))
    else:
        ddp.register_comm_hook(None, {"bf16": _bf16, "fp16": _fp16}[hook]())


def remembers(hook: Hook | None) -> bool:
    """Whether a hook adds what a step left out to the next one."""
    return hook == "powersgd" or isinstance(hook, PowerSGD)


def warn_of_memory(hook: Hook | None, tx: Transform) -> None:
    """Say that a checkpoint does not hold what a hook remembers."""
    saving = [name for name in ("save_state", "load_state") if tx.find(name)]
    if saving and remembers(hook):
        warnings.warn(
            f"hook={hook!r} remembers on each rank what it has not sent, and "
            f"{saving[0]} does not keep that: a run that is loaded starts it anew, and "
            "sends its first steps whole; for an exact resume leave the hook out, or "
            'write hook="bf16"',
            NeutralityWarning,
            stacklevel=2,
        )


def _bf16() -> Send:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    # under its own name torch takes it for NCCL alone; gloo can do it, too
    return lambda state, bucket: default_hooks.bf16_compress_hook(state, bucket)


def _fp16() -> Send:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    return default_hooks.fp16_compress_hook


def _powersgd(hook: PowerSGD) -> tuple[Any, Send]:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    state = powerSGD_hook.PowerSGDState(
        process_group=None,
        matrix_approximation_rank=hook.rank,
        start_powerSGD_iter=hook.start,
    )
    return state, powerSGD_hook.powerSGD_hook
