"""A model that is cut into stages: which rank has what of it, placed as one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from accelx import _torch, _torch_stages, deferred, dtypes
from accelx.comm_wire import dist
from accelx.engines import (
    copies,
    experts,
    fsdp,
    placed,
    plain,
    stage_step,
    suited,
    tensors,
)
from accelx.engines.placed import Placed, Plan
from accelx.engines.stage_homes import (
    Homes,
    balanced,
    holders,
    homes,
    named,
    owner,
    weights_in,
)
from accelx.engines.stage_pipe import HALVES, SINGLE
from accelx.engines.stage_route import Sketch, Way, guide, ran, sketched
from accelx.engines.stage_seen import seen
from accelx.engines.stage_shapes import costed, shape
from accelx.engines.stage_weights import guard
from accelx.env_part import along, parts
from accelx.errors import PlacementError
from accelx.records import Env
from accelx.saves.spread import Absent

if TYPE_CHECKING:
    from accelx.state import State

Ranks = tuple[int, ...]


@attrs.frozen(eq=False)
class Stages:
    """What the ranks of a pipeline know of it."""

    spec: Any  # of shard_stages
    env: Env  # the ranks along the axis
    everyone: Env
    homes: Homes
    model: nn.Module
    sketch: Sketch
    way: Way
    ties: Mapping[str, Ranks]  # weights of several ranks along the axis, and of which
    groups: Mapping[Ranks, Any]
    tensors: bool = False  # whether shard_tensors cuts what a stage has
    routes: dict[Any, Any] = attrs.field(factory=dict)
    seen: dict[Any, Any] = attrs.field(factory=dict)  # the same, of evaluation
    met: stage_step.Met = attrs.field(factory=stage_step.Met)


def place(thing: nn.Module | Callable[[], nn.Module], spec: Any, plan: Plan) -> Placed:
    """Cut a model, or what a function makes, into stages, and place this rank's part.

    Rank 0's numbers count. What other stages have is let go of; of what a function
    makes it is never there. Effects: collectives of all ranks.
    """
    recorder = None
    if isinstance(thing, nn.Module):
        model = thing
    else:
        model, recorder = deferred.build(thing)
    placed.claim(model, plan.everyone, plan.fills)
    placed.check(model, plan)
    if recorder is not None or plan.env.world > 1:  # weights are made anew then
        suited.in_slices(model)
    _possible(spec, plan)
    env = along(plan.everyone, "stage")
    cut = homes(model, *_starts(model, spec, env))
    sources = copies.tensors(model)
    blank = placed.filled(model, plan.blank)
    if recorder is not None:
        copies.empty(model)
    dtypes.cast(model, plan.precision)
    gathered = plan.precision if _gathers(plan) else None
    sketch = sketched(model, cut, env.device, gathered)
    shape(sketch, plan)
    held = holders(model, cut, lambda s: owner(s, env.world, spec.schedule))
    ties = _ties(model, held, env)
    if recorder is None:
        _from_main(model, plan)
    fulls = copies.tensors(model)
    kept = {id(t) for _, t in fulls if not held[id(t)] or env.rank in held[id(t)]}
    gone = {name for name, t in fulls if id(t) not in kept}
    for name in gone:
        _drop(model, name)
    way = Way()
    result = _within(model, plan)
    if recorder is not None:
        told = [(n, t) for n, t in sources if id(t) not in blank]
        _fill(model, told, gone, recorder, plan)
    _share_buffers(model, sketch)
    guide(model, cut, way)
    guard(model, gone, way)
    stages = Stages(
        *(spec, env, plan.everyone, cut, model, sketch, way, ties),
        _groups(plan.everyone, env, ties),
        plan.tensors is not None,
    )
    way.outside = seen(stages)
    return _engine(result, stages)


def _from_main(model: nn.Module, plan: Plan) -> None:
    """Give every rank rank 0's numbers, in place."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            copies.from_main(tensor, plan.everyone.device)


