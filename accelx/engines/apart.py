"""Ranks that train copies of their own for a while, and what they agree on then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from accelx import comm
from accelx.engines import placed, plain
from accelx.engines.copies import tensors
from accelx.engines.placed import Placed
from accelx.errors import CheckpointError, PlacementError
from accelx.records import Env, Transform
from accelx.state import with_slot

if TYPE_CHECKING:
    from accelx.state import State

CHUNK = 1 << 24  # elements that travel at once
NAMES = ("with_local_sgd", "with_diloco")  # slots with an Apart, or around one


def part(state: State, tx: Transform, name: str, env: Env, every: int) -> State:
    """The state whose engine reduces no gradient.

    Raises PlacementError for slices, CheckpointError for saves where ranks differ.
    """
    spec = tx.find("shard_model")
    here: Placed | None = state.slots.get("shard_model")
    if spec is None or here is None or spec.kind != "ddp":
        came = "no shard_model" if spec is None else f'"{spec.kind}"'
        raise PlacementError(
            f"{name} wants a whole copy of the model on each rank, but the chain has "
            f'{came}; write shard_model(env, "ddp")'
        )
    if here.env != env:
        raise PlacementError(
            f"{name} wants the Env of shard_model, {here.env!r}, got {env!r}; write "
            "env = ax.connect() once, for both"
        )
    for option in ("hook", "static_graph"):
        if getattr(spec, option):
            raise PlacementError(
                f"{option}={getattr(spec, option)!r} is of gradients that ddp reduces, "
                f'but with {name} none are; write shard_model(env, "ddp") without it'
            )
    if env.world == 1:
        return state
    saves = tx.find("save_state")
    if saves is not None and (saves.every or every) % every:
        raise CheckpointError(
            f"with {name} ranks agree after each {every} updates, but {saves.every} "
            "updates lie between saves, which would find them apart; write "
            f"save_state(env, url, every={every}), or a multiple"
        )
    engine = attrs.evolve(here.engine, settle=settle, clip=clip, carry=None)
    return _forkable(with_slot(state, "shard_model", attrs.evolve(here, engine=engine)))


def _forkable(state: State) -> State:
    """The state with a fork that has this rank's weights: DDP sends rank 0's to all."""
    here: Placed = state.slots["shard_model"]
    inner = here.fork
    if inner is None:
        return state

    def fork(old: State) -> State:
        new = inner(old)
        pairs = zip(tensors(old.model), tensors(new.model), strict=True)
        with torch.no_grad():
            for (_, theirs), (_, ours) in pairs:
                ours.copy_(theirs)
        return _forkable(new)

    return with_slot(state, "shard_model", attrs.evolve(here, fork=fork))


def quiet(state: State) -> AbstractContextManager[None]:
    """No reduction of gradients for the passes inside."""
    here: Placed = state.slots["shard_model"]
    if here.handle is None:  # one rank, or nothing to train
        return nullcontext()
    return here.engine.quiet(state)


def settle(state: State, scale: Tensor | float) -> None:
    """Multiply this rank's own gradients by `scale`; nothing is sent.

    They are of the mean over the whole batch, times the ranks: their mean over ranks is
    what ddp makes of them.
    """
    here: Placed = state.slots["shard_model"]
    if here.handle is not None:
        here.handle.called = False
    placed.all_used(state)
    plain.settle(state, scale)


def clip(state: State, limit: float | None) -> Tensor:
    """The 2-norm of this rank's gradients, (); nan on all ranks if not finite on one.

    So that all ranks skip the same steps. Scales gradients to `limit` beyond it.
    """
    grads = plain.gradients(state)
    norm = plain.total(grads)
    odd = (~norm.isfinite()).to(torch.float32).to(state.slots["shard_model"].env.device)
    comm.sum_scalars(state.slots["shard_model"].env, odd)
    norm = torch.where(odd.to(norm.device) > 0, torch.full_like(norm, torch.nan), norm)
    return plain.limited(grads, norm, limit)


def agree(state: State, env: Env) -> None:
    """Put the mean over ranks into trained weights and running statistics, in place."""
    drifting = placed.statistics(placed.drifters(state.model))
    average(env, [*(p for _, p in state.trained), *drifting])


def agreed(state: State, what: str) -> None:
    """Refuse `what` between means. Raises CheckpointError on all ranks."""
    for name in NAMES:
        slot = state.slots.get(name)
        if slot is not None:
            getattr(slot, "apart", slot).check(what)


def average(env: Env, each: Iterable[Tensor]) -> None:
    """Put the mean over ranks into each tensor, in place; 16 bits add up in float32."""
    if env.world == 1:
        return
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in each:
        if tensor.numel():
            kind = (tensor.device, tensor.dtype)
            by_kind.setdefault(kind, []).append(tensor.detach())
    for group in by_kind.values():
        for some in _chunks(group):
            _mean(env, some)


def _chunks(group: list[Tensor]) -> Iterable[list[Tensor]]:
    some: list[Tensor] = []
    for tensor in group:
        if some and sum(t.numel() for t in some) + tensor.numel() > CHUNK:
            yield some
            some = []
        some.append(tensor)
    yield some


def _mean(env: Env, group: list[Tensor]) -> None:
    import torch.distributed as dist

    short = group[0].element_size() < 4
    flat = torch.cat([t.reshape(-1).float() if short else t.reshape(-1) for t in group])
    dist.all_reduce(flat)
    flat /= env.world
    parts = flat.split([t.numel() for t in group])
    for tensor, mean in zip(group, parts, strict=True):
        tensor.copy_(mean.view_as(tensor))


@attrs.define(eq=False)
class Apart:
    """A slot: whether ranks differ just now, and what each of them has of its own.

    The optimizers' state is another on each rank. It is saved as rows, one a rank, and
    comes back to the same ranks to the bit; other numbers of ranks get the rows' mean.
    """

    name: str
    env: Env
    every: int
    optimizers: tuple[Any, ...]
    since: int = 0  # updates since ranks agreed

    def state_dict(self) -> dict[str, Any]:
        """What is saved. Raises CheckpointError where weights differ over ranks."""
        then = f"save then (save_state(env, url, every={self.every}))"
        self.check("a checkpoint", then)
        return {"own": rows_of(self.env, self.optimizers)}

    def check(self, what: str, instead: str = "do it then") -> None:
        """Raise CheckpointError where weights differ over ranks."""
        if self.since and self.env.world > 1:
            raise CheckpointError(
                f"{what} wants weights that all ranks agree on, but {self.since} "
                f"updates were made since; with {self.name} ranks agree after each "
                f"{self.every} updates: {instead}, or write "
                f"state = ax.{self.name}(...)(state)"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, once the optimizers have theirs."""
        self.since = 0
        take_rows(self.env, self.optimizers, state["own"])


