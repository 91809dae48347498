"""A copy of the model on every rank; gradients are averaged as they come (DDP)."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from accelx import _torch, _torch_ddp, dtypes, tree
from accelx.engines import copies, hooks, methods, placed, plain
from accelx.engines.options import Options
from accelx.engines.placed import Placed, Plan
from accelx.errors import PlacementError, PrecisionError
from accelx.records import Engine
from accelx.state import trainable

if TYPE_CHECKING:
    from accelx.state import State


SENT = {  # dtypes that DDP can send over any backend when it is made
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64),
    *(torch.complex64, torch.complex128),
}


@attrs.define(eq=False)
class Seen:
    """The DDP of a model, and whether the model was called since the last step."""

    ddp: Any
    leaf: Any = None  # a parameter of the DDP that is none of the model's
    called: bool = False
    inside: str = ""  # "forward" or "method"; kept only where there are methods
    synced: bool = False  # whether a reduction has been made
    ready: bool = False  # whether the last call of the model was with gradients


class _Carrying(nn.Module):
    """A model, and a scalar beside it."""

    def __init__(self, model: nn.Module, leaf: nn.Parameter) -> None:
        super().__init__()
        self.model, self.beside = model, nn.ParameterList([leaf])  # the last one


def _leaf(result: Placed, plan: Plan) -> nn.Parameter | None:
    """A scalar to carry, where all backward passes are ours and have the digits."""
    dtype = result.trainable[-1][1].dtype  # of the bucket that is reduced first
    if plan.alone or result.unused == "allow" or plan.options.hook is not None:
        return None
    if dtype not in (torch.float32, torch.float64):
        return None
    return nn.Parameter(torch.zeros((), dtype=dtype, device=result.env.device))


def place(model: nn.Module, plan: Plan) -> Placed:
    """Put rank 0's weights and buffers on every rank and hook DDP into `model`.

    Effects: two collectives; `model` keeps its object, class and names (L8).
    """
    _reducible(plan)
    model.to(plan.env.device)
    dtypes.cast(model, plan.precision)
    result = Placed(
        ENGINE,
        plan.env,
        model,
        trainable=trainable(model),
        drifting=placed.drifting(model, plan.env),
        unused=plan.unused,
    )
    return hooked(result, copies.try_blueprint(model), plan)


def _reducible(plan: Plan) -> None:
    """Refuse a dtype on the wire that neither the weights nor a hook has."""
    reduce = plan.precision and plan.precision.reduce
    if not plan.precision or reduce in (None, plan.options.hook):
        return
    if reduce != (plan.precision.param or "fp32"):
        hook = f', or hook="{reduce}"' if reduce in ("bf16", "fp16") else ""
        raise PrecisionError(
            "ddp reduces gradients in the dtype of the weights, but "
            f"{plan.precision!r} "
            f'asks for reduce={reduce!r}; leave reduce out, or write "fsdp2"{hook}'
        )


def _options(options: Options, unused: str) -> dict[str, Any]:
    """Arguments of DistributedDataParallel."""
    size = options.bucket_mb
    static = {"static_graph": True} if options.static_graph else {}
    # a static graph finds by itself what it does not use
    find = unused == "allow" and not options.static_graph
    return {"find_unused": find, **static} | (
        {} if size is None else {"bucket_cap_mb": size}
    )


def hooked(result: Placed, blank: Any, plan: Plan) -> Placed:
    """`result` with DDP made and its two halves hooked around the model's forward."""
    model, options = result.model, plan.options
    if not result.trainable:  # DDP refuses a model with nothing to reduce
        for tensor in (*model.parameters(), *model.buffers()):
            copies.from_main(tensor, result.env.device)
        return attrs.evolve(result, engine=plain.ENGINE)
    leaf = _leaf(result, plan)
    whole = model if leaf is None else _Carrying(model, leaf)
    _whole_numbers(result, options)
    odd = [(n, t) for n, t in copies.tensors(whole) if t.dtype not in SENT]
    for _, tensor in odd:
        copies.from_main(tensor, result.env.device)
    left = {name for name, _ in odd}
    ddp = _torch_ddp.ddp(whole, left=left, **_options(options, result.unused))
    hooks.attach(ddp, options.hook)
    seen = Seen(ddp, leaf)

    def again(old: Placed, copy: nn.Module, source: nn.Module) -> Placed:
        return _again(old, copy, source, plan)

    fork = _no_fork if hooks.remembers(options.hook) else copies.forker(blank, again)
    result = attrs.evolve(result, handle=seen, fork=fork)
    _around(model, result, seen, options.methods)
    return result


def _whole_numbers(result: Placed, options: Options) -> None:
    """Refuse hooks that would send half of each complex number."""
    pairs = [n for n, p in result.trainable if p.is_complex()]
    if pairs and options.hook is not None:
        raise PlacementError(
            f"hook={options.hook!r} sends real numbers in fewer bits, but {pairs[0]} "
            "is complex and would lose its imaginary part; leave the hook out"
        )


