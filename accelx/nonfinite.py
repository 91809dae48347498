"""Which module first makes a number that is none, in forward or in backward."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
from torch import Tensor, nn

from accelx import tree
from accelx._torch import is_dtensor, local_of
from accelx.errors import AccelxError

__all__ = ["NonFiniteError", "find_nonfinite"]


class NonFiniteError(AccelxError, FloatingPointError):
    """A number is nan, or infinite, where `find_nonfinite` looked."""


@contextmanager
def find_nonfinite(model: nn.Module, *, inf: bool = True) -> Generator[None]:
    """`with find_nonfinite(model):` raises where numbers first stop to be finite.

    In the body each module's outputs are looked at as they are made, the innermost
    first, and in backward each gradient that leaves a module for its input; weights and
    buffers before, and gradients of weights at the end. NonFiniteError names the
    module or weight, and says whether what went in was finite. `inf=False` looks for
    nan alone, for models that mask by minus infinity.

    Slow, since each look waits for the device. Effects: hooks, which are gone
    afterwards. One rank raises where another may wait for it: the launcher ends that.
    Code that torch.compile has compiled before runs without hooks.
    """
    if not isinstance(model, nn.Module):  # type: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"find_nonfinite wants a torch.nn.Module, got {type(model).__name__}; "
            "write find_nonfinite(state.model)"
        )
    look = _Look(inf)
    _weights(model, look)
    try:
        for name, module in model.named_modules():
            look.watch(name, module)
        yield
        _gradients(model, look)
    finally:
        look.leave()


@attrs.define(eq=False)
class _Look:
    """The hooks of one look."""

    inf: bool
    handles: list[Any] = attrs.field(factory=list)
    given: list[Any] = attrs.field(factory=list)  # the caller's tensors, weakly
    over: bool = False  # for the hooks of a graph, which go with it

    def watch(self, name: str, module: nn.Module) -> None:
        """Look at what goes into `module` and what comes out, each time it runs."""
        title = f"{name or 'the model'} ({type(module).__name__})"

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            for tensor in _floats((args, kwargs)):
                if tensor.requires_grad:
                    self.takers(tensor, None)[name] = title

        def behind(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for tensor in _floats(output):
                if self.bad(tensor):
                    raise NonFiniteError(self.of_output(title, tensor, (args, kwargs)))
                if tensor.requires_grad:
                    self.takers(tensor, title)

        self.handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(behind, with_kwargs=True),
        ]

    def leave(self) -> None:
        """Take every hook away."""
        self.over = True
        for handle in self.handles:
            handle.remove()
        for weak in self.given:
            tensor = weak()
            if tensor is not None:
                del tensor._accelx_takers

    def takers(self, tensor: Tensor, maker: str | None) -> dict[str, str]:
        """Who takes a tensor as input, by name; watches its gradient from now on."""
        found: dict[str, str] | None = getattr(tensor, "_accelx_takers", None)
        if found is not None:
            return found
        takers = dict[str, str]()
        tensor._accelx_takers = takers  # type: ignore[reportAttributeAccessIssue]

        def look(grad: Tensor) -> None:
            if not self.over and self.bad(grad):
                raise NonFiniteError(_of_gradient(grad, takers, maker))

        handle = tensor.register_hook(look)
        if tensor.is_leaf:  # the hooks of others go with the graph
            self.handles.append(handle)
            self.given.append(weakref.ref(tensor))
        return takers

    def bad(self, tensor: Tensor) -> bool:
        """Whether a number in `tensor`, or in this rank's slice of it, is none."""
        here = _here(tensor)
        found = here.isfinite().logical_not() if self.inf else here.isnan()
        return bool(found.any())

    def of_output(self, title: str, output: Tensor, given: Any) -> str:
        """What is said of a module's output."""
        cause = "nor is its input: look at what is done before, outside of a module"
        if not any(map(self.bad, _floats(given))):
            tops = [_top(t) for t in _floats(given)]
            most = f", at most {max(tops):.3g} in size" if tops else ""
            cause = f"its input is finite{most}: look at this module and its weights"
        return (
            f"the output of {title} wants finite numbers, got {_count(output)}; {cause}"
        )


def _of_gradient(grad: Tensor, takers: dict[str, str], maker: str | None) -> str:
    """What is said of a gradient on its way back."""
    inner = [t for n, t in takers.items() if not any(_holds(n, o) for o in takers)]
    where = f"comes back to the output of {maker}"
    cause = "look at what the loss, or the module around it, does with that output"
    if inner:
        where = f"{' and '.join(inner)} gave back to the input"
        cause = "look at the backward of that, such as of a root, a log or a quotient"
    return (
        f"the gradient that {where} wants finite numbers, got {_count(grad)}; {cause}"
    )


def _holds(outer: str, name: str) -> bool:
    """Whether the module `outer` has the other one inside."""
    return outer != name and (not outer or name.startswith(f"{outer}."))


def _here(tensor: Tensor) -> Tensor:
    return local_of(tensor) if is_dtensor(tensor) else tensor.detach()


def _floats(node: Any) -> Iterator[Tensor]:
    for leaf in tree.leaves(node):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            yield leaf


def _top(tensor: Tensor) -> float:
    here = _here(tensor)
    return here.abs().max().item() if here.numel() else 0.0


def _count(tensor: Tensor) -> str:
    here = _here(tensor)
    nan = int(here.isnan().sum())
    infinite = int(here.isfinite().logical_not().sum()) - nan
    return f"{nan} nan and {infinite} infinite of {here.numel()}, {here.dtype}"


def _weights(model: nn.Module, look: _Look) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(map(look.bad, _floats(tensor))):
            raise NonFiniteError(
                f"{name} wants finite numbers before the model runs, got "
                f"{_count(tensor)}; it was made so, loaded so, or an earlier update "
                "did it: look at an earlier step"
            )


def _gradients(model: nn.Module, look: _Look) -> None:
    for name, p in model.named_parameters():
        if p.grad is not None and look.bad(p.grad):
            raise NonFiniteError(
                f"the gradient of {name} wants finite numbers, got {_count(p.grad)}, "
                "though every module's output is; look at the backward of the module "
                "that has it"
            )
