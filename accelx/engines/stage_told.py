"""What the last stage tells the others: the report of a step, or who has failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from accelx import comm
from accelx.cut import add, mean_of
from accelx.engines.stage_homes import owner
from accelx.engines.stage_line import Line, line
from accelx.env_device import widest
from accelx.errors import CollectiveError
from accelx.records import Env, Mean, Out

if TYPE_CHECKING:
    from accelx.engines.stage_step import Job
    from accelx.engines.stages import Stages
    from accelx.state import State

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def told(stages: Stages, job: Job) -> Out:
    """The last stage's report on all stages; raises on all where one has failed.

    Which gradients there are travels along.
    """
    env, last = stages.env, stages.homes.count - 1
    src = owner(last, env.world, stages.spec.schedule)
    out, numbers = _report(job, env.rank == src)
    numbers += without(stages, job.state)
    assert job.line is not None
    summed = job.line.add(numbers)
    failed, total, weight, bare, aux, kind, missing, *lacking = summed
    stages.met.missing, stages.met.lacking = missing, tuple(lacking)
    if failed:
        _raise(env, job.failure)
    given = comm.broadcast(env, out and out.aux, src) if aux else None
    if out is not None:
        return out
    loss = torch.tensor(total, dtype=DTYPES[int(kind)], device=env.device)
    if bare:
        count = int(weight) if weight.is_integer() else weight
        return Out(loss / (weight or 1), count, aux=given)
    heavy = torch.tensor(weight, dtype=widest(env.device), device=env.device)
    return Out(Mean(loss, heavy), heavy, aux=given)  # type: ignore[reportArgumentType]


def ahead(stages: Stages) -> Line:
    """The line on which `told` will be."""
    return line(stages.env, 7 + len(stages.ties))


def _report(job: Job, last: bool) -> tuple[Out | None, list[float]]:
    """What the last stage tells: the report, and it in numbers, after a failure."""
    if last and job.failure is None:
        try:
            out = add(job.outs)
            mean = mean_of(out)
            total = torch.as_tensor(mean.total)
            bare, more = not isinstance(out.loss, Mean), out.aux is not None
            kind = DTYPES.index(total.dtype)
            each = (float(total), float(mean.weight), float(bare), float(more))
            return out, [0.0, *each, float(kind)]
        except Exception as error:  # told to all stages, which would wait for ever
            job.failure = error
    return None, [float(job.failure is not None), *[0.0] * 5]


def _raise(env: Env, failure: Exception | None) -> None:
    mine = failure and f"{type(failure).__name__}: {failure}"
    texts = comm.gather_objects(env, mine)
    if failure is not None:
        raise failure
    rank, text = next((r, t) for r, t in enumerate(texts) if t is not None)
    raise CollectiveError(
        f"every stage wants to compute its part, but rank {rank} of the axis stage "
        f"failed: {text}"
    )


def without(stages: Stages, state: State) -> list[float]:
    """How many weights have no gradient here; then for each tied weight, if it has."""
    without = [name for name, p in state.trained if p.grad is None]
    if not without:  # as always
        return [0.0] * (1 + len(stages.ties))
    tied = [float(name in without) for name in stages.ties]
    return [float(len(without)) - sum(tied), *tied]