def _starts(
    model: nn.Module, spec: Any, env: Env
) -> tuple[list[str], list[str] | None]:
    """The first modules of stages, and with a sample the order in which parts run."""
    each, ranks = (1 if spec.schedule in SINGLE else 2), env.world
    even = spec.split == "balanced"
    if even:
        starts = balanced(model, ranks * each, weights_in(model))
    else:
        one = isinstance(spec.split, str)
        starts = named(model, [spec.split] if one else spec.split)
    _enough(spec, starts, ranks, each)
    if spec.sample is None:
        return starts, None
    sketch = sketched(model, homes(model, starts), env.device)
    costed(sketch.model)
    args, kwargs = ((), spec.sample) if _is_words(spec.sample) else (spec.sample, {})
    costs = ran(sketch, lambda m: m(*args, **kwargs))
    if even:
        starts = balanced(model, ranks * each, lambda name: costs.get(name, 0.0))
    return starts, list(costs)


def _is_words(sample: Any) -> bool:
    return isinstance(sample, Mapping)


def _enough(spec: Any, starts: list[str], ranks: int, each: int) -> None:
    count = len(starts) + 1
    exact = spec.schedule in SINGLE or spec.schedule == "zbv"
    if count % ranks or count < ranks * each or (exact and count > ranks * each):
        wanted = f"{ranks * each}"
        wanted = wanted if exact else f"{wanted} or another multiple of {ranks}"
        raise PlacementError(
            f"schedule={spec.schedule!r} on {ranks} ranks along the axis stage wants "
            f"{wanted} stages, but split names {len(starts)} modules, which makes "
            f'{count}; name {ranks * each - 1} of them, or write split="balanced"'
        )


def _possible(spec: Any, plan: Plan) -> None:
    """Refuse what cannot be put together, before anything is moved."""
    if not _torch_stages.greets():
        raise PlacementError(
            "shard_stages wants a torch whose stages send what their neighbours await, "
            f"as 2.13 does, got {torch.__version__}, in which they abort; install "
            '"torch>=2.13", or leave shard_stages out'
        )
    options = plan.options
    odd = [n for n in ("hook", "bucket_mb") if getattr(options, n) is not None]
    odd += ["static_graph"] if options.static_graph else []
    odd += ["methods"] if options.methods else []
    if odd:
        raise PlacementError(
            f"a model in stages is reduced once a step, which {odd[0]}= of shard_model "
            "has no part in; leave it out, or leave shard_stages out"
        )
    if plan.kind not in ("ddp", "fsdp2", "hsdp"):
        raise PlacementError(
            f'stages are placed as "ddp", "fsdp2" or "hsdp", got {plan.kind!r}; write '
            'shard_model(env, "fsdp2")'
        )
    if plan.tensors is not None:
        tensors.agrees(plan)
    if plan.experts is not None:
        experts.agrees(plan)
    if spec.schedule in HALVES and _gathers(plan):
        kind = plan.kind if plan.experts is None else "shard_experts"
        raise PlacementError(
            f"schedule={spec.schedule!r} computes gradients of weights apart from the "
            f"others, for which {kind} would have gathered them no more; write "
            'shard_model(env, "ddp") without experts, or schedule="interleaved"'
        )


def _gathers(plan: Plan) -> bool:
    """Whether FSDP2 places what a rank has: in slices, or some of it in copies."""
    return plan.env.world > 1 and (plan.kind != "ddp" or plan.experts is not None)


def _ties(model: nn.Module, held: Mapping[Any, Any], env: Env) -> dict[str, Ranks]:
    """Weights that several ranks along the axis hold, by first name."""
    every = tuple(range(env.world))
    found: dict[str, Ranks] = {}
    for name, p in model.named_parameters():
        ranks = held[id(p)] or every
        if len(ranks) > 1:
            found[name] = ranks
    return found


