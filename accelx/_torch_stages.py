"""Private and version-dependent names of torch that a model in stages wants."""

# Private names are what this file is for.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, overrides

SKETCH = "accelx_sketch"  # on a mode: its tensors are those of other stages


def fake_mode() -> Any:
    """A mode that makes tensors of a shape and no numbers; real ones mix with them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode: Any = FakeTensorMode(allow_non_fake_inputs=True)
    setattr(mode, SKETCH, True)
    return mode


def is_fake(tensor: Any) -> bool:
    """Whether a tensor has a shape and no numbers, as `fake_mode` makes them.

    Those of a simulated rank have none either, but stand for its own.
    """
    module = sys.modules.get("torch._subclasses.fake_tensor")
    fake = module is not None and isinstance(tensor, module.FakeTensor)
    return fake and hasattr(tensor.fake_mode, SKETCH)


@functools.cache
def greets() -> bool:
    """Whether stages first send their neighbours what these await: in 2.9 they do not.

    They send an int64 there and await a float32, and gloo aborts both ranks.
    """
    from torch.distributed.pipelining import stage

    first = stage._PipelineStageBase._get_init_p2p_neighbors_ops
    return "dtype" in inspect.getsource(first)


def fake_errors() -> tuple[type[Exception], ...]:
    """What torch raises where numbers are wanted of a tensor that has none."""
    from torch._subclasses import fake_tensor

    return (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
    )


def around_call(module: nn.Module, around: Callable[..., Any]) -> None:
    """Have calls of this one module, hooks included, go by `around(call, *args)`.

    Copies of the module are not affected.
    """
    inner = module._compiled_call_impl or module._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    module._compiled_call_impl = call


def keep_weights(module: nn.Module, made: Callable[[Any], Any]) -> None:
    """Have a module keep its weights in what `made` makes of its dict of them."""
    vars(module)["_parameters"] = made(module._parameters)


def device_kind(model: nn.Module) -> str:
    """Where weights of a model are, which one in stages would not list to a loss."""
    every = (w for m in model.modules() for w in m._parameters.values())
    return next((w.device.type for w in every if w is not None), "cpu")


def without(kind: type, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`call(*args, **kwargs)` without the innermost mode over functions, if of a kind.

    As a function: a context would take 1 us more, for each part of a model.
    """
    if not isinstance(overrides._get_current_function_mode(), kind):
        return call(*args, **kwargs)
    mode = overrides._pop_mode()
    try:
        return call(*args, **kwargs)
    finally:
        overrides._push_mode(mode)


def pipe_step(schedule: Any, n: int, last: bool) -> None:
    """Run a schedule of pipelining once, over `n` microbatches that it is not given.

    `last`: whether the last stage is here.
    """
    # It hands one on with each to the last stage; there is nothing in it.
    target = torch.zeros(n) if last else None
    schedule.step(target=target, **_less(type(schedule)))


def pipe_buffers(schedule: Any) -> list[Tensor]:
    """What a schedule that has run once keeps for the next time to receive into.

    With gradients that went back from there; between stages of one rank it keeps what
    was handed over.
    """
    several = getattr(schedule, "_stages", None)
    stages = [schedule._stage] if several is None else several
    every = [m for s in stages for m in (s.args_recv_info, s.grad_recv_info)]
    infos = [info for one in every for some in one.values() for info in some]
    there = [info.buffer for info in infos if info.buffer is not None]
    return there + [one.grad for one in there if one.grad is not None]


@functools.cache
def _less(kind: Any) -> dict[str, bool]:
    """Have a kind of schedule keep no outputs, where it can be told so."""
    known = inspect.signature(kind.step).parameters
    return {"return_outputs": False} if "return_outputs" in known else {}


def fsdp_quiet(model: nn.Module) -> None:
    """Have FSDP modules keep gradients to themselves until `fsdp_reduce`."""
    root: Any = model
    root.set_is_last_backward(False)
    root.set_reshard_after_backward(False)
    root.set_requires_gradient_sync(False)


def fsdp_reduce(model: nn.Module) -> None:
    """Reduce what backward passes have left in FSDP modules since `fsdp_quiet`."""
    root: Any = model
    root.set_is_last_backward(True)
    root.set_reshard_after_backward(True)
    root.set_requires_gradient_sync(True)
    state = root._get_fsdp_state()
    for one in state._state_ctx.all_states:
        groups = getattr(one, "_fsdp_param_groups", None)  # torch 2.13
        for group in [one._fsdp_param_group] if groups is None else groups:
            if group is not None:
                group.post_backward()
    state._root_post_backward_final_callback()
