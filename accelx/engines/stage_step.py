"""How a model in stages goes forward and backward, and what its ranks agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from accelx import _torch, _torch_stages, comm, tree
from accelx._torch_attention import function_modes
from accelx.comm_wire import dist, group
from accelx.cut import Args, rows_in
from accelx.engines import placed, plain, tensors, whole
from accelx.engines.fsdp_step import Laid
from accelx.engines.placed import Placed
from accelx.engines.stage_line import Line
from accelx.engines.stage_parts import legal, microbatches
from accelx.engines.stage_pipe import HALVES, Pipe, pipe
from accelx.engines.stage_route import Route, Through, route
from accelx.engines.stage_told import ahead, told, without
from accelx.engines.stage_walk import Walk, stand_ins
from accelx.env_device import widest
from accelx.env_part import rows_env
from accelx.errors import DataError, LossError
from accelx.records import Engine, Env, Loss, Out
from accelx.rows import Rows
from accelx.saves.memory import view
from accelx.saves.strict import digest

if TYPE_CHECKING:
    from accelx.engines.stages import Stages
    from accelx.state import State

ROUTES = 4  # shapes of batches that are remembered, with memory for each
# (state, what a loss returned, its arguments, their rows, ranks that share those)
# -> (scalar, scale, report)
Weigh = Callable[[Any, Any, Args, Rows, int], tuple[Tensor, float, Out]]
Inner = Callable[[Any, Args, Rows], tuple[Any, Out]]


@attrs.define(eq=False)
class Met:
    """What the ranks of a pipeline last told one another of their gradients."""

    missing: float = 0.0  # weights without one, of one rank alone
    lacking: tuple[float, ...] = ()  # for each tied weight, how many ranks have none


def stages_of(state: State) -> Stages:
    """The stages that the model of `state` is cut into."""
    return state.slots["shard_model"].stages


def through(loss: Loss, weigh: Weigh) -> Inner:
    """Forward and backward of a batch by way of all stages; nothing is divided yet.

    The report is the last stage's, on all of them.
    """
    run = passed(loss, weigh, ahead)

    def grads(state: State, args: Args, rows: Rows) -> tuple[State, Out]:
        return state, told(stages_of(state), run(state, args, rows))

    return grads


def passed(
    loss: Loss, weigh: Weigh, opened: Callable[[Stages], Line | None] = lambda _: None
) -> Callable[[State, Args, Rows], Job]:
    """This rank's part of a pass forward and backward, of which nobody is told yet.

    They will be on the line that is `opened` when nothing can fail here alone.
    """

    def run(state: State, args: Args, rows: Rows) -> Job:
        stages, here = stages_of(state), state.slots["shard_model"]
        parts = microbatches(args, stages.spec.n, rows, _alike(stages, here))
        ran = way(stages, loss, parts[0])
        if _gathers(here):
            _torch_stages.fsdp_quiet(state.model)
        ranks = rows_env(here.env).world
        job = Job(state, stages, ran[0], loss, weigh, parts, ranks, here.env.world)
        made = _pipe(stages, ran, len(parts), state)
        job.line = opened(stages)
        made.run(job.work)
        return job

    return run


def _gathers(here: Placed) -> bool:
    """Whether FSDP2 has placed the model, and reduces."""
    return isinstance(here.handle, Laid)


def _alike(stages: Stages, here: Placed) -> Callable[[int], int]:
    """How many microbatches there are: as many on all ranks that gather together."""
    count = legal(stages.spec.schedule, stages.env.world, stages.homes.count)
    if not _gathers(here):
        return count

    def most(least: int) -> int:
        mine = torch.tensor([count(least)], device=here.env.device)
        ours = group(here.env, "shard_stages")
        dist().all_reduce(mine, dist().ReduceOp.MAX, group=ours)
        return int(mine)

    return most


Ran = tuple[Route, dict[int, Pipe]]  # with the schedules that were made for it


def way(stages: Stages, loss: Loss, args: Args) -> Ran:
    """The route of a microbatch, learnt once for its shapes, on all stages together."""
    training = stages.model.training
    known = stages.routes if torch.is_grad_enabled() else stages.seen
    seeing = tuple(map(type, function_modes(TorchFunctionMode)))
    key = (loss, training, seeing, *_shapes(args))
    if key not in known:
        _same_rows(stages.env, args)
        stages.sketch.model.train(training)
        found = route(stages.sketch, lambda m: loss(m, *args), stages.env.device)
        while len(known) >= ROUTES:
            del known[next(iter(known))]
        known[key] = found, {}
    return known[key]


def _shapes(args: Any) -> list[Any]:
    """What a route depends on: paths, shapes and dtypes, and numbers and words."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.shape, leaf.dtype
        return leaf if isinstance(leaf, int | float | str | type(None)) else type(leaf)

    return [(path, one(leaf)) for path, leaf in tree.flatten(args)]


