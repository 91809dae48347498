"""Which dtypes a run computes in, and the loss scale that float16 needs."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs

from accelx.errors import PrecisionError
from accelx.records import Loss, Out, Pass, Precision, Rules, Transform, amend, code


@attrs.frozen(repr=False)
class WithPrecision:
    """Spec of with_precision."""

    wanted: str | Precision

    def __repr__(self) -> str:
        return code("with_precision", self)

    @property
    def precision(self) -> Precision:
        """What was wanted, in full."""
        from accelx.dtypes import precision

        return precision(self.wanted)


def with_precision(wanted: str | Precision) -> Transform:
    """Compute in another dtype: "fp32", "bf16", "fp16", "fp8", or a Precision.

    "bf16" and "fp16" keep weights, gradients and optimizer state in float32, autocast
    the loss function, and reduce in float32; fsdp2 also gathers weights in the compute
    dtype. "fp16" scales the loss (Micikevicius et al. 2018, arXiv:1710.03740): a step
    whose gradients overflow on any rank is skipped on all, shows in `Out.skipped`, and
    moves neither step count nor schedule. The model's outputs stay in the compute dtype
    unless `Precision(output=...)` asks. After placing, the real dtypes are read back.

    "fp8" is "bf16" with the products of Linears in 8-bit floats, by torchao, each row
    scaled by itself; gradients of weights stay in 16 bits. On GPUs that have it, else
    refused. The last Linear, and those of odd sizes, stay in 16 bits:
    `state.slots["with_precision"]` says which.

    Not neutral. Raises PrecisionError for a precision that is unknown, not to be had
    here, or was not obtained.
    """
    spec = WithPrecision(wanted)
    full = spec.precision
    _possible(full)

    def start(state: Any, tx: Transform) -> Any:
        from accelx import dtypes

        dtypes.read_back(state.model, full)
        return _in_8_bits(state) if full.compute == "fp8" else state

    once = Rules(once=True, why="a run computes in one precision")
    one = Pass(
        "with_precision",
        spec,
        place=lambda state, tx: _placed(full, state, tx),
        start=start,
        forward=lambda loss: _autocasting(loss, full),
        rules=(once, _APART) if full.compute == "fp8" else once,
    )
    scaling = (_loss_scale(),) if full.compute == "fp16" else ()
    return Transform((one, *scaling))


def _placed(full: Precision, state: Any, tx: Transform) -> Any:
    if tx.find("shard_model") is not None:
        return state
    from torch import nn

    from accelx import dtypes
    from accelx.engines import float8

    float8.check(full, _device(state.model))
    model = state.model if isinstance(state.model, nn.Module) else state.model()
    dtypes.cast(model, full)
    return attrs.evolve(state, model=model)


_APART = Rules(
    excludes=("shard_tensors", "shard_experts", "shard_stages"),
    why="these cut weights that fp8 multiplies whole",
)


def _device(thing: Any) -> str:
    """Where a model is that no pass moves; the CPU for one still to be made."""
    from torch import nn

    first = next(thing.parameters(), None) if isinstance(thing, nn.Module) else None
    return "cpu" if first is None else str(first.device)


def _in_8_bits(state: Any) -> Any:
    from accelx.engines import float8
    from accelx.engines.forwards import carried
    from accelx.state import with_slot

    done = float8.convert(state.model)
    return carried(with_slot(state, "with_precision", done))


def _possible(full: Precision) -> None:
    half = full.compute in ("bf16", "fp16", "fp8")
    if full.param == "fp16":
        raise PrecisionError(
            "weights in fp16 lose updates, and a loss scale cannot help them; got "
            f'{full!r}: write with_precision("fp16"), which keeps them in fp32'
        )
    if not half and full.compute not in (None, full.param):
        raise PrecisionError(
            f"compute={full.compute!r} with param={full.param!r} is no precision that "
            f"torch computes in; write Precision(param={full.compute!r}, "
            f"compute={full.compute!r})"
        )


def _autocasting(loss: Loss, full: Precision) -> Loss:
    """The loss under autocast, with the model's outputs cast if that was asked."""
    if full.compute not in ("bf16", "fp16", "fp8") and full.output is None:
        return loss

    def cast_loss(model: Any, *args: Any) -> Any:
        import torch

        from accelx._torch_stages import device_kind
        from accelx.dtypes import dtype

        compute, output = dtype(full.compute), dtype(full.output)
        with ExitStack() as stack:
            if compute in (torch.bfloat16, torch.float16):
                kind = device_kind(model)
                stack.enter_context(torch.autocast(kind, dtype=compute))
            if output is not None:
                stack.enter_context(_output_cast(model, output))
            return loss(model, *args)

    return cast_loss


@contextmanager
def _output_cast(model: Any, output: Any) -> Generator[None]:
    import torch

    from accelx import tree

    def cast(leaf: Any) -> Any:
        floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.to(output) if floating else leaf

    handle = model.register_forward_hook(lambda m, a, out: tree.map_leaves(cast, out))
    try:
        yield
    finally:
        handle.remove()


@attrs.frozen(repr=False)
class LossScale:
    """Spec of the loss scale, and its slot: factor, and steps since it changed."""

    scale: float = 65536.0
    good: int = 0
    every: int = 2000  # good steps before it doubles

    def __repr__(self) -> str:
        return code("LossScale", self)


def _loss_scale() -> Pass:
    spec = LossScale()

    def start(state: Any, tx: Transform) -> Any:
        from accelx.state import with_slot

        return with_slot(state, "loss_scale", spec)

    return Pass("loss_scale", spec, start=start, before=rescale, derived=True)


def rescale(state: Any, out: Out) -> tuple[Any, Out]:
    """Skip a step with gradients that are not finite, on all ranks; move the scale."""
    from accelx.engines.placed import engine_of
    from accelx.state import with_slot

    now: LossScale = state.slots["loss_scale"]
    norm = engine_of(state).clip(state, None) if out.norm is None else out.norm
    out = amend(out, norm=norm)
    if not math.isfinite(float(norm)):
        new = attrs.evolve(now, scale=now.scale / 2, good=0)
        why = (
            f"non-finite gradients at loss scale {now.scale:g}; it is {new.scale:g} now"
        )
        return with_slot(state, "loss_scale", new), amend(out, skipped=why)
    grown = now.good + 1 >= now.every
    new = attrs.evolve(
        now, scale=now.scale * (2 if grown else 1), good=0 if grown else now.good + 1
    )
    return with_slot(state, "loss_scale", new), out
