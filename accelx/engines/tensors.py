"""Weights that are cut inside layers, and what stays whole (tensor parallel)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from accelx import _torch, comm, tree
from accelx.engines import placed, plain
from accelx.engines.tensor_plans import styles
from accelx.engines.tensor_styles import hook, parallel_style
from accelx.engines.tensor_words import cuts_logits, words
from accelx.errors import LossError, PlacementError
from accelx.records import Env
from accelx.saves.spread import Absent

if TYPE_CHECKING:
    from accelx.engines.placed import Plan
    from accelx.state import State

ALIKE = 0.01  # by which share of it ranks' gradients of one weight may part
TINY = 1e-6  # what share of the largest gradient's norm is nothing but rounding
CUT = "_accelx_logits_cut"  # on a model whose logits stay cut for cross_entropy


def split(model: nn.Module, plan: Plan, dealt: Collection[nn.Module] = ()) -> None:
    """Make every weight of `model` a DTensor over the axis tensor, as the plan says.

    But those of modules that are `dealt` out already. Every rank must hold the same
    numbers. Effect: weights are replaced; ties are kept.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    env: Env = plan.tensors.over
    if env.world == 1:
        return
    mesh: Any = comm.mesh(env)
    found = styles(model, plan.tensors.plan, env.world, dealt)
    tied = _ties(model)
    modules = dict(model.named_modules())
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    here = {n: style for n, style in found.items() if not elsewhere(modules[n])}
    for name, word in ((n, w) for n, style in here.items() for w in words(style)):
        made = parallel_style(word)
        if made is not None:
            parallelize_module(modules[name], mesh, made, src_data_rank=None)
        hook(modules[name], word, mesh)
    partial = {name for name, style in found.items() if "partial" in words(style)}
    for name, module in modules.items():
        lent = _keep_whole(name, module, mesh, summed=name in partial)
        if lent and isinstance(module, nn.Conv1d) and name:
            where, _, leaf = name.rpartition(".")
            _lend(modules[where], leaf, *lent)
    _tie_again(model, tied)
    for name, p in model.named_parameters():
        p.requires_grad_(trains[name])  # SequenceParallel forgets it
    object.__setattr__(model, CUT, cuts_logits(found.values()))


def elsewhere(module: nn.Module) -> bool:
    """Whether the weights of `module` are in another stage."""
    held = (vars(m).values() for m in module.modules())
    return any(isinstance(one, Absent) for values in held for one in values)


def agrees(plan: Plan) -> None:
    """Refuse options of shard_model that are for weights that are not cut twice."""
    options = plan.options
    for name in ("ignored", "hook", "static_graph"):
        got = getattr(options, name)
        if got:
            raise PlacementError(
                f"shard_model({name}=...) is not for a chain with shard_tensors, got "
                f"{got!r}; leave it out"
            )


