"""Which ranks hold which experts of a mixture (expert parallel)."""

from __future__ import annotations

from typing import Any

import attrs

from accelx.engines.options import placed_too
from accelx.env_part import INNER, along, innermost
from accelx.match import Selector
from accelx.records import Env, Pass, Rules, Transform, check_env, code

__all__ = ["ShardExperts", "shard_experts"]


@attrs.frozen(repr=False)
class ShardExperts:
    """Spec of shard_experts."""

    env: Env
    experts: Any = "auto"  # a selector of modules

    def __repr__(self) -> str:
        return code("shard_experts", self)

    @property
    def over(self) -> Env:
        """The ranks that each hold some of the experts."""
        if self.env.world == 1:
            return self.env
        axes = [one for one in self.env.axes if one.name in INNER and one.size > 1]
        return along(self.env, *[one.name for one in axes] or ["expert"])


def shard_experts(env: Env, experts: Selector = "auto") -> Transform:
    """Deal the experts of a mixture out over the axis `expert` (expert parallel).

    Each of these ranks holds some experts, gets rows of its own, and sends each token
    to the ranks of its experts and back. Beside shard_tensors experts are dealt out
    over the axis `tensor`, too: its ranks have the same tokens, and send a share each;
    or positions of their own, where its plan says "partial" of the experts.
    `experts` selects the modules that hold them: each parameter has one expert a row,
    and forward takes tokens (T, width), the experts of each (T, k) and their weights
    (T, k), and returns (T, width), as those of transformers do; "auto" finds these.
    What a module computes for a token must not depend on the others that it is given.

    Other weights, and each expert over the other axes, lie as shard_model says: "ddp",
    "fsdp2" or "hsdp". Neutral (L4), and object, class and names stay (L8). Effects: as
    shard_model, which the chain must have; in each call of such a module two exchanges,
    and a gather along `tensor`. Raises PlacementError for modules of another form, or
    experts that do not divide. Lepikhin et al. 2020 (arXiv:2006.16668).
    """
    check_env("shard_experts", env)
    spec = ShardExperts(env, experts)
    innermost("shard_experts", env, "expert")
    return Transform((_pass(spec),))


def _pass(spec: ShardExperts) -> Pass:
    def place(state: Any, tx: Transform) -> Any:
        placed_too("shard_experts", tx)
        return state

    def start(state: Any, tx: Transform) -> Any:
        if spec.over.world == 1:  # what is wrong on many ranks is wrong on one
            from accelx.engines.experts import chosen

            chosen(state.model, spec.experts, 1)
        return state

    return Pass(
        "shard_experts",
        spec,
        place=place,
        start=start,
        rules=Rules(once=True, why="an expert is on one rank of the axis"),
        neutral=True,
    )
