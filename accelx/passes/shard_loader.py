"""Each rank's rows of each global batch."""

from __future__ import annotations

from typing import Any

import attrs

from accelx.env_part import rows_env
from accelx.permutation import check_seed
from accelx.records import Env, Pass, Rules, Transform, check_env, code


@attrs.frozen(repr=False)
class ShardLoader:
    """Spec of shard_loader."""

    env: Env
    seed: int = 0
    ragged: bool = False
    static_shapes: bool = False

    def __repr__(self) -> str:
        return code("shard_loader", self)


def shard_loader(
    env: Env, seed: int = 0, *, ragged: bool = False, static_shapes: bool = False
) -> Transform:
    """Give each rank its rows of each batch: every sample once, in seeded order (L10).

    The loader's `batch_size` is the global batch, whatever the number of ranks. A
    shuffled loader's order depends on `seed` and the epoch alone. In a pipeline any
    batch size works on any number of ranks, and so does a short last batch: `step`
    weighs rows.

    With `static_shapes` every batch has ceil(batch_size / world) rows on each rank, for
    compilers and XLA: real ones first, then rows that only pad. A loss then returns an
    `ax.Mean` weighed by `ax.row_weights(batch)`; a plain mean is refused.

    A stream, whose items have no index, is divided where it has shards for all ranks,
    or else read by rank 0; `state.slots["shard_loader"]` keeps where it stands.

    Alone, `shard_loader(env)(loader)` is an iterable for a loop of your own, whose loss
    knows no weights: batches that do not divide over ranks are refused, unless
    `ragged=True` says that the loop sums and counts for itself, as evaluation does.
    Neutral (L4). Raises DataError for loaders that cannot be cut exactly.
    """
    check_env("shard_loader", env)
    check_seed(seed)
    spec = ShardLoader(env, seed, ragged, static_shapes)
    rules = Rules(once=True, why="the data is divided over ranks once")
    one = Pass(
        "shard_loader",
        spec,
        start=lambda state, tx: _opened(spec, state),
        feed=lambda loader: _placed(spec, loader),
        alone=lambda source: _alone(spec, source),
        rules=rules,
        neutral=True,
    )
    return Transform((one,))


def _placed(spec: ShardLoader, loader: Any) -> Any:
    """A Loader or a Stream as this rank reads it."""
    env = rows_env(spec.env)
    placed = attrs.evolve(
        loader,
        seed=spec.seed,
        rank=env.rank,
        world=env.world,
        device=env.device,
        env=env,
    )
    return placed.with_static_shapes() if spec.static_shapes else placed


def _alone(spec: ShardLoader, source: Any) -> Any:
    from accelx.data.stream_epochs import StreamEpochs
    from accelx.data.stream_record import Stream
    from accelx.loader import as_loader
    from accelx.loader_epochs import Epochs

    made = _placed(spec, as_loader(source))
    if isinstance(made, Stream):
        return StreamEpochs(made, ragged=spec.ragged)
    return Epochs(made, ragged=spec.ragged)


def _opened(spec: ShardLoader, state: Any) -> Any:
    from accelx.data.stream_state import Reading
    from accelx.state import with_slot

    return with_slot(state, "shard_loader", Reading(rows_env(spec.env)))
