"""What placing a model leaves behind, and what must hold before and after it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from accelx.comm_wire import group
from accelx.engines import kept, methods, plain, suited, whole
from accelx.engines.options import Options
from accelx.env_device import widest
from accelx.errors import NeutralityWarning, PlacementError, UnusedParameterError
from accelx.match import Selector, select
from accelx.records import Engine, Env, Precision, Transform
from accelx.state import Transient

if TYPE_CHECKING:
    from accelx.saves.flat import Flat
    from accelx.state import State


Fills = Callable[[str], bool]  # whether a weight, by name, is filled by a later pass


def nothing(name: str) -> bool:
    """The Fills of a chain that loads nothing."""
    return False


@attrs.frozen
class Plan:
    """How a model is to be placed."""

    env: Env
    blocks: Selector | tuple[Selector, ...] | None
    unused: str  # "error" or "allow"
    precision: Precision | None
    alone: bool = False  # for a loop of the user's own, without a State
    fills: Fills = nothing  # what may be on the meta device
    blank: Fills = nothing  # what is overwritten unseen: its numbers need not be made
    kind: str = "ddp"
    options: Options = attrs.field(factory=Options)
    everyone: Env = attrs.field(factory=Env)  # also ranks that share rows with this one
    tensors: Any = None  # the spec of shard_tensors
    experts: Any = None  # the spec of shard_experts


@attrs.frozen(eq=False)
class Placed(Transient):
    """The slot "shard_model": the engine, and what it needs at each step."""

    engine: Engine
    env: Env
    model: nn.Module
    handle: Any = None  # the engine's own object
    trainable: tuple[tuple[str, Any], ...] = ()  # in the order that DDP counts them
    # modules with running statistics, which each rank takes from its own rows
    drifting: tuple[nn.Module, ...] = ()
    unused: str = "error"
    fork: Callable[[State], State] | None = None
    rest: Callable[[], None] = lambda: None  # make parameters what optimizers see
    forget: Callable[[], None] = lambda: None  # drop what a failed backward left
    begin: Callable[[State, Transform], State] | None = None  # with the optimizers
    # by id: weights that lie otherwise than they look. Optimizers over what has names
    flat: Callable[[], Mapping[int, Flat]] = dict
    seen: Callable[[State], tuple[Any, ...]] = lambda state: state.optimizers
    written: Callable[[], None] = lambda: None  # weights were written from outside
    # what the engine has in memory beside: part, name, tensor
    inside: Callable[[], Iterable[tuple[str, str, Tensor]]] = tuple
    # writes a checkpoint of the engine's own: state, folder, name in it
    export: Callable[[State, str, str], None] | None = None
    stages: Any = None  # what ranks know of a pipeline, of which this one has a part


UNPLACED = Placed(plain.ENGINE, Env(), nn.Module())
"""What there is to know of a state whose model no pass has placed."""


def engine_of(state: State) -> Engine:
    """The engine of a state; the plain one where no pass has placed the model."""
    return state.slots.get("shard_model", UNPLACED).engine


def promises(tx: Transform, *names: str) -> Fills:
    """Which weights the passes of those names give numbers, or raise."""
    specs = [spec for spec in map(tx.find, names) if spec is not None]
    return lambda name: any(spec.fills(name) for spec in specs)


def filled(model: nn.Module, fills: Fills) -> set[int]:
    """ids of the weights and persistent buffers that `fills` takes by any name."""
    named = model.state_dict(keep_vars=True)
    return {id(tensor) for name, tensor in named.items() if fills(name)}


def claim(model: nn.Module, env: Env, fills: Fills = nothing) -> None:
    """Refuse a module that is placed already, or whose weights are nowhere.

    What a later pass `fills` may be on the meta device.
    """
    if suited.is_placed(model):
        raise PlacementError(
            f"this {type(model).__name__} has been placed already, and placing changes "
            "it in place; make a new module, or copy a state with ax.fork(state)"
        )
    named = [*model.named_parameters(), *model.named_buffers()]
    hollow = {name: t for name, t in named if t.device.type == "meta"}
    known = filled(model, fills) if hollow else set[int]()
    lost = [name for name, tensor in hollow.items() if id(tensor) not in known]
    if lost:
        shown = ", ".join(lost[:8]) + (f" and {len(lost) - 8} more" if lost[8:] else "")
        raise PlacementError(
            f"{shown} of this {type(model).__name__} are on the meta device, and "
            "nothing in the chain gives them numbers: load_weights(url) and "
            "load_state(env, url) do it for weights and persistent buffers; give the "
            f"function that makes the model: lambda: {type(model).__name__}(...)"
        )
    devices = {p.device for p in model.parameters()} - {torch.device("meta")}
    wrong = sorted(str(d) for d in devices if d.type != "cpu" and str(d) != env.device)
    if wrong:
        raise PlacementError(
            f"this rank's device is {env.device}, but the {type(model).__name__} has "
            f"weights on {', '.join(wrong)}; leave it on the CPU and accelx moves it"
        )


def check(model: nn.Module, plan: Plan) -> None:
    """Refuse what is wrong in every kind: names that this model has not, too."""
    if plan.everyone.world > 1:
        suited.over_ranks(model)
    if plan.alone and plan.kind in ("fsdp2", "hsdp"):
        suited.unheld(model, plan.kind)
    select(model, plan.blocks)
    whole.ignored(model, plan.options.ignored)
    methods.owners(model, plan.options.methods)


def seal(model: nn.Module) -> None:
    """Mark `model` as placed, and all in it. Copies of them are not."""
    for module in model.modules():
        object.__setattr__(module, "_accelx_placed", id(module))


def blueprint(model: nn.Module) -> nn.Module:
    """A copy of `model` without data: its tensors are on the meta device, ties kept."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)


