"""Which engine places a model, and with what."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from accelx.engines import options as settings
from accelx.engines.options import KINDS, Hook, Options, PowerSGD
from accelx.env_part import MODEL, sums_env
from accelx.errors import CollectiveError, PlacementError
from accelx.match import Selector
from accelx.records import Env, Pass, Precision, Rules, Transform, check_env, code
from accelx.transform import identity

__all__ = ["KINDS", "PowerSGD", "ShardModel", "placing", "shard_model"]

Selectors = Selector | Iterable[Selector]


def _kept(selectors: Selectors | None) -> Any:
    if selectors is None or isinstance(selectors, str | type) or callable(selectors):
        return selectors
    return tuple(selectors)


def _named(methods: str | Iterable[str]) -> tuple[str, ...]:
    return (methods,) if isinstance(methods, str) else tuple(methods)


def _read(config: Any) -> Any:
    """A configuration as a dict, out of a JSON file where its path is given."""
    if config is None:
        return None
    said: Any = config
    if isinstance(config, str | os.PathLike):
        try:
            said = json.loads(Path(config).read_text())  # type: ignore[reportUnknownArgumentType]
        except (OSError, ValueError) as error:
            raise PlacementError(
                f"shard_model(config=...) wants a dict or the path of a JSON file, got "
                f"{str(config)!r}, which cannot be read ({error}); write "  # type: ignore[reportUnknownArgumentType]
                'config={"zero_optimization": {"stage": 2}}'
            ) from error
    if not isinstance(said, Mapping):
        raise PlacementError(
            f"shard_model(config=...) wants a dict of settings, got {said!r}"
            f"{'' if said is config else f' in {config}'}; write "
            'config={"zero_optimization": {"stage": 2}}'
        )
    return dict(said)  # type: ignore[reportUnknownArgumentType]


def _where(offload: bool | str) -> bool | str:
    return "cpu" if offload is True else offload


@attrs.frozen(repr=False)
class ShardModel:
    """Spec of shard_model."""

    env: Env
    kind: str = "ddp"
    blocks: Any = attrs.field(default=None, converter=_kept)
    unused: str = "error"
    reshard_after_forward: bool | int = True
    offload: bool | str = attrs.field(default=False, converter=_where)
    ignored: Any = attrs.field(default=None, converter=_kept)
    prefetch: int = 0
    methods: tuple[str, ...] = attrs.field(default=(), converter=_named)
    hook: Hook | None = None
    static_graph: bool = False
    bucket_mb: float | None = attrs.field(
        default=None, converter=attrs.converters.optional(float)
    )
    stage: int | None = None
    config: Any = attrs.field(default=None, converter=_read)

    def __repr__(self) -> str:
        return code("shard_model", self)

    @property
    def options(self) -> Options:
        """All but env, kind, blocks and unused."""
        return Options(*(getattr(self, f.name) for f in attrs.fields(Options)))

    @property
    def engine(self) -> Any:
        """The engine that this will be."""
        from accelx.engines import deepspeed, fsdp, plain, replicate, xla

        if self.kind == "xla":
            return xla.ENGINE
        if sums_env(self.env).world == 1:
            return plain.ENGINE
        engines = {
            "ddp": replicate.ENGINE,
            "fsdp2": fsdp.ENGINE,
            "hsdp": fsdp.HYBRID,
            "deepspeed": deepspeed.ENGINE,
        }
        return engines[self.kind]


def shard_model(
    env: Env,
    kind: str = "ddp",
    blocks: Selectors | None = None,
    *,
    unused: str = "error",
    reshard_after_forward: bool | int = True,
    offload: bool | str = False,
    ignored: Selectors | None = None,
    prefetch: int = 0,
    methods: str | Iterable[str] = (),
    hook: Hook | None = None,
    static_graph: bool = False,
    bucket_mb: float | None = None,
    stage: int | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> Transform:
    """Place the model on the ranks of `env`: object, class and names stay (L8).

    kind: "ddp" keeps a copy on each rank, "fsdp2" slices of weights, gradients and
    optimizer state, "hsdp" copies over the axis replicate, each in slices over shard,
    "deepspeed" what ZeRO `stage` 0 to 3 (2) slices, with a `config` of its settings; on
    one rank these are the plain model. "xla": one process, all its XLA devices.
    `blocks` are gathered one at a time: a glob over names of modules, a class or a
    function (name, module) -> bool. Rank 0's weights and buffers count on every rank. A
    model given as a function is sliced while it is made, where it is to be: no rank
    holds it whole, and its numbers are those of calling the function. `unused="allow"`
    accepts trainable parameters without a gradient; by default they are an error with
    names. `methods` are what a loss may call beside forward: "encode".

    The rest are options of one kind or two, in docs/sharding.md; one of another kind is
    refused. A `hook` of ddp sends gradients in fewer bits: "bf16", "fp16", "powersgd",
    PowerSGD(rank, start).

    Alone, `shard_model(env)(model)` returns the placed model for a loop of your own,
    with gradients averaged over ranks by `loss.backward()`. Neutral (L4), but for a
    hook. Effects: moves the model, collectives. Raises PlacementError. Li et al. 2020
    (DDP, arXiv:2006.15704); Zhao et al. 2023 (FSDP, arXiv:2304.11277); Rajbhandari et
    al. 2020 (ZeRO, arXiv:1910.02054).
    """
    check_env("shard_model", env)
    spec = ShardModel(
        *(env, kind, blocks, unused, reshard_after_forward, offload, ignored),
        *(prefetch, methods, hook, static_graph, bucket_mb, stage, config),
    )
    settings.one_of("shard_model(unused=...)", unused, ("error", "allow"))
    settings.check(env, kind, spec.blocks, spec.options)
    return Transform((_pass(spec),))


_RULES = (
    Rules(once=True, why="a model is placed once, by one engine"),
    Rules(after=("quantize",), why="weights are packed before they are sent and cut"),
)


def _pass(spec: ShardModel) -> Pass:
    def place(state: Any, tx: Transform) -> Any:
        from accelx.state import with_slot

        placed = placing(state.model, spec, tx, alone=False)
        state = attrs.evolve(state, model=placed.model)
        return with_slot(state, "shard_model", placed)

    one = Pass(
        "shard_model",
        spec,
        place=place,
        start=_begin if spec.kind in settings.WITH_OPTIMIZERS else None,
        alone=lambda model: placing(model, spec, identity, alone=True).model,
        rules=_RULES,
        neutral=spec.hook is None,
    )
    return attrs.evolve(one, **_noted()) if spec.kind == "xla" else one


def _begin(state: Any, tx: Transform) -> Any:
    """Let the engine have the optimizers, where it wants them."""
    begin = state.slots["shard_model"].begin
    return state if begin is None else begin(state, tx)


def _noted() -> dict[str, Any]:
    """The arrows of a pass whose engine notes operations, and runs them together."""
    from accelx.engines import xla

    why = "XLA compiles the whole step, and keeps or computes again what it likes"
    return {
        "forward": xla.apart,
        "done": xla.ended,
        "rules": (*_RULES, Rules(excludes=("compile", "remat"), why=why)),
    }


def _plan(spec: ShardModel, tx: Transform, alone: bool) -> Any:
    """How the chain wants it; refuses what does not fit before a model is made."""
    from accelx.engines import deepspeed, float8, placed

    _ready(spec.env)
    _divided(spec.env, tx)
    over = sums_env(spec.env)
    settings.laid_out(over, spec.kind, spec.env)
    precise = tx.find("with_precision")
    wanted: Precision | None = None if precise is None else precise.precision
    float8.check(wanted, spec.env.device, spec.kind)
    fills = placed.promises(tx, "load_weights", "load_state")
    # not load_state: a checkpoint may be of some weights on top of others, as they were
    blank = placed.promises(tx, "load_weights")
    plan = placed.Plan(
        *(over, spec.blocks, spec.unused, wanted, alone, fills, blank),
        kind=spec.kind,
        options=spec.options,
        everyone=spec.env,
        tensors=_spread(tx, "shard_tensors"),
        experts=_spread(tx, "shard_experts"),
    )
    if spec.kind in settings.WITH_OPTIMIZERS:
        deepspeed.check(plan, tx)
    return plan


def placing(thing: Any, spec: ShardModel, tx: Transform, alone: bool) -> Any:
    """Place a module, or what a function makes: the Placed record."""
    from torch import nn

    from accelx.engines import copies, experts, hooks, placed, stages, tensors

    plan = _plan(spec, tx, alone)
    over = plan.env
    cut = tx.find("shard_stages")
    if cut is not None and cut.ranks > 1:
        known = isinstance(thing, nn.Module)
        result = stages.place(thing if known else lambda: _module(thing), cut, plan)
        placed.seal(result.model)
        return result
    if plan.tensors is not None:
        tensors.agrees(plan)
    if plan.experts is not None:
        experts.agrees(plan)
    whole = _whole(plan)
    if over.world > 1:
        hooks.warn_of_memory(spec.hook, tx)
    if isinstance(thing, nn.Module):
        model = thing
    elif not callable(thing):
        raise TypeError(
            f"wanted a torch.nn.Module or a function that makes one, got "
            f"{type(thing).__name__}; write `lambda: Net(...)`"
        )
    elif whole:
        model = _module(thing)
    else:
        result = _deferred(plan)(lambda: _module(thing), plan)
        placed.seal(result.model)
        return result
    placed.claim(model, spec.env, plan.fills)
    placed.check(model, plan)
    if whole:
        copies.furnish(model, spec.env.device)
    result = _placer(plan)(model, plan)
    placed.seal(result.model)
    return result


def _module(factory: Callable[[], Any]) -> Any:
    from torch import nn

    model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model function returned {type(model).__name__}, not a "
            "torch.nn.Module; write `lambda: Net(...)`"
        )
    return model


def _placer(plan: Any) -> Any:
    from accelx.engines import deepspeed, fsdp, replicate, xla

    if plan.kind == "xla":
        return xla.place
    if plan.tensors is not None or plan.experts is not None:
        return fsdp.place
    if plan.env.world == 1:
        return _plain
    places = {"ddp": replicate.place, "deepspeed": deepspeed.place}
    return places.get(plan.kind, fsdp.place)


def _whole(plan: Any) -> bool:
    """Whether every rank makes the model in full."""
    from accelx.engines import deepspeed

    if plan.tensors is not None or plan.experts is not None:
        return False
    if plan.env.world == 1:
        return True
    cut = plan.kind == "deepspeed" and deepspeed.cuts(plan)
    return plan.kind in settings.WHOLE and not cut


def _deferred(plan: Any) -> Any:
    from accelx.engines import deepspeed, fsdp

    one = deepspeed if plan.kind == "deepspeed" else fsdp
    return one.place_deferred


def _spread(tx: Transform, name: str) -> Any:
    """The spec of a pass that lays weights out itself, where it has ranks for that."""
    spec = tx.find(name)
    return None if spec is None or spec.over.world == 1 else spec


def _divided(env: Env, tx: Transform) -> None:
    """Refuse ranks that share rows where no pass divides the work among them."""
    for axis in env.axes:
        name = MODEL.get(axis.name)
        if axis.size > 1 and name is not None and tx.find(name) is None:
            raise PlacementError(
                f"the {axis.size} ranks along the axis {axis.name} share the rows of a "
                f"batch, so the chain wants {name}, which has them share the work; add "
                f"it, or call the axis data: ranks along that get rows of their own"
            )


def _plain(model: Any, plan: Any) -> Any:
    from accelx import dtypes
    from accelx.engines import placed

    model.to(plan.env.device)
    dtypes.cast(model, plan.precision)
    return placed.Placed(placed.ALONE, plan.env, model, unused=plan.unused)


def _ready(env: Env) -> None:
    if env.alone:
        raise CollectiveError(
            f"shard_model wants every rank, but rank {env.rank} is alone inside "
            "on_main; place the model outside it"
        )
    import torch.distributed as dist

    if env.world > 1 and not dist.is_initialized():
        raise PlacementError(
            f"shard_model wants connected ranks, but this Env of {env.world} ranks has "
            "no process group; write env = accelx.connect()"
        )
