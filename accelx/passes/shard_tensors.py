"""Which weights are cut inside a layer, and how (tensor parallel)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from accelx.engines.options import placed_too
from accelx.engines.tensor_words import STYLES, check_style, cuts_logits
from accelx.env_part import along, innermost
from accelx.errors import PlacementError
from accelx.records import Env, Pass, Rules, Transform, check_env, code

__all__ = ["STYLES", "ShardTensors", "shard_tensors"]


@attrs.frozen(repr=False)
class ShardTensors:
    """Spec of shard_tensors."""

    env: Env
    plan: Any = "auto"  # "auto", or pairs (glob, style)

    def __repr__(self) -> str:
        plan = self.plan if self.plan == "auto" else dict(self.plan)
        return code("shard_tensors", attrs.evolve(self, plan=plan))

    @property
    def over(self) -> Env:
        """The ranks that share each layer."""
        return self.env if self.env.world == 1 else along(self.env, "tensor")


def shard_tensors(env: Env, plan: str | Mapping[str, Any] = "auto") -> Transform:
    """Cut weights inside layers over the axis `tensor` of `env` (tensor parallel).

    `plan` maps globs over names of modules to styles: "column" cuts a Linear by its
    outputs, "row" by its inputs and adds up, so a column and a row after it need one
    sum; "embedding" cuts a table by its rows; "column_gather" gives outputs whole,
    and "row_whole" takes inputs so; "loss" leaves logits cut for `cross_entropy`. For
    sequence parallel "sequence" is a norm over a part of the positions, "row_scatter"
    and "embedding_scatter" cut what they give along dim 1, "scatter", "gather" and
    "sequence_gather" cut or join it.
    "partial" is a small weight that is used on each rank's own heads. A ParallelStyle
    of torch is taken too. What no glob names stays whole on each of these ranks.

    "auto" reads the plan of a transformers model, or finds the usual pairs of Linears.
    Works with any kind of shard_model over the other axes; ranks along `tensor` get the
    same rows. A module that is cut by "column" gives fewer features: write
    `view(..., -1, head_size)`, which counts the heads that are here.

    Neutral (L4), and object, class and names stay (L8). Effects: as shard_model, which
    the chain must have. Raises PlacementError where the plan does not fit the model.
    Shoeybi et al. 2019 (arXiv:1909.08053); Korthikanti et al. 2022 (arXiv:2205.05198).
    """
    check_env("shard_tensors", env)
    if isinstance(plan, str) and plan != "auto":
        raise PlacementError(
            f'shard_tensors(env, plan) wants "auto" or a mapping of globs to styles, '
            f'got {plan!r}; write {{"layers.*.up": "column", "layers.*.down": "row"}}'
        )
    pairs = plan if isinstance(plan, str) else tuple(plan.items())
    for _, style in () if isinstance(pairs, str) else pairs:
        check_style(style)
    spec = ShardTensors(env, pairs)
    innermost("shard_tensors", env, "tensor")
    return Transform((_pass(spec),))


def _pass(spec: ShardTensors) -> Pass:
    def place(state: Any, tx: Transform) -> Any:
        placed_too("shard_tensors", tx)
        return state

    def start(state: Any, tx: Transform) -> Any:
        if spec.over.world == 1:  # a plan that is wrong on many ranks is wrong on one
            from accelx.engines.tensor_plans import styles

            styles(state.model, spec.plan, 1, _dealt(state.model, tx))
        return state

    cut = spec.plan != "auto" and cuts_logits(style for _, style in spec.plan)
    return Pass(
        "shard_tensors",
        spec,
        place=place,
        start=start,
        forward=_forward if cut else None,
        backward=_backward if cut else None,
        rules=Rules(once=True, why="a weight is cut once"),
        neutral=True,
    )


def _dealt(model: Any, tx: Transform) -> list[Any]:
    """Modules that are not for a plan, since another pass deals them out."""
    from accelx.engines.experts import chosen

    spec = tx.find("shard_experts")
    return [] if spec is None else list(chosen(model, spec.experts, 1).values())


def _forward(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Losses of cut logits, made plain."""

    def plain(model: Any, *args: Any) -> Any:
        import torch

        from accelx.engines.tensors import Joined, joined, logits_cut

        if torch.is_grad_enabled():  # inside `_backward`
            with Joined():
                return joined(loss(model, *args))
        with Joined(), logits_cut(model):
            return joined(loss(model, *args))

    return plain


def _backward(grads: Callable[..., Any]) -> Callable[..., Any]:
    """Backward through `cross_entropy` of cut logits asks for its context, too."""

    def inside(state: Any, *args: Any) -> Any:
        from accelx.engines.tensors import logits_cut

        with logits_cut(state.model):
            return grads(state, *args)

    return inside