def drifting(model: nn.Module, env: Env) -> tuple[nn.Module, ...]:
    """Modules whose statistics each rank takes from its own rows; warns about them."""
    names = across(model)
    if names and env.world > 1:
        warnings.warn(
            f"{', '.join(names[:5])} normalise over the rows of one rank, so numbers "
            f"depend on the {env.world} ranks; ax.step averages running statistics, "
            "and in a loop of your own each rank keeps its own. Write GroupNorm or "
            "LayerNorm, or on GPUs "
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)",
            NeutralityWarning,
            stacklevel=2,
        )
    return drifters(model)


def across(model: nn.Module) -> list[str]:
    """Modules that normalise over the rows that one rank has at once."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    named = model.named_modules()
    return [n for n, m in named if isinstance(m, kinds) or _drifts(m)]


def drifters(model: nn.Module) -> tuple[nn.Module, ...]:
    """Modules that keep running statistics."""
    return tuple(m for m in model.modules() if _drifts(m))


def statistics(modules: Iterable[nn.Module]) -> tuple[Tensor, ...]:
    """The buffers of running statistics that these have now."""
    return tuple(
        b for m in modules for b in m.buffers(recurse=False) if b.is_floating_point()
    )


def _drifts(module: nn.Module) -> bool:
    tracks = bool(getattr(module, "track_running_stats", False))
    return tracks and not isinstance(module, nn.SyncBatchNorm)


def average(modules: tuple[nn.Module, ...], env: Env) -> None:
    """Take the mean of the statistics of `modules` over ranks, in one collective."""
    # read anew: placing, loading and `to` put other tensors in place of buffers
    buffers = statistics(modules)
    if not buffers:
        return
    import torch.distributed as dist

    wide = widest(env.device)
    flat = torch.cat([b.detach().to(wide).flatten() for b in buffers])
    dist.all_reduce(flat, group=group(env, "average"))
    flat /= env.world
    for b, new in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        b.copy_(new.view_as(b))


def all_used(state: State) -> None:
    """Raise UnusedParameterError with the names of parameters without a gradient."""
    for _, p in state.trained:
        if p.grad is None:
            break
    else:  # as always: 0.1 us a parameter
        return
    placed: Placed = state.slots["shard_model"]
    kept.as_at_init(state, every=False)
    missing = [n for n, p in state.trained if p.grad is None]
    if missing and placed.unused == "error":
        raise unused(missing, placed)


def _settle_alone(state: State, scale: Tensor | float) -> None:
    all_used(state)
    if not (isinstance(scale, float) and scale == 1.0):
        plain.settle(state, scale)


ALONE = attrs.evolve(plain.ENGINE, settle=_settle_alone)
"""The plain engine for a model placed on one rank: it asks what others ask."""


def unused(
    names: list[str], placed: Placed, allowed: bool = True
) -> UnusedParameterError:
    """The error that says which parameters got no gradient, and what to do."""
    alone = placed.engine is ALONE
    kind = "" if alone else f', "{placed.engine.name}"'
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
    known = dict(placed.model.named_parameters(remove_duplicate=False))
    if all(n in known and not known[n].requires_grad for n in names):
        return UnusedParameterError(
            f"{shown} {'were' if names[1:] else 'was'} trainable at ax.init and "
            f"{'are' if names[1:] else 'is'} frozen now; freeze before ax.init, in the "
            "function that makes the model, or write "
            f'shard_model(env{kind if allowed else ""}, unused="allow")'
        )
    return UnusedParameterError(
        f"{len(names)} trainable parameter{'s' * (len(names) > 1)} got no gradient on "
        f"rank {placed.env.rank}: {shown}. Use them in the loss, or freeze them before "
        "ax.init (parameter.requires_grad_(False)), or write "
        f'shard_model(env{kind if allowed else ""}, unused="allow")'
    )
