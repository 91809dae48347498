"""Whether a user's own training computes the same wherever it runs, made checkable."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from accelx.equivalences.compare import Settings, compare, layouts
from accelx.equivalences.settings import checked, dtype_of

if TYPE_CHECKING:
    import torch

    from accelx.equivalences.report import Report

__all__ = ["check_equivalence"]


def check_equivalence(
    build: Callable[[], tuple[Any, Any, Any, Any]],
    *,
    ranks: Iterable[int] = (1, 2),
    kinds: Iterable[str] = ("ddp", "fsdp2"),
    micro: Iterable[int] = (1, 2),
    steps: int = 3,
    tol: float | None = None,
    dtype: torch.dtype | str | None = "float64",
    blocks: Any = None,
    plan: Any = "auto",
    timeout: float = 120.0,
) -> Report:
    """Train by `build` in many layouts and say where they part from one process.

    `build()` returns (model, optim, loss, data): a module or a function that makes one,
    a function of the placed model that makes its optimizers, `loss(model, batch)`, and
    a batch (a tree of tensors with rows), a function of the step that returns one, or a
    DataLoader. Batches are global. It is called in each process, from the same random
    numbers. The judge is a loop of torch alone over whole batches; each layout is
    compared with it at each step: the loss, every gradient, their norm, and every
    parameter after the update. Layouts are all of `ranks` x `kinds` x `micro`: CPU
    processes over gloo, microbatches by `accumulate`; `blocks` as in `shard_model`.
    Kinds are "ddp", "fsdp2", "hsdp" (two copies of slices), "tensor" (`shard_tensors`
    by `plan`) and "sequence" (`shard_sequence`), each over all ranks.

    A gap is relative: to the loss, the norm, the largest gradient, the largest
    parameter. More than `tol` parts, of parameters ten times that (Adam magnifies
    rounding): by default 1e-9 in float64, and 1e-4 else or where the model casts down
    inside. Model and batches are cast to `dtype`, so that rounding hides nothing; None
    leaves them.
    `timeout` in seconds holds for all layouts of as many ranks.

    The Report prints as a table with the first difference of each layout and likely
    causes; `report.equal` is the answer. Effects: processes, which are gone at the end.
    A layout that fails is a row with its error; a judge that fails raises RankError.
    """
    each = layouts(*checked(ranks, kinds, micro, steps))
    settings = Settings(steps, tol, dtype_of(dtype), blocks, plan, timeout)
    return compare(build, each, settings)
