"""Each rank's rows of each global batch."""

from __future__ import annotations

from typing import Any

import attrs

from accelx.permutation import check_seed
from accelx.records import Env, Pass, Rules, Transform, check_env, code


@attrs.frozen(repr=False)
class ShardLoader:
    """Spec of shard_loader."""

    env: Env
    seed: int = 0
    ragged: bool = False

    def __repr__(self) -> str:
        return code("shard_loader", self)


def shard_loader(env: Env, seed: int = 0, *, ragged: bool = False) -> Transform:
    """Give each rank its rows of each batch: every sample once, in seeded order (L10).

    The loader's `batch_size` is the global batch, whatever the number of ranks. A
    shuffled loader's order depends on `seed` and the epoch alone. In a pipeline any
    batch size works on any number of ranks, and so does a short last batch: `step`
    weighs rows.

    Alone, `shard_loader(env)(loader)` is an iterable for a loop of your own, whose loss
    knows no weights: batches that do not divide over ranks are refused, unless
    `ragged=True` says that the loop sums and counts for itself, as evaluation does.
    Neutral (L4). Raises DataError for loaders that cannot be cut exactly.
    """
    check_env("shard_loader", env)
    check_seed(seed)
    spec = ShardLoader(env, seed, ragged)

    def placed(loader: Any) -> Any:
        return attrs.evolve(
            loader,
            seed=seed,
            rank=env.rank,
            world=env.world,
            device=env.device,
            env=env,
        )

    def alone(source: Any) -> Any:
        from accelx.loader import as_loader
        from accelx.loader_epochs import Epochs

        return Epochs(placed(as_loader(source)), ragged=ragged)

    rules = Rules(once=True, why="the data is divided over ranks once")
    return Transform(
        (
            Pass(
                "shard_loader",
                spec,
                feed=placed,
                alone=alone,
                rules=rules,
                neutral=True,
            ),
        )
    )
