"""Which layouts are run, in which processes, and what is made of what they find."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

import attrs
import torch

from accelx import testing
from accelx.equivalences import causes, trace
from accelx.equivalences.case import Build
from accelx.equivalences.narrow import narrowed
from accelx.equivalences.report import Layout, Parting, Report, Row
from accelx.records import Env

TOLERANCE = {torch.float64: 1e-9}  # of others, and of a model's own dtype: LOOSE
LOOSE = 1e-4
NARROW = (
    "the model computes in {} inside, so differences up to {:g} pass for rounding; "
    "write tol= to hold it to less"
)


@attrs.frozen(eq=False)
class Settings:
    """How a comparison is made."""

    steps: int
    tol: float | None  # None: what the dtype, and what the model does inside, ask for
    dtype: torch.dtype | None
    blocks: Any
    plan: Any
    timeout: float


def layouts(
    ranks: Iterable[int], kinds: Iterable[str], micro: Iterable[int]
) -> list[Layout]:
    """Every layout, on one rank without a kind, in the order given."""
    kinds, micro = tuple(kinds), tuple(micro)
    found = [
        Layout(world, "plain" if world == 1 else kind, n)
        for world, kind, n in itertools.product(ranks, kinds, micro)
    ]
    return list(dict.fromkeys(found))


def compare(build: Build, each: list[Layout], settings: Settings) -> Report:
    """Run the judge and every layout. Raises RankError if the judge fails."""
    _imported()
    [(judged, inside)] = _on(1, settings, lambda env: _judge(env, build, settings))
    notes = (NARROW.format(inside, LOOSE),) if inside else ()
    if settings.tol is None:
        limit = None if inside or not settings.dtype else TOLERANCE.get(settings.dtype)
        settings = attrs.evolve(settings, tol=limit or LOOSE)
    rows = list[Row]()
    for world, group in itertools.groupby(each, key=lambda layout: layout.ranks):
        rows += _rows(world, list(group), build, judged, settings)
    report = Report(tuple(rows), (), settings.steps, settings.tol or 0.0, notes)
    if all(row.equal or row.error for row in rows):
        return report
    return attrs.evolve(report, causes=tuple(_causes(build, each, settings)))


def _imported() -> None:
    """Load what forked ranks would each load by themselves: 3 s of torch."""
    for name in ("fsdp", "tensor.parallel"):
        import_module(f"torch.distributed.{name}")
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # brings torch's compiler


def _on(world: int, settings: Settings, fn: Callable[[Env], Any]) -> list[Any]:
    """Every rank's result of `fn`, without the warnings of each of them."""

    def quiet(env: Env) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fn(env)

    return testing.run(world, timeout=settings.timeout)(quiet)()


def _judge(env: Env, build: Build, settings: Settings) -> Any:
    """The steps of one process, and the dtype that it rounds to inside, if it does."""
    dtype, strict = settings.dtype, settings.tol is None
    try:
        judged = trace.judge(env, build, settings.steps, dtype)
        if dtype is None or not strict:
            return judged, ""
        return judged, narrowed(env, build, dtype)
    except RuntimeError as error:
        if settings.dtype is not None and "dtype" in str(error):
            error.add_note(
                f"the comparison runs in {settings.dtype}, which this model does not "
                "take; write check_equivalence(build, dtype=None) for its own"
            )
        raise


def _rows(
    world: int,
    group: list[Layout],
    build: Build,
    judged: tuple[trace.Step, ...],
    settings: Settings,
) -> list[Row]:
    """The rows of layouts on as many ranks: one launch, or one each if that fails."""

    def ranks(env: Env) -> list[list[Parting]]:
        return [trace.partings(env, one, build, judged, settings) for one in group]

    found, error = list[Any](), ""
    try:
        found = _on(world, settings, ranks)
    except testing.RankError as failure:
        error = _short(str(failure))
    if error and len(group) == 1:
        return [Row(group[0], {}, (), error)]
    if error:  # outside the handler: the next ranks would have its error as a context
        each = [_rows(world, [one], build, judged, settings) for one in group]
        return [row for rows in each for row in rows]
    return [
        _row(layout, [p for rank in found for p in rank[i]], settings.tol or 0.0)
        for i, layout in enumerate(group)
    ]


def _row(layout: Layout, found: Sequence[Parting], tol: float) -> Row:
    each = list(found)
    return Row(layout, trace.largest(each), trace.firsts(each, tol))


def _short(text: str) -> str:
    """Who failed, and each error of the traceback, the root cause first."""
    words = ("Traceback", "During handling", "The above exception")
    lines = [line for line in text.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith((" ", *words))]
    return "\n".join(dict.fromkeys(told))


def _causes(build: Build, each: list[Layout], settings: Settings) -> list[str]:
    dtype, tol = settings.dtype, settings.tol or 0.0
    most = max(layout.ranks for layout in each)
    try:
        [found] = _on(1, settings, lambda env: causes.probe(env, build, dtype, tol))
        alone = _on(most, settings, lambda env: causes.alone(env, build, dtype))
    except testing.RankError as error:  # the differences stand, whatever their cause
        return [
            f"not found, since the loss fails when tried again: {_short(str(error))}"
        ]
    return causes.sentences(found, alone, tol)
