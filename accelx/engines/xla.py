"""One process with all devices of a host, by XLA: the compiler divides the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from accelx import _xla, dtypes
from accelx.engines import copies, placed, plain
from accelx.engines.placed import Placed, Plan
from accelx.errors import PlacementError

if TYPE_CHECKING:
    from accelx.state import State

# What runs at once, and is compiled once for a shape: forward and backward; then the
# rest of the step, at its end. Without the first cut, looking at a norm or a weight
# would run the forward pass a second time.


def backward(state: State, loss: Tensor, scale: float) -> None:
    """Add `scale` times the gradient of `loss` to the parameters', and run both passes.

    Gradients are laid as their weights are.
    """
    wide = loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss
    wide.backward(_xla.number(scale, wide.dtype))
    for _, p in state.trained:
        if p.grad is not None:
            _xla.lay(p.grad, _xla.slice_dim(tuple(p.shape)))
    _xla.cut()


def settle(state: State, scale: Tensor | float) -> None:
    """Multiply gradients by `scale`, an input of what is compiled."""
    placed.all_used(state)
    grads = plain.gradients(state)
    if grads:
        plain.settle(state, _xla.number(scale, torch.float64))


ENGINE = attrs.evolve(plain.ENGINE, name="xla", backward=backward, settle=settle)
"""The plain engine over tensors that lie on several devices and know it themselves."""


def place(model: nn.Module, plan: Plan) -> Placed:
    """Move a module to the devices, its weights in slices as `_xla.slice_dim` says.

    Tied weights stay one, which Module.to does not keep on XLA.
    """
    if _xla.devices() > 1 and not _xla.spread():
        raise PlacementError(
            f"this process has {_xla.devices()} XLA devices, but uses one of them; "
            'write env = ax.connect(device="xla"), which takes all'
        )
    dtypes.cast(model, plan.precision)
    return _laid(model, plan, copies.try_blueprint(model))


def _laid(model: nn.Module, plan: Plan, blank: Any) -> Placed:
    moved: dict[int, Any] = {}
    for name, tensor in copies.tensors(model):
        if id(tensor) not in moved:
            moved[id(tensor)] = _there(tensor)
        copies.put(model, name, moved[id(tensor)])

    def again(old: Placed, copy: nn.Module, source: nn.Module) -> Placed:
        copies.fill(copy, source)
        fresh = _laid(copy, plan, blank)
        _xla.cut()
        return fresh

    return Placed(
        *(ENGINE, plan.env, model),
        unused=plan.unused,
        fork=copies.forker(blank, again),
    )


def _there(tensor: Tensor) -> Tensor:
    """A weight or buffer on the devices; one that is there already stays itself."""
    weight = isinstance(tensor, nn.Parameter)
    if tensor.device.type != "xla":
        data = tensor.detach().to("xla")
        tensor = nn.Parameter(data, tensor.requires_grad) if weight else data
    _xla.lay(tensor, _xla.slice_dim(tuple(tensor.shape)) if weight else None)
    return tensor


def apart(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss, after what was asked for before it: that is no part of its graph.

    Slices of a batch are inputs then, and every microbatch the same graph.
    """

    def cut(model: Any, *args: Any) -> Any:
        _xla.cut()
        return loss(model, *args)

    return cut


def ended(state: Any, out: Any) -> tuple[Any, Any]:
    """Run the rest of a step, or an evaluation."""
    _xla.cut()
    return state, out
