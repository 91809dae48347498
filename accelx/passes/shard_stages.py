"""The model cut into stages over ranks, at work on several microbatches at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs

from accelx.engines.stage_pipe import HALVES, SCHEDULES
from accelx.errors import PlacementError
from accelx.passes.accumulate import accumulate
from accelx.records import Env, Loss, Pass, Rules, Transform, check_env, code


def _kept(split: Any) -> Any:
    return split if isinstance(split, str) else tuple(split)


@attrs.frozen(repr=False)
class ShardStages:
    """Spec of shard_stages."""

    env: Env
    split: Any = attrs.field(converter=_kept)
    n: int
    schedule: str = "1f1b"
    sample: Any = attrs.field(default=None, eq=False, repr=False)

    def __repr__(self) -> str:
        return code("shard_stages", self)

    @property
    def ranks(self) -> int:
        """How many ranks have a part of the model each."""
        return next((a.size for a in self.env.axes if a.name == "stage"), 1)


def shard_stages(
    env: Env,
    split: str | Iterable[str],
    n: int,
    schedule: str = "1f1b",
    *,
    sample: Any = None,
) -> Transform:
    """Cut the model into stages over the axis stage of `env` (pipeline parallel).

    `env = connect(axes="data=-1,stage=2")`; shard_model in the same chain places each
    stage over the other ranks ("ddp", "fsdp2", "hsdp"), and shard_tensors may cut its
    layers, shard_sequence its tokens, shard_experts deal out its experts.

    split: the names, or globs that take one module each, of the first module of every
    later stage, "layers.2"; or "balanced": blocks of the longest list, by numbers of
    weights, or with a `sample` (a tuple of the model's arguments, or a dict) by
    floating-point operations. Modules belong to stages in the order in which they are
    registered, or with a sample run.

    n: at least so many microbatches, of equal size, are cut from a rank's rows; a
    memory and time dial that changes no number. schedule: "gpipe" or "1f1b" with one
    stage a rank; "interleaved", "looped_bfs" or "zero_bubble" with two or more; "zbv"
    with two, to and fro. On one rank along the axis it is accumulate(n).

    The loss stays yours, and calls the model once: up to there it runs on every stage,
    after it on the last. Every rank along the axis gets the same rows, and the same
    `Out`. A rank has its stage's weights alone, under their names (L8); ties over
    stages hold. What is saved is the whole model's. Neutral (L4). Raises PlacementError
    where the model cannot be cut so, LossError for a loss that calls it otherwise.
    Effects: collectives. Huang et al. 2019 (arXiv:1811.06965); Narayanan et al. 2021
    (arXiv:2104.04473); Qi et al. 2024 (arXiv:2401.10241).
    """
    check_env("shard_stages", env)
    _checked(split, n, schedule)
    spec = ShardStages(env, split, n, schedule, sample)
    return Transform((_pass(spec),))


def _checked(split: Any, n: Any, schedule: Any) -> None:
    if type(n) is not int or n < 1:
        raise ValueError(
            f"shard_stages(n=...) wants a whole number of microbatches of at least 1, "
            f"got {n!r}; write n=4, twice the stages or more"
        )
    if schedule not in SCHEDULES:
        raise ValueError(
            f"shard_stages(schedule=...) wants one of "
            f"{', '.join(map(repr, SCHEDULES))}, got {schedule!r}; write "
            'schedule="1f1b"'
        )
    names = [split] if isinstance(split, str) else list(split)
    if not names or not all(isinstance(one, str) and one for one in names):
        raise ValueError(
            f"shard_stages(split=...) wants names of modules, got {split!r}; write "
            'split="layers.2", a list of such, or "balanced"'
        )


def _pass(spec: ShardStages) -> Pass:
    def place(state: Any, tx: Transform) -> Any:
        placing = tx.find("shard_model")
        if placing is None or placing.env != spec.env:
            came = "no shard_model" if placing is None else "another env in it"
            raise PlacementError(
                f"shard_stages wants the ranks of a stage to be placed, but the chain "
                f'has {came}; add shard_model(env, "ddp") with the same env'
            )
        odd = [one.name for one in tx if one.name in ("compile", "remat")]
        if odd and spec.schedule in HALVES and spec.ranks > 1:
            raise PlacementError(
                f"schedule={spec.schedule!r} goes backward in two halves, which "
                f"{odd[0]} cannot; leave {odd[0]} out, or write "
                'schedule="interleaved"'
            )
        return state

    def backward(grads: Any) -> Any:
        cut = accumulate(spec.n).passes[0].backward
        assert cut is not None
        alone = cut(grads)

        def either(state: Any, *args: Any) -> Any:
            placed = state.slots["shard_model"]
            run = alone if placed.stages is None else grads
            return run(state, *args)

        return either

    apart = "ranks that train apart would have to agree stage by stage"
    return Pass(
        "shard_stages",
        spec,
        place=place,
        forward=_forward if spec.ranks > 1 else None,
        backward=backward,
        rules=(
            Rules(once=True, why="a model is cut into stages once"),
            Rules(excludes=("with_local_sgd", "with_diloco"), why=apart),
        ),
        neutral=True,
    )


def _forward(loss: Loss) -> Loss:
    from accelx.engines.stage_weights import in_loss

    return in_loss(loss)