def _same_rows(env: Env, args: Any) -> None:
    """Refuse other rows on other stages: each computes with what it was given."""
    tensors = [leaf for leaf in tree.leaves(args) if isinstance(leaf, Tensor)]
    if not all(map(_torch.has_numbers, tensors)):  # of a simulated rank
        return
    mine = [digest(view(t.detach().cpu().contiguous())) for t in tensors]
    if len({tuple(one) for one in comm.gather_objects(env, mine)}) > 1:
        raise DataError(
            f"the {env.world} ranks of a pipeline want the same batch, but they have "
            "other rows; take it from ax.feed with shard_loader(env), or seed all "
            "ranks alike: ax.seed(env, 0)"
        )


def _pipe(stages: Stages, ran: Ran, n: int, state: State) -> Pipe:
    route, made = ran
    if n not in made:
        weights = tuple(p for _, p in state.trained)
        made[n] = pipe(
            route, stages.env, stages.spec.schedule, stages.homes.count, n, weights
        )
    return made[n]


@attrs.define(eq=False)
class Job:
    """The microbatches of one call, and what came of them."""

    state: Any
    stages: Stages
    route: Route
    loss: Loss
    weigh: Weigh
    parts: list[Args]
    ranks: int  # with rows of their own, of the `world` that have the same stages
    world: int
    outs: list[Out] = attrs.field(factory=list)
    failure: Exception | None = None
    line: Line | None = None

    def work(self, stage: int, number: int, received: tuple[Tensor, ...]) -> Any:
        """What a stage makes of a microbatch; after a failure, stand-ins for it."""
        last = stage == self.stages.homes.count - 1
        if self.failure is None:
            try:
                walk = Walk(self.stages.homes, self.route, stage, received)
                part = self.parts[number]
                result = self._walked(walk, part)
                return self._loss(result, part) if last else self._sent(walk)
            except Exception as error:  # told to all stages, which would wait for ever
                self.failure = error
        if last:
            return torch.zeros((), requires_grad=True, device=self.stages.env.device)
        return tuple(
            one.requires_grad_(one.is_floating_point())
            for one in stand_ins(self.route, stage, self.stages.env.device)
        )

    def _walked(self, walk: Walk, part: Args) -> Any:
        result, way = None, self.stages.way
        before, way.now = way.now, walk  # as `led` does, which takes 2 us
        try:
            result = self.loss(self.state.model, *part)
        except Through:
            pass
        finally:
            way.now = before
        if not walk.called:
            raise LossError(
                "the loss wants to call the model once a microbatch, but for one it "
                "returned without; write model(...) in the loss"
            )
        return result

    def _loss(self, result: Any, part: Args) -> Tensor:
        rows, share = rows_in(part, self.ranks), self.world // self.ranks
        if any(map(_torch_stages.is_fake, tree.leaves(result))):
            raise LossError(
                "the loss depends on something that another stage computed; compute it "
                "from what model(...) returns, without hidden states or attentions"
            )
        value, scale, out = self.weigh(self.state, result, part, rows, share)
        self.outs.append(out)
        half = value.dtype in (torch.float16, torch.bfloat16)
        wide = value.float() if half else value
        scaled = wide * (scale * self.world)
        return scaled.sum() if scaled.dim() else scaled

    def _sent(self, walk: Walk) -> tuple[Tensor, ...]:
        apart = self.stages.spec.schedule in HALVES  # which detaches it in place
        known = {id(one) for one in walk.received}

        def one(t: Tensor) -> Tensor:
            t = t.contiguous()
            if t.is_floating_point() and not t.requires_grad:
                return t.detach().clone().requires_grad_()
            return t.clone() if apart or id(t) in known else t

        return tuple(map(one, walk.sent))