def _ties(model: nn.Module) -> list[list[str]]:
    """Names of each weight that has several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _tie_again(model: nn.Module, tied: list[list[str]]) -> None:
    from accelx.engines import copies

    for first, *others in tied:
        weight = copies.get(model, first)
        for name in others:
            other = copies.get(model, name)
            if other.placements != weight.placements:
                raise PlacementError(
                    f"{first} and {name} are one weight, but the plan of shard_tensors "
                    f"cuts it as {weight.placements} and as {other.placements}; give "
                    'both one cut: "embedding" goes with "column_gather" or "loss"'
                )
            copies.put(model, name, weight)


def _keep_whole(
    name: str, module: nn.Module, mesh: Any, summed: bool
) -> tuple[Callable[..., None], Callable[..., None]] | None:
    """Have each rank use the weights that `module` itself holds as they are.

    As DTensors, since optimizers take many weights at once, of one kind. With `summed`
    each rank uses them on its own part, so gradients add up. Returns what makes them
    plain for a call, and what ends that, if there are any.
    """
    from torch.distributed.tensor import Partial, Replicate, distribute_tensor

    own = dict(module.named_parameters(recurse=False))
    whole = [n for n, p in own.items() if not _torch.is_dtensor(p)]
    if not whole:
        return None
    if isinstance(module, nn.RNNBase):
        raise PlacementError(
            f"shard_tensors cannot keep the weights of {name}, a "
            f"{type(module).__name__}, which looks them up in a list of its own; leave "
            "shard_tensors out of the chain of this model"
        )
    for n in whole:
        data = distribute_tensor(own[n].data, mesh, [Replicate()], src_data_rank=None)
        module.register_parameter(n, nn.Parameter(data, own[n].requires_grad))
    grads = [Partial()] if summed else None

    def before(m: nn.Module, args: Any) -> None:
        for n in whole:  # seen before the parameter of that name
            weight: Any = nn.Module.__getattr__(m, n)
            vars(m)[n] = _torch.own_local(weight, grads)

    def behind(m: nn.Module, args: Any, out: Any) -> None:
        for n in whole:
            vars(m).pop(n, None)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(behind, always_call=True)
    return before, behind


def _lend(
    parent: nn.Module,
    leaf: str,
    before: Callable[..., None],
    behind: Callable[..., None],
) -> None:
    """The same for calls of `parent`, which gives weights of `leaf` to a kernel.

    As linear attention does those of a convolution that it does not call.
    """
    parent.register_forward_pre_hook(lambda m, args: before(getattr(m, leaf), args))
    parent.register_forward_hook(
        lambda m, args, out: behind(getattr(m, leaf), args, out), always_call=True
    )


def logits_cut(model: nn.Module) -> AbstractContextManager[Any]:
    """The context in which `cross_entropy` and its backward take cut logits.

    It must not be entered twice. Does nothing where the plan leaves logits whole.
    """
    if not vars(model).get(CUT, False):
        return nullcontext()
    from torch.distributed.tensor.parallel import loss_parallel

    return loss_parallel()


class Joined(TorchFunctionMode):
    """Makes what `cross_entropy` returns plain, to go with plain tensors as a mask."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """`func` as it is; its result in full if it is a loss of cut logits."""
        if func is functional.cross_entropy:
            _smooth(args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        if func is functional.cross_entropy and _torch.is_dtensor(out):
            return out.full_tensor()
        return out


def _smooth(args: Any, kwargs: dict[str, Any]) -> None:
    logits = args[0] if args else kwargs["input"]
    if kwargs.get("label_smoothing") and _torch.is_dtensor(logits):
        raise LossError(
            'logits that stay cut ("loss" in the plan of shard_tensors) want '
            "cross_entropy without label_smoothing, which torch does not compute over "
            f"ranks, got {kwargs['label_smoothing']}; write "
            '"column_gather" for that module'
        )


def joined(result: Any) -> Any:
    """What a loss returned, its numbers made plain that came of cut logits.

    torch goes backward from a mean of such as if it were of one rank's part.
    """

    def one(leaf: Any) -> Any:
        return leaf.full_tensor() if _torch.is_dtensor(leaf) else leaf

    return tree.map_leaves(one, result)


@attrs.define(eq=False)
class Counted:
    """Over which ranks weights lie, and on how many of them each slice."""

    env: Env  # of all ranks that have a part
    sharing: Env | None  # of those that share each layer
    copies: dict[str, int]  # by the name of the weight
    whole: frozenset[str]  # what each of those has all of
    looked: bool = False  # whether gradients of what is whole were compared

    @classmethod
    def of(cls, model: nn.Module, env: Env, sharing: Env | None = None) -> Counted:
        """How the weights of `model`, all DTensors, lie over the ranks of `env`."""
        found: dict[str, int] = {}
        whole: set[str] = set()
        for name, p in model.named_parameters():
            one: Any = p
            sizes = zip(one.placements, one.device_mesh.shape, strict=True)
            found[name] = math.prod(n for place, n in sizes if place.is_replicate())
            if one.placements[-1].is_replicate():
                whole.add(name)
        return cls(env, sharing, found, frozenset(whole))

    def norm(self, state: State) -> Tensor:
        """The gradients' 2-norm, each number counted once, ()."""
        by_copies: dict[int, list[Tensor]] = {}
        for name, p in state.trained:
            if p.grad is not None:
                some = by_copies.setdefault(self.copies[name], [])
                some.append(_torch.local_of(p.grad))
        parts = [plain.total(some).square() / n for n, some in by_copies.items()]
        square = torch.stack([part.to(self.env.device) for part in parts]).sum()
        comm.sum_scalars(self.env, square)
        return square.sqrt()

    def alike(self, state: State) -> None:
        """Refuse, at the first step, gradients of whole weights that differ over ranks.

        A weight that each rank uses on a part of heads or positions has a part of its
        gradient there, which nothing else would show.
        """
        if self.looked or self.sharing is None:
            return
        self.looked = True
        named = [(n, p.grad) for n, p in state.trained if n in self.whole]
        grads = [(n, _torch.local_of(g)) for n, g in named if g is not None]
        if not grads:
            return
        norms = torch.zeros(self.sharing.world, len(grads), device=self.env.device)
        mine = [n.to(norms) for n in _torch.norms([g for _, g in grads])]
        norms[self.sharing.rank] = torch.stack(mine)
        comm.sum_scalars(self.sharing, norms)
        high, low = norms.max(0).values, norms.min(0).values
        odd = (high - low > ALIKE * high) & (high > TINY * high.max())
        if norms.isfinite().all() and odd.any():
            names = [n for (n, _), one in zip(grads, odd.tolist(), strict=True) if one]
            raise PlacementError(
                f"the {self.sharing.world} ranks that share layers want one gradient "
                "of a weight that is whole on each, but those of "
                f"{', '.join(names[:4])} differ; write "
                '"partial" in the plan for its module, if it acts on '
                "each rank's own heads or positions, or give these ranks one seed for "
                "dropout: ax.seed(env, 0)"
            )


