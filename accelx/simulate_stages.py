"""A stage of a model on a simulated rank: nobody hears what it sends, or answers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import attrs
from torch import Tensor

from accelx import _torch, _torch_simulate, _torch_stages
from accelx.cut import Args
from accelx.engines import stage_step
from accelx.engines.stage_told import without
from accelx.records import Engine, Loss, Out
from accelx.rows import Rows
from accelx.simulate_live import Live
from accelx.simulate_wire import Kept, Sent
from accelx.state import State


def unheard(engine: Engine) -> Engine:
    """The engine of stages, whose last one reports to nobody: it knows no loss."""

    def through(loss: Loss, weigh: Any) -> Any:
        run = stage_step.passed(loss, weigh)

        def grads(state: Any, args: Args, rows: Rows) -> tuple[Any, Out]:
            job = run(state, args, rows)
            if job.failure is not None:
                raise job.failure
            met = stage_step.stages_of(state).met  # nobody has said otherwise
            met.missing, *lacking = without(job.stages, state)
            met.lacking = tuple(lacking)
            return state, Out(0.0, 0)

        return grads

    return attrs.evolve(engine, through=through)


class SentOn(Sent):
    """As Sent, where operations meet shapes of other stages: a shape comes of it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """`func` with tensors of one mode."""
        mode = self.live.mode
        args, kwargs = _torch_simulate.one_mode(mode, args, kwargs or {})
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for vote in _torch_simulate.votes(func, args):
            vote.fill_(1)  # other stages know their shapes
        return result


def receiving(live: Live, kept: Kept) -> AbstractContextManager[None]:
    """Inside, what a schedule makes to receive into has no numbers, and is counted."""

    def made(tensor: Tensor) -> None:
        kept.others.add(_torch.storage_id(tensor))
        live.held(tensor.untyped_storage())

    return _torch_simulate.receiving(live.mode, made)


def received(state: State) -> int:
    """Bytes that the schedules of a model in stages keep to receive into."""
    stages = state.slots["shard_model"].stages
    pipes = [pipe for _, made in stages.routes.values() for pipe in made.values()]
    buffers = [one for p in pipes for one in _torch_stages.pipe_buffers(p.schedule)]
    stored = {_torch.storage_id(one): one.untyped_storage() for one in buffers}
    return sum(storage.nbytes() for storage in stored.values())
