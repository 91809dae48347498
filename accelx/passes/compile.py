"""Blocks that torch.compile makes faster, in place, with the compilations counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import attrs

from accelx.match import Selector
from accelx.records import Out, Pass, Rules, Transform, code
from accelx.state import State, Transient

if TYPE_CHECKING:
    from torch import nn


@attrs.frozen(repr=False)
class Compile:
    """Spec of compile."""

    blocks: Any = None
    options: tuple[tuple[str, Any], ...] = attrs.field(default=(), repr=False)

    def __repr__(self) -> str:
        given = "" if self.blocks is None else ", "
        each = [(name, getattr(v, "__qualname__", repr(v))) for name, v in self.options]
        rest = ", ".join(f"{name}={value}" for name, value in each)
        text = code("compile", attrs.evolve(self, options=()))
        text = text.replace("(blocks=", "(")
        return text[:-1] + (given + rest if rest else "") + ")"


@attrs.define(eq=False)
class Compiled(Transient):
    """The slot: how often torch compiled a block, and how often until the first update.

    A fork shares the count, as it shares the compiled code.
    """

    compilations: int = 0
    first: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        return self


def compile(
    blocks: Selector | Iterable[Selector] | None = None, **options: Any
) -> Transform:
    """Compile each of `blocks` by torch.compile when it is first called, in place.

    blocks: a glob over names such as "layers.*", a class, or a function (name, module)
    -> bool; None compiles the whole model. `options` are torch.compile's own: backend,
    mode, fullgraph, dynamic, options. Blocks of one class share their code. Hooks stay
    outside, so fsdp2 gathers and ddp reduces as without it; `remat` is compiled along.

    Another batch size is compiled once more, with a size that may vary from then on;
    sizes of 0 and 1, and evaluation, are compiled apart. Loaders with static shapes
    compile once. `ax.recompiles(state)` is how often torch compiled after the first
    update. Object, class and names stay (L8): no `_orig_mod.`; alone,
    `compile("layers.*")(model)` does so for a loop of your own. Neutral (L4), but fused
    code rounds otherwise, and draws other random numbers by the default backend. Raises
    TypeError for an option that torch.compile has not. The default backend wants a C++
    compiler. Ansel et al. 2024 (doi:10.1145/3620665.3640366).
    """
    _check(options)
    one = blocks is None or isinstance(blocks, str | type) or callable(blocks)
    kept: Any = blocks if one else tuple(blocks)  # type: ignore[reportOptionalIterable]
    spec = Compile(kept, tuple(sorted(options.items())))

    def start(state: Any, tx: Transform) -> Any:
        from accelx.engines.forwards import carried
        from accelx.state import with_slot

        counts = Compiled()
        _wrapped(spec, state.model, counts)
        return carried(with_slot(state, "compile", counts))

    why = "a block is compiled once; give all blocks in one compile"
    along = "what is compiled has the recomputing in it, and chooses what to keep"
    return Transform(
        (
            Pass(
                "compile",
                spec,
                start=start,
                after=_noted,
                alone=lambda model: _wrapped(spec, model, Compiled()),
                rules=(Rules(once=True, why=why), Rules(after=("remat",), why=along)),
                neutral=True,
            ),
        )
    )


def recompiles(state: State) -> int:
    """How often torch compiled a block of `compile` after the first update of a run.

    It stays 0, or small, in a run that is fast: each stands for seconds. It counts
    each batch size that was new, evaluation, and forks. 0 without `compile`.
    """
    slot: Compiled | None = state.slots.get("compile")
    if slot is None or slot.first is None:
        return 0
    return slot.compilations - slot.first


def _check(options: dict[str, Any]) -> None:
    import inspect

    import torch

    known = inspect.signature(torch.compile).parameters.keys() - {"model", "disable"}
    wrong = sorted(options.keys() - known)
    if wrong:
        raise TypeError(
            f"compile wants options of torch.compile, which has {', '.join(known)}; "
            f"got {', '.join(wrong)}; write compile('layers.*', fullgraph=True)"
        )


def _noted(state: Any, out: Out) -> tuple[Any, Out]:
    slot: Compiled = state.slots["compile"]
    if slot.first is None:
        slot.first = slot.compilations
    return state, out


def _wrapped(spec: Compile, model: Any, counts: Compiled) -> Any:
    from torch import nn

    from accelx.engines.forwards import wrap

    if not isinstance(model, nn.Module):
        raise TypeError(
            f"compile(blocks)(module) wants a torch.nn.Module, got "
            f"{type(model).__name__}; put it into a chain for ax.init, or write "
            'compile("layers.*")(Net(...))'
        )

    def around(inner: Any) -> Any:
        return _compiled(inner, spec, counts)

    wrap(model, spec.blocks, "compile", around, _shapes)
    return model


def _shapes(module: nn.Module) -> Any:
    """What code depends on: torch gives up on one that it compiled 8 times."""
    from accelx import _torch

    every = (*module.named_parameters(), *module.named_buffers())
    weights = tuple((n, t.shape, t.dtype, t.requires_grad) for n, t in every)
    return weights, _torch.hooks_inside(module)


def _compiled(inner: Any, spec: Compile, counts: Compiled) -> Callable[..., Any]:
    """`inner` compiled; torch runs `count` while it traces, and at no other time."""
    import torch

    @torch.compiler.assume_constant_result
    def count() -> int:
        counts.compilations += 1
        return 0

    def traced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = inner(self, *args, **kwargs)
        if (
            torch.compiler.is_compiling()
        ):  # at the end: a broken attempt counts for none
            count()
        return result

    # torch remembers compiled code by code object, and bounds how much
    traced.__code__ = traced.__code__.replace(co_name=f"compiled_{inner.__name__}")
    run: Any = torch.compile(traced, **dict(spec.options))

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs)

    return forward