def as_weights(state: State) -> None:
    """Lay gradients out as their weights: sums that are not made yet, and tables'."""
    for _, p in state.trained:
        if p.grad is not None and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)


def settle(state: State, scale: Tensor | float) -> None:
    """Check that every parameter took part, add up, scale."""
    placed.all_used(state)
    as_weights(state)
    state.slots["shard_model"].handle.alike(state)
    if not (isinstance(scale, float) and scale == 1.0):
        _torch.scale_(_locals(state), scale)


def update(state: State) -> None:
    """Step the optimizers; refuses one that writes whole weights."""
    try:
        plain.update(state)
    except RuntimeError as error:
        if "placement" not in str(error):
            raise
        kinds = ", ".join(type(o).__name__ for o in state.optimizers)
        raise PlacementError(
            f"{kinds} wants whole weights, which a step of its own writes in ways that "
            f"slices do not take, got those of {placed.engine_of(state).name}; write "
            'shard_model(env, "ddp"), and nothing that cuts weights, or another '
            "optimizer, such as AdamW"
        ) from error


def clip(state: State, limit: float | None) -> Tensor:
    """The 2-norm over all weights, each counted once, (); scales to `limit` beyond."""
    counted: Counted = state.slots["shard_model"].handle
    norm = counted.norm(state)
    if limit is not None:
        _torch.scale_(_locals(state), plain.shrink(norm, limit))
    return norm


def _locals(state: State) -> list[Tensor]:
    return [_torch.local_of(grad) for grad in plain.gradients(state)]


ENGINE = attrs.evolve(
    plain.ENGINE, name="tensor", settle=settle, update=update, clip=clip
)
"""For ranks that all share the same rows: nothing to reduce but what a plan leaves."""


def alone(model: nn.Module, plan: Plan, fork: Callable[[State], State]) -> Any:
    """The Placed of a split model where no other axis divides it."""
    handle = counted(model, plan)
    return placed.Placed(
        *(ENGINE, plan.env, model), handle=handle, unused=plan.unused, fork=fork
    )


def counted(model: nn.Module, plan: Plan) -> Counted:
    """How a split model lies where no other axis divides it."""
    return Counted.of(model, plan.tensors.over, plan.tensors.over)
