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
from torch import nn, overrides


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


def keep_weights(module: nn.Module, made: Callable[[Any], Any]) -> None:
    """Have a module keep its weights in what `made` makes of its dict of them."""
    vars(module)["_parameters"] = made(module._parameters)


class Aside:
    """A context without the innermost mode over torch's functions, if of a kind."""

    __slots__ = ("kind", "mode")

    def __init__(self, kind: type) -> None:
        self.kind, self.mode = kind, None

    def __enter__(self) -> None:
        if isinstance(overrides._get_current_function_mode(), self.kind):
            self.mode = overrides._pop_mode()

    def __exit__(self, *error: object) -> None:
        if self.mode is not None:
            overrides._push_mode(self.mode)


def pipe_step(schedule: Any, n: int, last: bool) -> None:
    """Run a schedule of pipelining once, over `n` microbatches that it is not given.

    `last`: whether the last stage is here.
    """
    # It hands one on with each to the last stage; there is nothing in it.
    target = torch.zeros(n) if last else None
    schedule.step(target=target, **_less(type(schedule)))


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