def _groups(everyone: Env, env: Env, ties: Mapping[str, Ranks]) -> dict[Ranks, Any]:
    """A process group for each set of ranks that has weights together."""
    axes = everyone.axes
    columns = parts(axes, ["stage"])
    mine: dict[Ranks, Any] = {}
    for ranks in sorted(set(ties.values())):
        for column in columns:
            members = [column[r] for r in ranks]
            made = dist().new_group(members)
            if everyone.rank in members:
                mine[ranks] = made
    return mine


def _drop(model: nn.Module, name: str) -> None:
    """Take a weight or buffer out of the tree; what says so stands in its place."""
    where, _, leaf = name.rpartition(".")
    module = model.get_submodule(where)
    old: Tensor = getattr(module, leaf)
    delattr(module, leaf)
    setattr(module, leaf, Absent(name, old.shape, old.dtype, old.device))


def _share_buffers(model: nn.Module, sketch: Sketch) -> None:
    """Give the sketch the numbers of buffers that no stage has to itself."""
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if sketch.homes.of(name.rpartition(".")[0]) is None:
            copies.put(sketch.model, name, buffer.detach().clone())


def _within(model: nn.Module, plan: Plan) -> Placed:
    """This rank's part placed over the ranks that have the same part; memory for it."""
    if _gathers(plan):
        axes = [axis.name for axis in plan.everyone.axes if axis.name != "stage"]
        near = along(plan.everyone, *axes)
        result = fsdp.sharded(model, attrs.evolve(plan, everyone=near))
        away = bool(plan.options.offload)
        device = plan.env.device
        copies.furnish(model, lambda t: "cpu" if away and _is_slice(t) else device)
        return result
    inside = plan.tensors is not None
    if inside:
        tensors.split(model, plan)
    copies.furnish(model, plan.env.device)
    if any(str(t.device) != plan.env.device for _, t in copies.tensors(model)):
        model.to(plan.env.device)  # which would refuse shapes alone
    engine = tensors.ENGINE if inside else placed.ALONE
    if plan.env.world > 1:
        engine = attrs.evolve(tensors.ENGINE if inside else plain.ENGINE, name="ddp")
    return Placed(
        *(engine, plan.env, model),
        handle=tensors.counted(model, plan) if inside else None,
        drifting=placed.drifting(model, plan.env),
        unused=plan.unused,
    )


def _is_slice(tensor: Tensor) -> bool:
    return _torch.is_dtensor(tensor)


def _fill(
    model: nn.Module,
    sources: list[tuple[str, Tensor]],
    gone: set[str],
    recorder: deferred.Recorder,
    plan: Plan,
) -> None:
    """Write rank 0's numbers where they are held; every rank hears all in turn."""
    device, seen = plan.env.device, set[int]()
    names: dict[int, list[str]] = {}
    for name, source in sources:
        names.setdefault(id(source), []).append(name)
    for _, source in sources:
        if source.is_meta or id(source) in seen:
            continue
        seen.add(id(source))
        main = plan.everyone.main
        full = recorder.full(source) if main else torch.empty_like(source)
        full = full.to(device).clone()
        copies.from_main(full, device)
        if here := [name for name in names[id(source)] if name not in gone]:
            _write(copies.get(model, here[0]), full)


def _write(like: Any, full: Tensor) -> None:
    """Write `full`, or this rank's slice of it, into a weight or buffer."""
    with torch.no_grad():
        if _torch.is_dtensor(like):
            full, like = map(_torch.local_of, (fsdp.cut(full, like), like))
        like.copy_(full)


def _engine(result: Placed, stages: Stages) -> Placed:
    inner = result.engine
    engine = attrs.evolve(
        inner,
        settle=stage_step.settled(inner),
        clip=stage_step.clipped(inner),
        through=stage_step.through,
        carry=None,
    )
    return attrs.evolve(result, engine=engine, stages=stages, fork=_no_fork)


def _no_fork(state: State) -> State:
    raise PlacementError(
        "fork wants a copy that steps as the state does, but a model in stages is tied "
        "to the ranks of its pipeline; save_state it, and load_state into a second"
    )
