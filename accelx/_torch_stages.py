"""Private and version-dependent names of torch that a model in stages wants."""

# Private names are what this file is for.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn


def fake_mode() -> Any:
    """A mode that makes tensors of a shape and no numbers; real ones mix with them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: object) -> bool:
    """Whether a tensor has a shape and no numbers, as `fake_mode` makes them."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


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


def mode_aside(kind: type) -> Any:
    """A context without the innermost mode over torch's functions, if of a kind."""
    from torch.overrides import _get_current_function_mode, _pop_mode_temporarily

    ours = isinstance(_get_current_function_mode(), kind)
    return _pop_mode_temporarily() if ours else nullcontext()


def pipe_step(schedule: Any, n: int) -> None:
    """Run a schedule of pipelining once, over `n` microbatches that it is not given."""
    target = torch.zeros(n)  # it hands one on with each; there is nothing in it
    known = inspect.signature(schedule.step).parameters
    less = {"return_outputs": False} if "return_outputs" in known else {}
    schedule.step(target=target, **less)


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
