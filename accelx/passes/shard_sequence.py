"""Which ranks share the tokens of the same rows, and how they attend over all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs

from accelx.env_part import along
from accelx.errors import PlacementError
from accelx.match import Selector
from accelx.records import Env, Loss, Pass, Rules, Transform, check_env, code

MODES = ("gather", "ulysses", "ring")
KINDS = ("ddp", "fsdp2", "hsdp")


def _kept(selectors: Any) -> tuple[Any, ...]:
    if isinstance(selectors, str | type) or callable(selectors):
        return (selectors,)
    return tuple(selectors)


def _listed(names: Any) -> tuple[Any, ...]:
    return (names,) if isinstance(names, str | int) else tuple(names)


@attrs.frozen(repr=False)
class ShardSequence:
    """Spec of shard_sequence."""

    env: Env
    mode: str = "gather"
    dim: int = 1
    tensors: tuple[str | int, ...] = attrs.field(default=(), converter=_listed)
    allow: tuple[Any, ...] = attrs.field(default=(), converter=_kept)

    def __repr__(self) -> str:
        return code("shard_sequence", self)


def shard_sequence(
    env: Env,
    mode: str = "gather",
    *,
    dim: int = 1,
    tensors: str | int | Iterable[str | int] = (),
    allow: Selector | Iterable[Selector] = (),
) -> Transform:
    """Divide long sequences: ranks along the axis "sequence" hold parts of the tokens.

    `env` is of `connect(axes="data=2,sequence=4")`. Ranks along "sequence" get the same
    rows; ahead of the loss, this pass cuts what of the batch has the sequence along
    `dim`, (rows, length, ...): `tensors`, by key or index, or else every tensor as long
    there as the first. In the loss and the model,
    torch.nn.functional.scaled_dot_product_attention then is exact over all tokens, with
    is_causal, a mask of keys, a mask (rows, length, length) from the batch, and grouped
    heads. mode "gather": keys and values come from all ranks at once; "ring": one rank
    after the other, without masks; in both, rank r of n holds the chunks r and 2n-1-r,
    so that looking back is the same work everywhere. "ulysses": tokens are traded for
    heads, which n must divide.

    The loss wants labels that were shifted where batches are made. A mean over tokens
    is `ax.Mean`, or a plain mean, as all ranks have as many. Positions come from the
    batch; models of transformers are given them. What would mix one rank's tokens is
    refused, as far as it can be seen: modules such as Conv1d, tables cut to the length,
    attention by hand, a shift. `allow` vouches for modules that need no other rank's
    tokens. Outside a step the model takes whole sequences.

    Neutral (L4). Effects: collectives in forward and backward. Raises PlacementError,
    DataError for lengths that do not divide, LossError. Korthikanti et al. 2022
    (arXiv:2205.05198); Jacobs et al. 2023 (Ulysses, arXiv:2309.14509); Liu et al. 2023
    (ring, arXiv:2310.01889); Dubey et al. 2024 (gather, arXiv:2407.21783, 3.3.2).
    """
    check_env("shard_sequence", env)
    if env.world > 1:
        along(env, "sequence")
    spec = ShardSequence(env, mode, dim, tensors, allow)
    _checked(spec)
    return Transform((_pass(spec),))


def _checked(spec: ShardSequence) -> None:
    if spec.mode not in MODES:
        raise PlacementError(
            f"shard_sequence(env, mode) wants one of {', '.join(map(repr, MODES))}, "
            f'got {spec.mode!r}; write "gather"'
        )
    if type(spec.dim) is not int or spec.dim < 1:
        raise PlacementError(
            "shard_sequence(dim=...) wants the dimension of tokens, behind that of "
            f"rows, got {spec.dim!r}; write dim=1"
        )


def _pass(spec: ShardSequence) -> Pass:
    env = along(spec.env, "sequence") if spec.env.world > 1 else spec.env
    rules = (
        Rules(once=True, why="a sequence is cut once, along one axis of ranks"),
        Rules(
            excludes=("with_local_sgd", "with_diloco", "compile"),
            why="the gradients of one row's tokens add up at each step, and attention "
            "over ranks has been shown to be exact in neither of them",
        ),
    )
    name = "shard_sequence"
    if env.world == 1:
        return Pass(name, spec, rules=rules, neutral=True)
    from accelx.engines.sequence import Layout, Site

    layout = Layout(env.rank, env.world, zigzag=spec.mode != "ulysses")
    site = Site(env, layout, spec.mode, spec.dim)
    return Pass(
        name,
        spec,
        place=lambda state, tx: _fitting(spec, state, tx),
        start=lambda state, tx: _started(spec, site, state),
        forward=lambda loss: _cutting(spec, site, loss),
        backward=lambda grads: _closing(site, grads),
        rules=rules,
        neutral=True,
    )


def _fitting(spec: ShardSequence, state: Any, tx: Transform) -> Any:
    """Refuse a chain that places the model in another way. Nothing is done yet."""
    placed = tx.find("shard_model")
    if placed is None or placed.env.axes != spec.env.axes:
        raise PlacementError(
            "shard_sequence wants the gradients of its ranks added up by shard_model "
            f"over the same axes, got {placed!r}; add shard_model(env) of the same env"
        )
    if placed.kind not in KINDS:
        raise PlacementError(
            f"shard_sequence wants shard_model(env, kind) with one of "
            f'{", ".join(map(repr, KINDS))}, got {placed.kind!r}; write "fsdp2"'
        )
    return state


def _started(spec: ShardSequence, site: Any, state: Any) -> Any:
    from accelx.engines.forwards import carried
    from accelx.engines.sequence_mode import dress
    from accelx.engines.sequence_transformers import prepare

    stages = state.slots["shard_model"].stages
    site.staged = stages is not None
    for model in (state.model, *([stages.sketch.model] if site.staged else ())):
        prepare(model, site)
        dress(model, site, spec.allow)
    return carried(state)


def _cutting(spec: ShardSequence, site: Any, loss: Loss) -> Loss:
    def over(model: Any, *args: Any) -> Any:
        import torch

        from accelx.engines.sequence import cut
        from accelx.engines.sequence_mode import Exchanged, attended, summed
        from accelx.engines.sequence_uneven import refuse
        from accelx.engines.stage_route import Through

        mine = cut(site, args, spec.tensors)
        site.attended = site.attended and site.staged
        try:
            with Exchanged(site):
                result = loss(model, *mine)
            attended(site, model)
            refuse(site, result)
        except Through:  # the rest is another stage's; backward is yet to come
            raise
        except BaseException:
            site.close()
            raise
        if torch.is_grad_enabled():
            return result  # backward computes again, perhaps; then the step closes it
        site.close()
        return summed(site, result)

    return over


def _closing(site: Any, grads: Any) -> Any:
    def run(state: Any, *args: Any) -> tuple[Any, Any]:
        try:
            return grads(state, *args)
        finally:
            site.close()

    return run
