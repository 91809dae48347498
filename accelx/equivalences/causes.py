"""Why a run depends on where it runs: what can be told from the model and its loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import nn

from accelx.cut import pieces
from accelx.equivalences.case import Build, Case, built, cast, whole
from accelx.equivalences.trace import value_of
from accelx.gradients import read
from accelx.records import Env, Mean
from accelx.rng import seed
from accelx.rows import leading, rows_of

MOST = 5  # names in a sentence


@attrs.frozen
class Probe:
    """What one process found out about the model and the loss."""

    loss: float  # of the first batch, weights as made, from random numbers of seed 0
    finite: bool
    draws: tuple[float, float] | None  # losses of two seeds, in evaluation mode
    draws_training: tuple[float, float] | None  # the same in training mode
    parts: tuple[int, float] | None  # of so many parts the loss, in evaluation mode
    evaluated: float  # the loss in evaluation mode
    bare: bool  # whether the loss is a plain scalar
    couples: tuple[str, ...]  # modules that look at other rows in training
    drops: tuple[str, ...]  # modules that draw random numbers in training


def probe(env: Env, build: Build, dtype: torch.dtype | None, tol: float) -> Probe:
    """Try the loss of the first batch with other random numbers, and in parts."""
    case = built(env, build, dtype)
    model, batch = case.made(), cast(whole(case, 0), dtype)
    loss = _loss(case, model, batch, 0)
    training = _draws(lambda n: _loss(case, model, batch, n), tol)
    couples = _named(model, _couples)
    drops = _named(model, _drops)
    model.eval()
    draws = _draws(lambda n: _loss(case, model, batch, n), tol)
    evaluated = _loss(case, model, batch, 0)
    parts = None if draws else _in_parts(case, model, batch, evaluated, tol)
    with torch.no_grad():
        value, _ = read(case.loss(model, batch))
    bare = not isinstance(value, Mean)
    finite = math.isfinite(loss)
    return Probe(loss, finite, draws, training, parts, evaluated, bare, couples, drops)


def alone(env: Env, build: Build, dtype: torch.dtype | None) -> float:
    """The loss of the whole first batch on this rank, before anything is placed."""
    case = built(env, build, dtype)
    return _loss(case, case.made(), cast(whole(case, 0), dtype), 0)


def _loss(case: Case, model: nn.Module, batch: Any, number: int) -> float:
    seed(Env(), number)
    with torch.no_grad():
        return float(value_of(case.loss(model, batch)))


def _differ(one: float, other: float, tol: float) -> bool:
    return not abs(one - other) <= tol * max(abs(one), 1e-3)


def _draws(loss: Callable[[int], float], tol: float) -> tuple[float, float] | None:
    one, other = loss(0), loss(1)
    return (one, other) if _differ(one, other, tol) else None


def _in_parts(
    case: Case, model: nn.Module, batch: Any, wanted: float, tol: float
) -> tuple[int, float] | None:
    """In how many parts the loss is another one than of the batch, and which."""
    rows = leading(batch) or 0
    marked = rows_of(batch)
    if marked is not None and marked.rows != rows:  # rows that pad are a loader's
        return None
    for n in range(2, min(4, rows) + 1):
        sizes = [rows * (i + 1) // n - rows * i // n for i in range(n)]
        means = list[Mean]()
        for part, size in zip(pieces(batch, "", sizes), sizes, strict=True):
            with torch.no_grad():
                value, _ = read(case.loss(model, part))
            means.append(value if isinstance(value, Mean) else Mean.of(value, size))
        got = float(sum(means[1:], means[0]).value)
        if _differ(wanted, got, tol):
            return n, got
    return None


def _named(model: nn.Module, which: Callable[[nn.Module], bool]) -> tuple[str, ...]:
    """`name (Kind)` of the modules in training mode that `which` takes."""
    return tuple(
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if module.training and which(module)
    )


def _couples(module: nn.Module) -> bool:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return isinstance(module, kinds)


def _drops(module: nn.Module) -> bool:
    kinds = (
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        *(nn.AlphaDropout, nn.FeatureAlphaDropout),
    )
    if isinstance(module, kinds):
        return module.p > 0
    chance: object = getattr(module, "dropout", 0.0)  # attention and RNNs of torch
    return isinstance(module, nn.RReLU) or (isinstance(chance, float) and chance > 0)


def sentences(found: Probe, ranks: list[float], tol: float) -> list[str]:
    """What to tell of a difference: the likely causes and what to write instead."""
    told = list[str]()
    if not found.finite:
        told.append(
            f"the loss of the first batch is {found.loss} in one process already; "
            "ax.find_nonfinite(model) names the module"
        )
    far = [r for r, loss in enumerate(ranks) if _differ(found.loss, loss, tol)]
    if far and found.finite:
        told.append(
            f"the loss depends on the rank: with the same weights, batch and random "
            f"numbers it is {ranks[far[0]]:.8g} on rank {far[0]} and {found.loss:.8g} "
            "in one process; take out of build and loss what differs by rank"
        )
    if found.draws and found.finite:
        one, other = found.draws
        told.append(
            "the loss draws random numbers, in evaluation mode too: it is "
            f"{one:.8g} from one seed and {other:.8g} from another, and rows that are "
            "cut otherwise get other numbers; derive them from the row"
        )
    elif found.draws_training and found.finite:
        told.append(_of_drops(found))
    if found.couples:
        told.append(
            f"batch norm: {_list(found.couples)} takes its mean over the rows of one "
            "microbatch on one rank, so numbers depend on how rows are cut; write "
            "GroupNorm or LayerNorm, or put these modules in evaluation mode"
        )
    if found.parts and found.finite:
        told.append(_of_parts(found, *found.parts))
    return told


def _of_drops(found: Probe) -> str:
    names = _list(found.drops) if found.drops else "something in training mode"
    return (
        f"dropout: {names} draws random numbers in training, and rows that are cut "
        "otherwise get others; the runs are alike in distribution, not in number. "
        "Compare with a model whose dropout is 0"
    )


def _of_parts(found: Probe, n: int, got: float) -> str:
    if found.bare:
        return (
            "the loss is no mean over rows: of the batch it is "
            f"{found.evaluated:.8g}, of its {n} parts, weighed by their rows, "
            f"{got:.8g}; a mean over tokens or under a mask is written "
            "ax.Mean(total, weight), with the sum and the count"
        )
    return (
        "the total and weight of ax.Mean do not add up over rows: of the batch their "
        f"quotient is {found.evaluated:.8g}, of its {n} parts {got:.8g}; give sums "
        "over rows, not means, and no term that looks at other rows of the batch"
    )


def _list(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more
