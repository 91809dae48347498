"""The run of one process by torch alone, and how far that of a layout lies from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from accelx._torch import is_dtensor
from accelx.env import connect
from accelx.env_part import rows_env
from accelx.equivalences.case import Build, batches, built, feeding
from accelx.equivalences.report import WHATS, Layout, Parting, allowed
from accelx.equivalences.settings import AXES
from accelx.gradients import read
from accelx.passes.accumulate import accumulate
from accelx.passes.shard_model import shard_model
from accelx.passes.shard_sequence import shard_sequence
from accelx.passes.shard_tensors import shard_tensors
from accelx.records import Env, Mean, Transform
from accelx.rng import seed
from accelx.run import apply, grads, init
from accelx.transform import chain, identity

SMALL = 1e-3  # a loss below it is held to its size


@attrs.frozen(eq=False)
class Step:
    """What one step of one process leaves."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def judge(
    env: Env, build: Build, steps: int, dtype: torch.dtype | None
) -> tuple[Step, ...]:
    """The steps of a plain loop over whole batches."""
    case = built(env, build, dtype)
    model = case.made()
    optimizers = case.optim(model)
    optimizers = optimizers if isinstance(optimizers, list | tuple) else [optimizers]
    trace = list[Step]()
    for number, batch in enumerate(batches(env, case, steps)):
        seed(env, number)
        model.zero_grad(set_to_none=True)
        loss = value_of(case.loss(model, batch))
        loss.backward()
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        found = {n: p.grad.clone() for n, p in named if p.grad is not None}
        for one in optimizers:  # type: ignore[reportUnknownVariableType]
            one.step()
        left = {n: p.detach().clone() for n, p in named}
        trace.append(Step(loss.item(), _norm(found), found, left))
    return tuple(trace)


def value_of(result: Any) -> Any:
    """The scalar that a loss function means."""
    value, _ = read(result)
    return value.total / value.weight if isinstance(value, Mean) else value


def _norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors.values()))


def partings(
    env: Env, layout: Layout, build: Build, judged: tuple[Step, ...], settings: Any
) -> list[Parting]:
    """Every difference from the judge on this rank, of each kind and step the largest.

    Those of parameters and gradients name the first that is beyond the tolerance.
    """
    case = built(env, build, settings.dtype)
    if axes := AXES.get(layout.kind):
        env = connect(env, axes=axes)
    tx = chain(
        placing(env, layout, settings),
        accumulate(layout.micro) if layout.micro > 1 else identity,
        feeding(env, case),
    )
    state = init(tx, case.source, case.optim)
    first, second = grads(tx, case.loss), apply(tx)
    found = list[Parting]()
    rows = batches(rows_env(env), case, len(judged), feeding(env, case))
    each = zip(judged, rows, strict=True)
    for number, (wanted, batch) in enumerate(each):
        seed(env, number)
        state, out = first(state, batch)
        near = _Near(number, env.rank, settings.tol)
        found.append(near.number("loss", wanted.loss, float(out.loss), SMALL))
        named = [(n, p.grad) for n, p in state.trained if p.grad is not None]
        whole = dict(_whole(named))
        found.append(near.tensors("gradient", wanted.gradients, whole))
        found.append(near.number("norm", wanted.norm, _norm(whole), 0.0))
        del whole
        state, out = second(state, out)
        whole = dict(_whole([(n, p.detach()) for n, p in state.trained]))
        found.append(near.tensors("parameter", wanted.parameters, whole))
    return found


def placing(env: Env, layout: Layout, settings: Any) -> Transform:
    """The passes that place the model; none on one rank."""
    if env.world == 1:
        return identity
    if layout.kind == "tensor":
        return chain(shard_tensors(env, settings.plan), shard_model(env))
    if layout.kind == "sequence":
        return chain(shard_sequence(env), shard_model(env))
    return shard_model(env, layout.kind, settings.blocks)


def _whole(named: list[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in full: a collective where it is sharded."""
    for name, tensor in named:
        whole = tensor.full_tensor() if is_dtensor(tensor) else tensor
        yield name, whole.cpu()


@attrs.frozen
class _Near:
    """How far two numbers, or sets of tensors, lie apart at one step on one rank."""

    step: int
    rank: int
    tol: float

    def number(self, what: str, wanted: float, got: float, least: float) -> Parting:
        size = max(abs(wanted), least) or 1.0
        gap = _finite(abs(wanted - got) / size)
        return Parting(what, self.step, self.rank, "", wanted, got, gap)

    def tensors(
        self, what: str, wanted: dict[str, Tensor], got: dict[str, Tensor]
    ) -> Parting:
        """The first tensor beyond the tolerance, with the gap of the farthest."""
        tops = [t.abs().max().item() for t in wanted.values() if t.numel()]
        size = max(tops, default=0.0) or 1.0
        each = [(n, *_apart(wanted.get(n), got.get(n), size)) for n in wanted | got]
        far = [one for one in each if one[3] > allowed(what, self.tol)]
        name, one, other, _ = (far or each or [("", 0.0, 0.0, 0.0)])[0]
        gap = max((one[3] for one in each), default=0.0)
        return Parting(what, self.step, self.rank, name, one, other, gap)


def _apart(
    wanted: Tensor | None, got: Tensor | None, size: float
) -> tuple[float, float, float]:
    """The entries that lie farthest apart, and how far; none is as good as zeros."""
    one = torch.zeros(()) if wanted is None else wanted
    other = torch.zeros_like(one) if got is None else got
    one = torch.zeros_like(other) if wanted is None else one
    if not one.numel():
        return 0.0, 0.0, 0.0
    apart = (one.double() - other.double()).abs().flatten().nan_to_num(nan=math.inf)
    at = int(apart.argmax())
    ends = one.flatten()[at].item(), other.flatten()[at].item()
    return *ends, _finite(apart[at].item() / size)


def _finite(gap: float) -> float:
    return math.inf if math.isnan(gap) else gap


def largest(found: list[Parting]) -> dict[str, float]:
    """The largest gap of each kind."""
    return {w: max((p.gap for p in found if p.what == w), default=0.0) for w in WHATS}


def firsts(found: list[Parting], tol: float) -> tuple[Parting, ...]:
    """Of each kind the earliest parting beyond the tolerance, on the lowest rank."""
    order = {what: i for i, what in enumerate(WHATS)}
    far = [p for p in found if p.gap > allowed(p.what, tol)]
    far.sort(key=lambda p: (p.step, order[p.what], p.rank))
    kinds = {p.what: p for p in reversed(far)}
    return tuple(sorted(kinds.values(), key=lambda p: (p.step, order[p.what])))