class Rows(dict[str, Tensor]):
    """Tensors of optimizers by place, each (world, ...), of which a rank holds one row.

    Asked for one that an optimizer has not made yet, it gives one to be filled.
    """

    def __init__(self, env: Env, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.env, self.params = env, params

    def get(self, key: str, default: Any = None) -> Any:
        """The rows called `key`, or such as the moments of its parameter would be."""
        p = self.params.get(key.rpartition(".")[0])
        if key in self or p is None:
            return super().get(key, default)
        return _row(self.env, torch.empty_like(p, requires_grad=False))


def rows_of(env: Env, optimizers: Iterable[Any]) -> Rows:
    """What each rank's optimizers have of their own, as rows, which are views."""
    params = {at: p for at, p, _ in _own(optimizers)}
    rows = Rows(env, params)
    for at, _, state in _own(optimizers):
        for key, value in state.items():
            if isinstance(value, Tensor):
                rows[f"{at}.{key}"] = _row(env, value)
    return rows


def take_rows(env: Env, optimizers: Iterable[Any], rows: Mapping[str, Tensor]) -> None:
    """Give this rank's optimizers its own row; the mean where ranks were others."""
    from accelx import _torch

    for at, _, state in _own(optimizers):
        for key, value in state.items():
            name = f"{at}.{key}"
            if name not in rows or not isinstance(value, Tensor):
                continue
            row = rows[name]
            if _torch.is_dtensor(row):
                value.copy_(_torch.local_of(row)[0])
            elif len(row) == env.world:
                value.copy_(row[env.rank])
            else:
                value.copy_(row.mean(0) if row.is_floating_point() else row[0])


def _row(env: Env, tensor: Tensor) -> Tensor:
    """`tensor` as this rank's row of (world, ...)."""
    if env.world == 1:
        return tensor.detach()[None]
    from torch.distributed.tensor import DTensor, Shard

    mesh = comm.mesh(env)
    return DTensor.from_local(tensor.detach()[None], mesh, [Shard(0)] * mesh.ndim)


def _own(optimizers: Iterable[Any]) -> Iterable[tuple[str, Tensor, dict[str, Any]]]:
    """Each parameter of the optimizers with its place and its state."""
    for i, optimizer in enumerate(optimizers):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for k, p in enumerate(params):
            yield f"{i}.{k}", p, optimizer.state.get(p, {})
