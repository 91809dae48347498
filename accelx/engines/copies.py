"""How a placed model is copied: rebuilt from a blueprint, placed again, filled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from accelx.engines.placed import Placed, blueprint, claim, promises
from accelx.errors import PlacementError
from accelx.records import Env, Transform
from accelx.state import duplicated, frozen_in, slots_of, trainable

if TYPE_CHECKING:
    from accelx.state import State

# what every module has, and what names the object that was placed
_INTERNALS = {*vars(nn.Module()), "_accelx_placed"} - {"training"}
Again = Callable[[Placed, nn.Module, nn.Module], Placed]  # old, blank copy, source


def from_main(tensor: Tensor, device: str) -> None:
    """Overwrite `tensor` with rank 0's, in place; it travels by way of `device`.

    As bytes: backends do not know every dtype.
    """
    import torch.distributed as dist

    if tensor.numel():
        there = tensor.detach().resolve_conj().resolve_neg().to(device).contiguous()
        dist.broadcast(there.view(-1).view(torch.uint8), src=0)
        tensor.detach().copy_(there)


def try_blueprint(model: nn.Module) -> nn.Module | Exception:
    """A blueprint, or why there is none: only `fork` needs it."""
    try:
        return blueprint(model)
    except (TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        return error


def forker(blank: nn.Module | Exception, again: Again) -> Callable[[State], State]:
    """A function that forks a state whose model was placed; `again` places the copy."""

    def fork(state: State) -> State:
        if isinstance(blank, Exception):
            raise PlacementError(
                f"fork wants to copy this {type(state.model).__name__}, but copying it "
                f"fails with {type(blank).__name__}: {blank}; leave out of the module "
                "what cannot be copied (locks, files, generators)"
            ) from blank
        old: Placed = state.slots["shard_model"]
        old.rest()
        return _carried(state, again(old, copy.deepcopy(blank), state.model))

    return fork


def fill(model: nn.Module, source: nn.Module) -> None:
    """Give the blank `model` clones of the tensors of `source`, ties kept."""
    ours: dict[int, Any] = {}
    for name, theirs in tensors(source):
        if id(theirs) not in ours:
            data = theirs.detach().clone()
            weight = isinstance(theirs, nn.Parameter)
            ours[id(theirs)] = (
                nn.Parameter(data, theirs.requires_grad) if weight else data
            )
        put(model, name, ours[id(theirs)])
    for new, old in zip(model.modules(), source.modules(), strict=True):
        for name, value in vars(old).items():  # modes, counters: what has changed since
            if name in _INTERNALS or name.startswith(("__", "_fsdp")):
                continue
            if isinstance(value, MethodType) and value.__self__ is old:
                vars(new).setdefault(name, MethodType(value.__func__, new))
                continue
            vars(new)[name] = copy.deepcopy(value, dict(ours))


def empty(model: nn.Module) -> None:
    """Put every weight and buffer of `model` on the meta device, ties kept."""
    _unset(model, lambda tensor: "meta", lambda tensor: True)


def furnish(model: nn.Module, device: str | Callable[[Tensor], str]) -> None:
    """Give what is on the meta device memory, not yet set, on `device`; ties kept."""
    where = device if callable(device) else lambda tensor: device
    _unset(model, where, lambda tensor: tensor.is_meta)


def furnished(thing: Any, tx: Transform) -> nn.Module:
    """A module, or what a function makes, in this process, where no pass places it."""
    model = thing if isinstance(thing, nn.Module) else thing()
    claim(model, Env(), promises(tx, "load_weights", "load_state"))
    furnish(model, Env().device)
    return model


def _unset(
    model: nn.Module, where: Callable[[Tensor], str], which: Callable[[Tensor], bool]
) -> None:
    ours: dict[int, Any] = {}
    for name, theirs in tensors(model):
        if which(theirs):
            if id(theirs) not in ours:
                ours[id(theirs)] = unset(theirs, where(theirs))
            put(model, name, ours[id(theirs)])


def unset(like: Tensor, device: str) -> Tensor:
    """A weight or buffer like `like` in memory on `device` that nothing has set."""
    data = torch.empty_like(like, device=device, requires_grad=False)
    weight = isinstance(like, nn.Parameter)
    return nn.Parameter(data, like.requires_grad) if weight else data


def tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every weight and buffer under every name that it has."""
    params = model.named_parameters(remove_duplicate=False)
    return [*params, *model.named_buffers(remove_duplicate=False)]


def get(model: nn.Module, name: str) -> Any:
    """The weight or buffer called `name`."""
    module, leaf = _owner(model, name)
    return getattr(module, leaf)


def put(model: nn.Module, name: str, tensor: Any) -> None:
    """Make `tensor` the weight or buffer called `name`."""
    module, leaf = _owner(model, name)
    setattr(module, leaf, tensor)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf


def _carried(state: State, placed: Placed) -> State:
    """A state like `state` around the copy, with optimizers and slots copied over."""
    memo: dict[int, Any] = {id(state.model): placed.model}
    pairs = zip(state.model.parameters(), placed.model.parameters(), strict=True)
    for theirs, ours in pairs:
        memo[id(theirs)] = ours
        if theirs.grad is not None:
            ours.grad = theirs.grad.detach().clone()
    rest = {k: v for k, v in state.slots.items() if k != "shard_model"}
    optimizers, slots = duplicated(state.optimizers, rest, memo)
    return attrs.evolve(
        state,
        model=placed.model,
        optimizers=optimizers,
        slots=slots_of({**slots, "shard_model": placed}),
        trained=trainable(placed.model),
        still=frozen_in(placed.model),
    )