def settled(inner: Engine) -> Callable[[Any, Tensor | float], None]:
    """`settle` of a model in stages whose copies `inner` reduces."""

    def settle(state: State, scale: Tensor | float) -> None:
        here: Placed = state.slots["shard_model"]
        stages = stages_of(state)
        if _gathers(here):
            _torch_stages.fsdp_reduce(state.model)
        if stages.tensors:
            tensors.as_weights(state)
        if _gathers(here):  # which has had the gradients to itself until now
            _meet(stages, state)
        tie(stages, state)
        _all_used(stages, state, here)
        if inner.name == "ddp" and not _gathers(here):
            _reduced(state, here)
        inner.settle(state, scale)

    return settle


def _meet(stages: Stages, state: State) -> None:
    """Tell the other stages which gradients there are."""
    numbers = torch.tensor(without(stages, state), device=stages.env.device)
    comm.sum_scalars(stages.env, numbers)
    stages.met.missing, *lacking = numbers.tolist()
    stages.met.lacking = tuple(lacking)


def tie(stages: Stages, state: State) -> None:
    """Add up the gradients of weights that several stages have."""
    weights = dict(state.trained)
    for (name, ranks), lacking in zip(
        stages.ties.items(), stages.met.lacking, strict=True
    ):
        p = weights.get(name)
        if p is None or lacking == len(ranks):
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        local = _torch.local_of(p.grad) if _torch.is_dtensor(p.grad) else p.grad
        flat = local.contiguous().to(stages.env.device)
        dist().all_reduce(flat, group=stages.groups[ranks])
        local.copy_(flat)


def _all_used(stages: Stages, state: State, here: Placed) -> None:
    """Raise on all stages where one has a weight without a gradient."""
    if here.unused == "allow":
        return
    met = stages.met
    pairs = zip(stages.ties.values(), met.lacking, strict=True)
    if met.missing or any(lacking == len(ranks) for ranks, lacking in pairs):
        missing = [n for n, p in state.trained if p.grad is None]
        each = comm.gather_objects(stages.env, missing)
        if any(each):
            raise placed.unused([n for names in each for n in names], here)
    placed.all_used(state)  # what a pass has taken away since


def _reduced(state: State, here: Placed) -> None:
    """The mean of gradients over copies; what one copy alone used is used by all."""
    if here.unused == "allow":
        used = torch.tensor([float(p.grad is not None) for _, p in state.trained])
        used = used.to(here.env.device)
        comm.sum_scalars(here.env, used)
        for (_, p), some in zip(state.trained, used.tolist(), strict=True):
            if some and p.grad is None:
                p.grad = torch.zeros_like(p)
    slices, rest = whole.parted(plain.gradients(state))  # those that stages share too
    whole.reduce([*slices, *rest], here.env)


def clipped(inner: Engine) -> Callable[[Any, float | None], Tensor]:
    """`clip` over all stages; weights that several of them have count once."""

    def clip(state: State, limit: float | None) -> Tensor:
        stages = stages_of(state)
        ours = tuple(
            (name, p)
            for name, p in state.trained
            if stages.ties.get(name, (stages.env.rank,))[0] == stages.env.rank
        )
        # a stage may have nothing that is trained, or tied weights alone, and no dtype
        own = torch.zeros(())
        if any(p.grad is not None for _, p in ours):
            own = inner.clip(attrs.evolve(state, trained=ours), None)
        square = own.to(stages.env.device, widest(stages.env.device)).square()
        comm.sum_scalars(stages.env, square)
        norm = square.sqrt()
        if limit is not None:
            for grads in whole.parted(plain.gradients(state)):
                if grads:
                    factor = plain.shrink(norm, limit)
                    factor = factor.to(grads[0].device, grads[0].dtype)
                    _torch.scale_(grads, factor)
        return norm

    return clip
