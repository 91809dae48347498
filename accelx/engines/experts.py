"""Experts of a mixture on ranks of their own: tokens are sent to them and back."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from contextlib import contextmanager
from inspect import Parameter, signature
from types import MethodType
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from accelx import _torch, comm
from accelx.comm_wire import dist, group
from accelx.engines import experts_tokens
from accelx.engines.options import SLICED, divides, shards
from accelx.engines.tensor_plans import styles
from accelx.engines.tensors import elsewhere
from accelx.env_part import along
from accelx.errors import PlacementError
from accelx.match import Selector, select
from accelx.records import Env

if TYPE_CHECKING:
    from accelx.engines.placed import Plan

PLACED = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
GIVEN = 3  # tokens, the experts of each, their weights
DEALT = "_accelx_dealt"  # on a module whose experts are dealt out


@attrs.define(eq=False)
class Dealt:
    """Where the experts of one module are."""

    env: Env  # of the ranks that each hold some
    near: Env | None  # of those among them that share layers
    own: bool  # whether each of these has tokens of its own
    each: int  # experts on one rank
    names: tuple[str, ...]  # of the weights
    looked: bool = False  # whether tokens of ranks that share layers were compared
    weighed: bool = False  # whether the module was seen to multiply by weights


def chosen(model: nn.Module, selector: Selector, ranks: int) -> dict[str, nn.Module]:
    """The modules whose experts `ranks` ranks hold, by name; refuses other forms.

    Those of another stage than this rank's are left out.
    """
    found = known(model) if selector == "auto" else dict(select(model, selector))
    if not found:
        raise PlacementError(
            f'shard_experts(env, "auto") knows the experts of transformers, and '
            f"{type(model).__name__} has none; write shard_experts(env, "
            '"layers.*.experts"), for modules whose weights have one expert a row'
        )
    found = {n: m for n, m in found.items() if not elsewhere(m)}
    for name, module in found.items():
        _fits(name, module, ranks)
    return found


def known(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of transformers that hold experts and take what is routed to them."""
    return {n: m for n, m in model.named_modules() if _of_transformers(m)}


def _of_transformers(module: nn.Module) -> bool:
    ours = type(module).__module__.startswith("transformers.")
    return ours and type(module).__name__.endswith("Experts") and _routed(module)


def _routed(module: nn.Module) -> bool:
    return len(_takes(module)) >= GIVEN


def _takes(module: nn.Module) -> list[str]:
    """What `forward` is given by position, by name."""
    known = signature(module.forward).parameters.values()
    return [one.name for one in known if one.kind in PLACED]


def _fits(name: str, module: nn.Module, ranks: int) -> None:
    own = dict(module.named_parameters(recurse=False))
    counts = {p.shape[0] if p.dim() else 0 for p in own.values()}
    if len(counts) != 1 or len(list(module.parameters())) != len(own):
        shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in own.items()) or "none"
        raise PlacementError(
            f"shard_experts wants weights of {name} with one expert a row and no "
            f"module in it with weights, got {shapes}; stack the experts' weights "
            "along dim 0"
        )
    if not _routed(module):
        shown = ", ".join(_takes(module))
        raise PlacementError(
            f"shard_experts wants forward(tokens, index, weights) of {name}, a "
            f"{type(module).__name__}, got forward({shown}); select the modules that "
            "hold experts, and route outside them"
        )
    count = counts.pop()
    told = [n for n, b in module.named_buffers() if b.dim() and b.shape[0] == count]
    if told:
        raise PlacementError(
            f"shard_experts deals out the weights of {name}, but each rank would have "
            f"its buffer {told[0]} with a row for each of all {count} experts; make it "
            "a weight that is not trained: nn.Parameter(rows, requires_grad=False)"
        )
    if count % ranks:
        raise PlacementError(
            f"shard_experts deals the {count} experts of {name} out to {ranks} ranks, "
            "which do not divide them; take a number of ranks that does: "
            'connect(axes="data=-1,expert=2")'
        )


