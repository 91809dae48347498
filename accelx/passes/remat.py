"""Activations that are computed again in the backward pass, in place of being kept."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import attrs

from accelx.match import Selector
from accelx.records import Pass, Rules, Transform, code

if TYPE_CHECKING:
    from torch import nn

Policy = str | Callable[[Any], bool]

# What "selective" keeps: products, which cost most to make again. In torch.ops.aten.
PRODUCTS = (
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "_scaled_mm", "_int_mm"),
    *("_grouped_mm", "convolution", "_addmm_activation", "linear"),
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


@attrs.frozen(repr=False)
class Remat:
    """Spec of remat."""

    blocks: Any
    policy: Policy = "full"
    offload: bool = False

    def __repr__(self) -> str:
        return code("remat", self)


def remat(
    blocks: Selector | Iterable[Selector],
    policy: Policy = "full",
    offload: bool = False,
) -> Transform:
    """Keep the inputs of `blocks`, and compute what is inside again in backward.

    blocks: a glob over names such as "layers.*", a class, or a function (name, module)
    -> bool. policy: "full" keeps nothing inside; "selective" keeps the results of
    matrix products, convolutions and attention, so that only cheap work is done twice;
    a function of an operator, such as torch.ops.aten.mm.default, says whether its
    results are kept. offload: keep the inputs in host memory.

    Dropout draws the same numbers again, from torch's generators; autocast is as it
    was; running statistics of normalisation move once. What a block changes besides,
    or draws from Python's or NumPy's generators, it must not. Without gradients nothing
    is recomputed. Object, class, names and hooks stay (L8); alone,
    `remat("layers.*")(model)` does so for a loop of your own. Neutral (L4). Raises
    ValueError for another policy or blocks that match nothing.
    Chen et al. 2016 (arXiv:1604.06174); Korthikanti et al. 2022 (arXiv:2205.05198).
    """
    spec = Remat(_checked(blocks, policy, offload), policy, offload)
    why = "a block is computed again once; give all blocks in one remat"
    exact = "what is computed again must be attention over all ranks, as it was"
    return Transform(
        (
            Pass(
                "remat",
                spec,
                start=lambda state, tx: _started(spec, state),
                alone=lambda model: _wrapped(spec, model),
                rules=(
                    Rules(once=True, why=why),
                    Rules(after=("shard_sequence",), why=exact),
                ),
                neutral=True,
            ),
        )
    )


def _checked(blocks: Any, policy: Any, offload: Any) -> Any:
    """The blocks, in a form to be kept. Raises ValueError for what is no setting."""
    if not callable(policy) and policy not in ("full", "selective"):
        raise ValueError(
            'remat(policy=...) wants "full", "selective" or a function (operator) -> '
            f'bool, got {policy!r}; write policy="full"'
        )
    if not isinstance(offload, bool):
        raise ValueError(
            f"remat(offload=...) wants True or False, got {offload!r}; write "
            "offload=True"
        )
    one = isinstance(blocks, str | type) or callable(blocks)
    kept: Any = blocks if one else tuple(cast("Iterable[Any]", blocks))
    if kept is None or kept == ():
        raise ValueError(
            f"remat wants the blocks to compute again, got {blocks!r}; write "
            'remat("layers.*")'
        )
    return kept


def _started(spec: Remat, state: Any) -> Any:
    from accelx.engines.forwards import carried

    _wrapped(spec, state.model)
    return carried(state)


def _wrapped(spec: Remat, model: Any) -> Any:
    from torch import nn

    from accelx.engines.forwards import wrap

    if not isinstance(model, nn.Module):
        raise TypeError(
            f"remat(blocks)(module) wants a torch.nn.Module, got "
            f"{type(model).__name__}; put it into a chain for ax.init, or write "
            'remat("layers.*")(Net(...))'
        )
    wrap(model, spec.blocks, "remat", lambda inner: _recomputed(inner, spec))
    return model


def _recomputed(inner: Any, spec: Remat) -> Any:
    """`inner` with its activations made again in backward."""
    import torch
    from torch.utils.checkpoint import checkpoint

    keeping = _keeping(spec.policy)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(self, *args, **kwargs)
        names = tuple(kwargs)

        # keywords go by position: torch looks there for the devices whose random state
        # is kept, and for what is offloaded
        def call(*flat: Any) -> Any:
            count = len(flat) - len(names)
            rest = dict(zip(names, flat[count:], strict=True))
            return inner(self, *flat[:count], **rest)

        flat = (*args, *kwargs.values())
        contexts = _contexts(self, keeping)
        how: Any = {} if contexts is None else {"context_fn": contexts}
        with _offloading(flat) if spec.offload else nullcontext():
            return checkpoint(call, *flat, use_reentrant=False, **how)

    return forward


def _keeping(policy: Policy) -> Callable[[], tuple[Any, Any]] | None:
    """What makes the contexts that keep some results; None where none are kept."""
    if policy == "full":
        return None
    import torch

    from accelx import _torch_remat

    if callable(policy):
        keeps = policy
    else:
        packets = [getattr(torch.ops.aten, name, None) for name in PRODUCTS]
        found = {getattr(p, "default", None) for p in packets} - {None}
        keeps = found.__contains__
    return lambda: _torch_remat.keeping_contexts(keeps)


def _contexts(module: nn.Module, keeping: Any) -> Callable[[], tuple[Any, Any]] | None:
    """The contexts of the forward and of the recomputing, or None for none."""
    import torch

    if torch.compiler.is_compiling():  # statistics stay as compiled code has them
        return keeping
    from accelx.engines.placed import drifters

    if not drifters(module):
        return keeping

    def both() -> tuple[Any, Any]:
        first, again = (nullcontext(), nullcontext()) if keeping is None else keeping()
        return first, _still(module, again)

    return both


@contextmanager
def _still(module: nn.Module, inner: Any) -> Generator[None]:
    """Inside, running statistics do not move: they have counted these rows already.

    A momentum of 0 writes what was there. To write it back afterwards would break the
    backward pass, which holds it.
    """
    every: list[Any] = list(module.modules())
    with ExitStack() as stack:
        stack.enter_context(inner)
        for m in every:
            if not getattr(m, "track_running_stats", False):
                continue
            stack.callback(setattr, m, "momentum", m.momentum)
            m.momentum = 0.0
            count = m.num_batches_tracked
            if count is not None:
                stack.callback(count.copy_, count.clone())
        yield


def _offloading(flat: tuple[Any, ...]) -> Any:
    """Keep tensors that backward needs in host memory, pinned where that is faster."""
    import torch

    pinned = any(isinstance(t, torch.Tensor) and t.device.type == "cuda" for t in flat)
    return torch.autograd.graph.save_on_cpu(pin_memory=pinned)
