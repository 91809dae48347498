"""What of a state is saved, and under which names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from torch import Tensor, nn

from accelx.engines.kept import as_at_init
from accelx.errors import CheckpointError
from accelx.match import Selector, fits
from accelx.records import Env
from accelx.saves import optim
from accelx.saves.boxes import Box
from accelx.saves.check import LONG
from accelx.saves.flat import Flat, Held
from accelx.saves.lie import Lie, Slice, lie
from accelx.saves.memory import host
from accelx.saves.streams import SIZE, now
from accelx.saves.typed import encode
from accelx.state import State, is_saved

RANDOM = "random"  # (ranks, SIZE) uint8, each rank its row


@attrs.frozen(eq=False)
class Contents:
    """The tensors, the rest as typed JSON, and the names that are tied."""

    tensors: Mapping[str, Held]
    values: Mapping[str, Any]
    aliases: Mapping[str, str]
    lies: Mapping[str, Lie]
    left: Mapping[str, Held]  # weights that `select` leaves out
    own: frozenset[str] = frozenset()  # buffers and slots: what a user may write into


def contents(
    state: State,
    env: Env,
    select: Selector | None,
    memo: dict[Any, Any],
) -> Contents:
    """What is saved of `state`. Nothing is copied but the random streams.

    `memo` is the caller's, for its saves: see `lie`.
    """
    tensors: dict[str, Held] = {}
    values: dict[str, Any] = {"step": state.step, "skipped": state.skipped}
    keep = _keeper(tensors)
    held, aliases, extra = state_tensors(state)
    left = {n: t for n, t in held.items() if not selected(select, n, t)}
    left |= {a: held[b] for a, b in aliases.items() if b in left}
    for name, tensor in held.items():
        if name not in left:
            keep(f"model.{name}", tensor)
    for name, value in extra.items():
        values[f"model.{name}"] = encode(value, f"model.{name}", keep)
    names = optim.names_of(state.model)
    for i, optimizer in enumerate(optim.seen(state)):
        values |= optim.describe(i, optimizer, names, keep)
    for name, slot in state.slots.items():
        if is_saved(slot):
            values[f"slots.{name}"] = encode(slot, f"slots.{name}", keep)
    lies = {name: lie(name, tensor, memo) for name, tensor in tensors.items()}
    tensors[RANDOM] = now(env.device)
    lies[RANDOM] = memo.get((RANDOM, env.world)) or _rows(env.world)
    memo[RANDOM, env.world] = lies[RANDOM]
    tied = {f"model.{a}": f"model.{b}" for a, b in aliases.items() if b not in left}
    weights = {f"model.{n}" for n, t in held.items() if is_weight(t)}
    own = {n for n in tensors if n not in weights and not n.startswith("optim.")}
    return Contents(tensors, values, tied, lies, left, frozenset(own - {RANDOM}))


def _rows(world: int) -> Lie:
    """How the random streams lie."""
    rows = tuple(Slice(Box((r, 0), (r + 1, SIZE)), (r,)) for r in range(world))
    return Lie("uint8", (world, SIZE), rows)


def _keeper(tensors: dict[str, Held]) -> Callable[[str, Held], None]:
    def keep(name: str, tensor: Held) -> None:
        if name in tensors:
            raise CheckpointError(
                f"two tensors want to be saved as {name!r}; name one of them otherwise"
            )
        if len(name) > LONG:
            raise CheckpointError(
                f"a tensor's name wants at most {LONG} characters, but "
                f"{name[:80]!r}... has {len(name)}; put it under a shorter key"
            )
        if not tensor.is_cpu and isinstance(tensor, Tensor):
            tensor = host(tensor) if tensor.device.type == "xla" else tensor
        tensors[name] = tensor

    return keep


def selected(select: Selector | None, name: str, tensor: Any) -> bool:
    """Whether `select` takes a weight; buffers are always taken."""
    if select is None or not is_weight(tensor):
        return True
    return tensor.requires_grad if select == "trainable" else fits(select, name, tensor)


def is_weight(tensor: Held) -> bool:
    """Whether this is a weight, and no buffer."""
    return isinstance(tensor, nn.Parameter | Flat)


def rest(name: str, env: Env, state: State) -> None:
    """Have the engine make weights what optimizers see.

    Refuses ranks without one, and weights that came since `init`.
    """
    as_at_init(state)
    placed = state.slots.get("shard_model")
    if placed is None and env.world > 1:
        raise CheckpointError(
            f"{name} wants a model on all {env.world} ranks, but the chain has no "
            'shard_model, so each rank has its own; add shard_model(env, "ddp")'
        )


def state_tensors(
    state: State,
) -> tuple[dict[str, Held], dict[str, str], dict[str, Any]]:
    """`model_tensors` of a state's model, with weights as its engine says they lie."""
    held, aliases, extra = model_tensors(state.model)
    flat = flat_of(state)
    return {n: flat.get(id(t), t) for n, t in held.items()}, aliases, extra


def flat_of(state: State) -> Mapping[int, Flat]:
    """By id, the weights that lie otherwise than they look."""
    placed = state.slots.get("shard_model")
    return {} if placed is None else placed.flat()


def model_tensors(
    model: nn.Module,
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Weights and persistent buffers by name, tied names, and a module's extra state.

    Buffers that are not persistent are left out, as state_dict leaves them out. Raises
    CheckpointError where a hook or an override has state_dict() give copies, which
    nothing could be loaded into, or leave out weights that are trained.
    """
    held: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    extra: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[2] == "_extra_state":
            extra[name] = value
        elif id(value) in first:
            aliases[name] = first[id(value)]
        else:
            first[id(value)] = name
            held[name] = value
    _check_own(model, held)
    return held, aliases, extra


def _check_own(model: nn.Module, held: Mapping[str, Tensor]) -> None:
    own = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    there = {id(t) for t in held.values()}
    odd = [f"{n} is a copy" for n, t in held.items() if own.get(n, t) is not t]
    odd += [
        f"{n} is left out"
        for n, p in model.named_parameters()
        if p.requires_grad and id(p) not in there and n not in held
    ]
    if odd:
        raise CheckpointError(
            f"state_dict() of {type(model).__name__} wants to give the weights and "
            f"buffers themselves, but {', '.join(odd[:5])}; take away the hook or "
            "override of state_dict that does so, and convert what was saved instead"
        )