def split(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """Leave on each rank its experts, and have their modules send tokens; the modules.

    Every rank must hold the same numbers. Effect: weights become DTensors over the axes
    expert and tensor, `forward` of these modules a function that exchanges tokens.
    """
    from torch.distributed.tensor import Shard, distribute_tensor

    env: Env = plan.experts.over
    mesh: Any = comm.mesh(env)
    found = chosen(model, plan.experts.experts, env.world)
    near, told = None, dict[str, Any]()
    if plan.tensors is not None:
        near = plan.tensors.over
        told = styles(model, plan.tensors.plan, near.world, found.values())
    for path, module in found.items():
        own = dict(module.named_parameters(recurse=False))
        each = next(iter(own.values())).shape[0] // env.world
        for name, p in own.items():
            cuts = [Shard(0)] * mesh.ndim
            data = distribute_tensor(p.data, mesh, cuts, src_data_rank=None)
            module.register_parameter(name, nn.Parameter(data, p.requires_grad))
        vars(module)[DEALT] = Dealt(env, near, path in told, each, tuple(own))
        vars(module)["forward"] = MethodType(_forward, module)
    return list(found.values())


def others(env: Env) -> Env:
    """The ranks that hold the same experts, of those with losses of their own."""
    return along(env, *[axis.name for axis in env.axes if axis.name != "expert"])


def agrees(plan: Plan) -> None:
    """Refuse what is not done together with experts on ranks of their own."""
    if plan.kind not in ("ddp", "fsdp2", "hsdp"):
        raise PlacementError(
            f'shard_experts goes with "ddp", "fsdp2" and "hsdp", got {plan.kind!r}; '
            'write shard_model(env, "fsdp2")'
        )
    for name in ("ignored", "hook", "static_graph", "offload"):
        got = getattr(plan.options, name)
        if got:
            raise PlacementError(
                f"shard_model({name}=...) is not for a chain with shard_experts, got "
                f"{got!r}; leave it out"
            )
    same = others(plan.env)
    if plan.kind in SLICED and same.world > 1:
        divides(plan.options.reshard_after_forward, shards(same, plan.kind))


def _forward(module: Any, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each token by its experts, wherever they are: (T, width), (T, k), (T, k)."""
    here: Dealt = vars(module)[DEALT]
    near = here.near
    if near is not None and not here.looked:
        here.looked = True
        experts_tokens.compare(near, tokens, here.own)
    if near is None or here.own:
        return _sent(module, here, tokens, index, weights)
    shares = (experts_tokens.share(near, rows) for rows in (tokens, index, weights))
    return experts_tokens.joined(near, _sent(module, here, *shares), tokens)


def _sent(
    module: Any, here: Dealt, tokens: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    wanted = index.reshape(-1)
    target = wanted // here.each
    order = target.argsort(stable=True)
    there, back = _counts(here.env, target)
    line: Any = group(here.env, "shard_experts")

    def moved(rows: Tensor, out: list[int], into: list[int]) -> Tensor:
        return _torch.all_to_all(rows, into, out, line)

    source = order // index.shape[1]
    arrived = moved(tokens[source], there, back)
    which = moved(wanted[order], there, back) - here.env.rank * here.each
    if not _torch.has_numbers(which):
        which = torch.arange(len(which)) % here.each
    with _local(module, here) as own:
        ones = torch.ones(len(which), 1, dtype=weights.dtype, device=weights.device)
        made = type(module).forward(module, arrived, which[:, None], ones)
        if not here.weighed and len(which):
            here.weighed = True
            experts_tokens.weighed(module, arrived, which[:, None], ones)
        if not len(which):  # all take part on every rank, backward too, tokens or not
            made = made + sum(x.reshape(-1)[:1].sum() for x in (*own, arrived)) * 0
    home = moved(made, back, there) * weights.reshape(-1)[order, None]
    return torch.zeros_like(tokens).index_add(0, source, home.to(tokens.dtype))


def _counts(env: Env, target: Tensor) -> tuple[list[int], list[int]]:
    """How many rows go to each rank, and how many come from each.

    On a simulated rank, where nobody knows to whom, they are dealt out evenly.
    """
    if not _torch.has_numbers(target):
        ends = [len(target) * rank // env.world for rank in range(env.world + 1)]
        even = [end - start for start, end in itertools.pairwise(ends)]
        return even, [even[env.rank]] * env.world
    sent = torch.bincount(target, minlength=env.world)
    got = torch.empty_like(sent)
    dist().all_to_all_single(got, sent, group=group(env, "shard_experts"))
    return sent.tolist(), got.tolist()


@contextmanager
def _local(module: nn.Module, here: Dealt) -> Generator[list[Tensor]]:
    """The module with this rank's experts alone, as plain tensors."""
    held: dict[str, Any] = {}
    for name in here.names:  # seen before the parameter of that name
        weight: Any = nn.Module.__getattr__(module, name)
        held[name] = _torch.own_local(weight)
    own: list[Tensor] = list(held.values())
    count = vars(module).get("num_experts")
    if count == here.each * here.env.world:  # what modules of transformers count by
        held["num_experts"] = here.each
    vars(module).update(held)
    try:
        yield own
    finally:
        for name in here.names:
            vars(module).pop(name, None)
        if "num_experts" in held:
            vars(module)["num_experts"] = count


def divide(names: frozenset[str], ranks: int, trained: Any) -> None:
    """Make gradients of experts those of the sum over tokens.

    Each came from all ranks of the axis, which the loss was multiplied for.
    """
    for name, p in trained:
        if name in names and p.grad is not None:
            _torch.local_of(p.grad).div_(ranks)
