"""Something around the forward of a module, in place: object, class and names stay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any

import attrs
from torch import nn

from accelx.engines.placed import Placed
from accelx.errors import PlacementError
from accelx.match import Selector, select
from accelx.state import with_slot

if TYPE_CHECKING:
    from accelx.state import State

Unbound = Callable[..., Any]  # (module, *args, **kwargs), as a class has its forward
MARK = "_accelx_around"  # names of what is around the forward of a module


def wrap(
    model: nn.Module,
    blocks: Selector | Iterable[Selector] | None,
    name: str,
    around: Callable[[Unbound], Unbound],
    key: Callable[[nn.Module], Hashable] = lambda module: None,
) -> None:
    """Put `around` the forward of the `blocks` of `model`; None is the model itself.

    What is around knows no module, so modules with one forward and `key` share it, and
    a deep copy of a module calls itself. Hooks of the module stay outside: FSDP2
    gathers, and DDP counts, once. Raises ValueError if a selector takes nothing,
    PlacementError for a block that has it already.
    """
    chosen = [("", model)] if blocks is None else select(model, blocks)

    @functools.cache
    def shared(inner: Unbound, key: Hashable) -> Unbound:
        return functools.wraps(inner)(around(inner))

    for at, module in chosen:
        worn = vars(module).get(MARK, ())
        if name in worn:
            raise PlacementError(
                f"{name} wants to be put around {at or type(model).__name__} once, but "
                "it has been; give it a new module"
            )
        vars(module)[MARK] = (*worn, name)
        vars(module)["forward"] = MethodType(
            shared(_unbound(module), key(module)), module
        )


def _unbound(module: nn.Module) -> Unbound:
    """The forward of `module` as a function of the module."""
    own = vars(module).get("forward")
    if own is None:
        return type(module).forward
    if isinstance(own, MethodType) and own.__self__ is module:
        return own.__func__

    def theirs(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)  # a function that was set on the object

    return functools.wraps(own)(theirs)


def carried(state: State) -> State:
    """A state whose `fork` gives the copy, too, what is around its forwards.

    The copy of a placed model is filled attribute by attribute, and a method is bound
    to the old one. A model that was not placed is copied whole, with its methods.
    """
    placed: Placed | None = state.slots.get("shard_model")
    if placed is None or placed.fork is None:
        return state
    inner = placed.fork

    def fork(old: State) -> State:
        worn = {
            name: vars(m).pop("forward")
            for name, m in old.model.named_modules()
            if MARK in vars(m) and "forward" in vars(m)
        }
        try:
            new = inner(old)
        finally:
            for name, method in worn.items():
                vars(old.model.get_submodule(name))["forward"] = method
        for name, method in worn.items():
            module = new.model.get_submodule(name)
            vars(module)["forward"] = MethodType(method.__func__, module)
        return carried(new)

    return with_slot(state, "shard_model", attrs.evolve(placed, fork=fork))