def _around(
    model: nn.Module, result: Placed, seen: Seen, names: tuple[str, ...]
) -> None:
    """Hook DDP's halves around forward, and around other methods that are named."""
    ddp = seen.ddp

    # A deep copy of the model, as users make for an average, shares these hooks, and is
    # none of DDP's business.
    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module is not model or seen.inside or _recomputed(seen):
            return args, kwargs
        seen.called, seen.inside = True, "forward" if names else ""
        seen.ready = torch.is_grad_enabled()
        return _naming(result, _torch_ddp.before, ddp, args, kwargs)

    def behind(module: nn.Module, args: Any, output: Any) -> Any:
        if module is not model or (names and seen.inside != "forward"):
            return output
        if _recomputed(seen):
            return output
        if result.unused == "allow":
            output = _off_leaves(output)
        return _naming(result, _torch_ddp.behind, ddp, output)

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(behind)
    if not names:
        return

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module is model and seen.inside == "forward":
            seen.inside = ""

    def around(method: Any, args: Any, kwargs: Any) -> Any:
        # called by forward, or by another of them, or again
        if seen.inside or _recomputed(seen):
            return method(*args, **kwargs)
        seen.called, seen.inside = True, "method"
        seen.ready = torch.is_grad_enabled()
        try:
            args, kwargs = _naming(result, _torch_ddp.before, ddp, args, kwargs)
            output = method(*args, **kwargs)
        finally:
            seen.inside = ""
        return _naming(result, _torch_ddp.behind, ddp, output)

    model.register_forward_hook(leave, always_call=True)  # also where forward raised
    methods.wrap(model, names, around)


def _recomputed(seen: Seen) -> bool:
    """Whether a backward pass computes the model again, which DDP has seen already."""
    if not _torch.in_backward():
        return False
    if torch.is_grad_enabled() and not seen.ready:
        raise PlacementError(
            "ddp wants to see the model's forward with gradients, but it ran without, "
            "and now runs again inside the backward pass, as checkpoint(..., "
            "use_reentrant=True) has it; write use_reentrant=False, or put "
            'remat("layers.*") into the chain'
        )
    return True


def _off_leaves(output: Any) -> Any:
    """The output without a weight as it is: DDP would count it as one left unused."""

    def bare(leaf: Any) -> bool:
        return isinstance(leaf, nn.Parameter) and leaf.requires_grad

    if not any(bare(leaf) for leaf in tree.leaves(output)):
        return output
    return tree.map_leaves(lambda x: x.view_as(x) if bare(x) else x, output)


def _no_fork(state: State) -> State:
    raise PlacementError(
        "fork wants a copy that steps as the state does, but the memory of powersgd is "
        'inside torch and is not copied; leave the hook out, or write hook="bf16"'
    )


def _again(old: Placed, model: nn.Module, source: nn.Module, plan: Plan) -> Placed:
    """Place a copy, whose weights need not be sent."""
    copies.fill(model, source)
    fresh = attrs.evolve(
        old,
        model=model,
        trainable=trainable(model),
        drifting=placed.drifters(model) if old.drifting else (),
    )
    return hooked(fresh, copies.try_blueprint(model), plan)


def _naming(result: Placed, half: Any, *args: Any) -> Any:
    """DDP's complaint about missing gradients, with names for its numbers."""
    try:
        return half(*args)
    except RuntimeError as error:
        found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
        if found is None:
            raise
        first = int(result.handle.leaf is not None)  # counted first, the others back
        indices = [int(i) - first for i in found[1].split()]
        names = [result.trainable[-1 - i][0] for i in indices if i >= 0][::-1]
        if not names:  # the loss that was carried is missing: no step of ours
            raise PlacementError(
                "a backward pass outside ax.step reached this model, which ddp then "
                "reduces half-way; lend it by `with ax.frozen(state) as model:`"
            ) from error
        raise placed.unused(names, result) from error


def backward(
    state: State,
    loss: Tensor,
    scale: float,
    leaf: Tensor | None = None,
    value: Tensor | None = None,
) -> None:
    """DDP takes the mean over ranks: times their number it is the sum."""
    world = state.slots["shard_model"].env.world
    plain.backward(state, loss, scale * world, leaf, value)


def carry(state: State) -> Any:
    """The loss travels in a bucket of gradients: a collective of its own costs more."""
    return state.slots["shard_model"].handle.leaf


def settle(state: State, scale: Tensor | float) -> None:
    """Check that every parameter took part, average statistics, multiply by `scale`."""
    here: Placed = state.slots["shard_model"]
    if not here.handle.called:
        raise PlacementError(
            f"ddp reduces gradients of what {type(here.model).__name__}.__call__ "
            "computed, but the loss did not call the model itself, so ranks would "
            "train apart; write model(...) in the loss, or name the method that it "
            'calls: shard_model(env, methods="encode")'
        )
    here.handle.called = False
    placed.all_used(state)
    here.handle.synced = True
    if here.unused == "error":
        _naming(here, _torch_ddp.finished, here.handle.ddp)
    placed.average(here.drifting, here.env)
    plain.settle(state, scale)


@contextmanager
def quiet(state: State) -> Generator[None]:
    """No reduction for the forward and backward passes inside.

    But in the first step of a static graph, which torch learns from a backward that is
    reduced: a mean that is taken again is the same.
    """
    seen: Seen = state.slots["shard_model"].handle
    ddp = seen.ddp
    if ddp.static_graph and not seen.synced:
        yield
        return
    loud = ddp.require_backward_grad_sync
    ddp.require_backward_grad_sync = False
    try:
        yield
    finally:
        ddp.require_backward_grad_sync = loud


ENGINE = Engine("ddp", backward, settle, plain.update, plain.clip, quiet, carry)
