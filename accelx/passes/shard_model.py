"""Which engine places a model, and with what."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import attrs

from accelx.errors import CollectiveError, PlacementError
from accelx.match import Selector
from accelx.records import Env, Pass, Precision, Rules, Transform, check_env, code
from accelx.transform import identity

KINDS = ("ddp", "fsdp2")


@attrs.frozen(repr=False)
class ShardModel:
    """Spec of shard_model."""

    env: Env
    kind: str = "ddp"
    blocks: Any = None
    unused: str = "error"

    def __repr__(self) -> str:
        return code("shard_model", self)

    @property
    def engine(self) -> Any:
        """The engine that this will be."""
        from accelx.engines import fsdp, plain, replicate

        if self.env.world == 1:
            return plain.ENGINE
        return {"ddp": replicate.ENGINE, "fsdp2": fsdp.ENGINE}[self.kind]


def shard_model(
    env: Env,
    kind: str = "ddp",
    blocks: Selector | Iterable[Selector] | None = None,
    *,
    unused: str = "error",
) -> Transform:
    """Place the model on the ranks of `env`: object, class and names stay (L8).

    kind: "ddp" keeps a copy on each rank, "fsdp2" slices of weights, gradients and
    optimizer state; on one rank both are the plain model. `blocks` are the submodules
    that fsdp2 gathers one at a time: a glob over names such as "layers.*", a class or a
    function (name, module) -> bool. Rank 0's weights and buffers count on every rank.
    A model given as a function is, under fsdp2, sliced while it is made: no rank holds
    it whole, and its numbers are those of calling the function. `unused="allow"`
    accepts trainable parameters that get no gradient; by default they are an error with
    names.

    Alone, `shard_model(env)(model)` returns the placed model for a loop of your own,
    with gradients averaged over ranks by `loss.backward()`. Neutral (L4). Effects:
    moves the model, collectives. Raises PlacementError. Li et al. 2020 (DDP,
    arXiv:2006.15704); Zhao et al. 2023 (FSDP, arXiv:2304.11277).
    """
    check_env("shard_model", env)
    _choice("shard_model(env, kind)", kind, KINDS)
    _choice("shard_model(unused=...)", unused, ("error", "allow"))
    kept = blocks if blocks is None or _single(blocks) else tuple(blocks)  # type: ignore[reportGeneralTypeIssues]
    spec = ShardModel(env, kind, kept, unused)

    def place(state: Any, tx: Transform) -> Any:
        from accelx.state import with_slot

        placed = placing(state.model, spec, tx, alone=False)
        state = attrs.evolve(state, model=placed.model)
        return with_slot(state, "shard_model", placed)

    return Transform(
        (
            Pass(
                "shard_model",
                spec,
                place=place,
                alone=lambda model: placing(model, spec, identity, alone=True).model,
                rules=Rules(once=True, why="a model is placed once, by one engine"),
                neutral=True,
            ),
        )
    )


def _choice(where: str, got: str, choices: tuple[str, ...]) -> None:
    if got not in choices:
        near = difflib.get_close_matches(str(got).lower(), choices, 1, 0.5)
        raise PlacementError(
            f"{where} wants one of {', '.join(map(repr, choices))}, got {got!r}; "
            f"write {(near or choices[-1:])[0]!r}"
        )


def _single(blocks: object) -> bool:
    return isinstance(blocks, str | type) or callable(blocks)


def placing(thing: Any, spec: ShardModel, tx: Transform, alone: bool) -> Any:
    """Place a module, or what a function makes: the Placed record."""
    from torch import nn

    from accelx.engines import copies, fsdp, placed
    from accelx.match import select

    _ready(spec.env)
    precise = tx.find("with_precision")
    wanted: Precision | None = None if precise is None else precise.precision
    fills = placed.promises(tx, "load_weights", "load_state")
    # not load_state: a checkpoint may be of some weights on top of others, as they were
    blank = placed.promises(tx, "load_weights")
    plan = placed.Plan(spec.env, spec.blocks, spec.unused, wanted, alone, fills, blank)
    whole = spec.env.world == 1 or spec.kind != "fsdp2"
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
        result = fsdp.place_deferred(lambda: _module(thing), plan)
        placed.seal(result.model)
        return result
    placed.claim(model, spec.env, fills)
    select(model, spec.blocks)  # a selector that takes nothing is wrong in every kind
    if whole:
        copies.furnish(model, spec.env.device)
    result = _placer(spec)(model, plan)
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


def _placer(spec: ShardModel) -> Any:
    from accelx.engines import fsdp, replicate

    if spec.env.world == 1:
        return _plain
    return {"ddp": replicate.place, "fsdp2": fsdp.place}[spec.kind]


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
