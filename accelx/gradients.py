"""How a loss becomes whole gradients: one mean over every microbatch and every rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import attrs
import torch
from torch import Tensor

from accelx import comm, tree
from accelx.cut import Args, mean_of, rows_in
from accelx.engines.methods import say_sliced
from accelx.engines.placed import engine_of
from accelx.env_device import kind_of
from accelx.env_part import rows_env
from accelx.errors import LossError, NeutralityWarning, PlacementError
from accelx.fit_full import say_full
from accelx.records import (
    Engine,
    Env,
    Late,
    Loss,
    Mean,
    Out,
    Transform,
    owing,
    timed,
)
from accelx.rows import Rows, leading, one_mark
from accelx.state import State

Grads = Callable[..., tuple[State, Out]]
Inner = Callable[[State, Args, Rows], tuple[State, Out]]
_ALONE = Env()


def pipeline(tx: Transform, loss: Loss) -> Grads:
    """(State, *args) -> (State, Out) that adds the whole gradient to the parameters'.

    What the engine of the state handles itself is left out of the run.
    """
    made: list[Any] = [None, None, None]  # for states of one engine and Env at a time

    def grads(state: State, *args: Any) -> tuple[State, Out]:
        engine, env = engine_of(state), env_of(state)
        if made[0] is not engine or made[1] is not env:
            made[:] = engine, env, _composed(tx, loss, engine, env)
        return made[2](state, *args)

    return grads


def _composed(tx: Transform, loss: Loss, engine: Engine, env: Env) -> Grads:
    sharded = tx.find("shard_loader") is not None
    return _whole(unreduced(tx, loss, engine, env), engine, env, sharded)


def unreduced(tx: Transform, loss: Loss, engine: Engine, env: Env) -> Inner:
    """Forward and backward on this rank, as all passes want them; nothing is divided.

    What comes out adds up over ranks and calls, and is no gradient until it is settled.
    """
    active = [p for p in tx if p.name not in engine.handles]
    for one in active:
        if one.forward is not None:
            loss = one.forward(loss)
    ranks = rows_env(env).world
    if engine.through is None:
        local = _local(loss, engine, env.world // ranks)
    else:
        local = engine.through(loss, weighed)
    wraps = [one.backward for one in active if one.backward is not None]
    if not wraps:
        return local

    def grads(state: State, *args: Any) -> tuple[State, Out]:
        return local(state, args, rows_in(args, ranks))

    for wrap in wraps:
        grads = wrap(grads)
    return lambda state, args, rows: grads(state, *args)


def env_of(state: State) -> Env:
    """The Env that the model of `state` was placed on."""
    placed = state.slots.get("shard_model")
    return _ALONE if placed is None else placed.env


def _local(loss: Loss, engine: Engine, share: int) -> Inner:
    """Forward and backward of one microbatch on this rank; nothing is divided yet.

    Gradients come out as of the total over all rows, divided by what `_unit` says.
    """

    def local(state: State, args: Args, rows: Rows) -> tuple[State, Out]:
        value, scale, out = weighed(state, loss(state.model, *args), args, rows, share)
        leaf = None if engine.carry is None else engine.carry(state)
        count = 0 if isinstance(out.loss, Mean) else out.weight
        engine.backward(state, value, scale, *_carried(leaf, value, count))
        return state, out

    return local


def weighed(
    state: State, result: Any, args: Args, rows: Rows, share: int = 1
) -> tuple[Tensor, float, Out]:
    """What a loss returned: a scalar to go backward from, its scale, and the report.

    Where `share` ranks hold parts of the same rows, a mean is of a part of each row.
    """
    value, aux = read(result)
    if rows.padded:
        aux = _padded(value, aux, args, rows)
    up, unit = _loss_scale(state), _unit(rows.total)
    if isinstance(value, Mean):
        total = _trains(_as_total(value))
        if not rows.rows:  # a placeholder takes part, and counts for nothing
            none = Mean(torch.zeros_like(total), 0)
            return total, 0.0, Out(cast(Any, none), 0, aux=_empty(aux))
        kept = Mean(total.detach(), _detached(value.weight))
        return total, up / unit, Out(cast(Any, kept), kept.weight, aux=aux)
    count = rows.rows if share == 1 or not rows.rows else rows.rows / share
    aux = aux if rows.rows else _empty(aux)
    out = Out(value.detach(), count, aux=aux)
    return _trains(value), up * (count / unit), out


def _padded(value: Tensor | Mean, aux: Any, args: Args, rows: Rows) -> Any:
    """The aux of real rows, after refusing a loss that would count the others."""
    if not isinstance(value, Mean):
        raise plain_mean("the loss")
    length = leading(*args) or 0
    if rows.rows == length:
        return aux
    counted = not isinstance(value.weight, Tensor)  # by len or numel, no sum of a mask
    if rows.rows and counted and value.weight == length:
        warnings.warn(
            f"the weight of the loss is {length}, as many as the batch has rows here, "
            f"but {length - rows.rows} of them only pad; if it counts rows, write "
            "w = ax.row_weights(batch) and ax.Mean((per_row * w).sum(), w.sum())",
            NeutralityWarning,
            stacklevel=2,
        )

    def one(leaf: Any) -> Any:
        per_row = isinstance(leaf, Tensor) and leaf.dim() and leaf.size(0) == length
        return leaf[: rows.rows] if per_row else leaf

    return None if aux is None else tree.map_leaves(one, aux, _is_mean)


def plain_mean(what: str) -> LossError:
    """The error of a mean that counts rows which only pad."""
    return LossError(
        f"{what} wants to be an ax.Mean where batches have static shapes, got a plain "
        "mean, which counts rows that only pad; write w = ax.row_weights(batch) and "
        "ax.Mean((per_row * w).sum(), w.sum())"
    )


def _carried(leaf: Any, loss: Tensor, rows: Any) -> tuple[Any, ...]:
    """What an engine that can reduces along: the loss of this microbatch's rows."""
    if leaf is None:
        return ()
    total = loss.detach().to(leaf.dtype) * rows
    return leaf, total if rows else torch.zeros_like(total)


def _unit(total: int) -> float:
    """What gradients are divided by ahead of time: the batch's rows, if all know them.

    So that a mean over rows needs no second look at the gradients, and sums over tokens
    stay of the size of means, which half precision asks for.
    """
    return float(total or 1)


def _loss_scale(state: State) -> float:
    slot = state.slots.get("loss_scale")
    return 1.0 if slot is None else slot.scale


def read(result: Any) -> tuple[Tensor | Mean, Any]:
    """What a loss function returned, as (loss, aux). Raises LossError for no scalar."""
    aux = None
    if isinstance(result, tuple) and len(result) == 2:  # type: ignore[reportUnknownArgumentType]
        result, aux = result  # type: ignore[reportUnknownVariableType]
    if isinstance(result, Mean):
        return result, _aux(aux)
    if not isinstance(result, Tensor):
        raise LossError(
            "the loss function wants to return a scalar tensor, ax.Mean(total, "
            f"weight), or (either, aux), got {type(result).__name__}; write `return "
            "loss`"  # type: ignore[reportUnknownArgumentType]
        )
    if result.dim():
        raise LossError(
            "the loss wants to be a scalar, got a tensor of shape "
            f"{tuple(result.shape)}; write loss.mean() for a mean over rows, or "
            "ax.Mean(loss.sum(), loss.numel())"
        )
    return result, _aux(aux)


def _aux(aux: Any) -> Any:
    if aux is None:
        return None
    return tree.map_leaves(_detached, aux)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _trains(loss: Tensor) -> Tensor:
    if not loss.requires_grad:
        raise LossError(
            "the loss wants to depend on a trainable parameter, got one without a "
            "gradient; compute it from the model that the loss function is given, "
            "outside torch.no_grad(), or use ax.measure to evaluate"
        )
    return loss


def _as_total(mean: Mean) -> Tensor:
    total = mean.total
    if not isinstance(total, Tensor) or total.dim():
        shape = (
            tuple(total.shape) if isinstance(total, Tensor) else type(total).__name__
        )
        raise LossError(
            f"the total of a Mean wants to be a scalar tensor, got {shape}; "
            "write ax.Mean(losses.sum(), mask.sum())"
        )
    return total


def _empty(aux: Any) -> Any:
    """The aux of a placeholder: Means of nothing, tensors without rows."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Mean):
            return Mean(torch.zeros_like(torch.as_tensor(leaf.total)), 0)
        return leaf[:0] if isinstance(leaf, Tensor) and leaf.dim() else leaf

    return None if aux is None else tree.map_leaves(one, aux, _is_mean)


def _is_mean(node: Any) -> bool:
    return isinstance(node, Mean)


def _whole(inner: Inner, engine: Engine, env: Env, sharded: bool) -> Grads:
    """Reduce weights, losses and aux over ranks at once, then make gradients whole."""
    ranks = rows_env(env).world  # with rows of their own
    doubtful = sharded and ranks > 1

    def whole(state: State, *args: Any) -> tuple[State, Out]:
        nonlocal doubtful
        rows = _rows(args, ranks)
        _as_at_init(state)
        if doubtful and not rows.total:
            doubtful = False
            _warn_of_whole_batches(rows.rows, ranks)
        unit, scale = rows.total, 1.0 / _loss_scale(state)
        earlier = _set_aside(state) if state.pending else []
        leaf = None if engine.carry is None else engine.carry(state)
        try:
            state, out = inner(state, args, rows)
            if isinstance(out.loss, Mean) or not unit:
                out = _reduced(env, out)()
                if not out.weight:
                    out = attrs.evolve(out, skipped="no row or token has a weight")
                scale *= _unit(unit) / (float(out.weight) or 1.0)
            elif leaf is not None and out.aux is None:
                out = Out(leaf.grad * (env.world / unit), unit)
            elif env.world > 1 or out.aux is not None:  # nothing waits for the report
                out = owing(_fields(_reduced(env, out), unit))
            engine.settle(state, scale)
        except BaseException as error:  # leave no half of a gradient behind
            say_full(error, state, env)
            say_sliced(error)
            for _, p in state.trained:
                p.grad = None
            if "shard_model" in state.slots:
                state.slots["shard_model"].forget()
            raise
        finally:
            if leaf is not None:
                leaf.grad = None
            _put_back(earlier)
        return state, out if rows.waited is None else timed(out, rows.waited.take())

    return whole


def _rows(args: Args, ranks: int) -> Rows:
    """The rows of `args`; refuses rows cut over ranks for a model on one."""
    rows = rows_in(args, ranks)
    if len(args) > 1:
        one_mark(args)
    if ranks == 1 and rows.total > rows.rows:
        raise PlacementError(
            f"the batch is cut over ranks ({rows.rows} of {rows.total} rows are here), "
            "but the model is on one, so ranks would train apart; add "
            'shard_model(env, "ddp") to the chain'
        )
    return rows


def _warn_of_whole_batches(rows: int, ranks: int) -> None:
    warnings.warn(
        f"the chain has shard_loader, but a step was given {rows} rows that do not "
        "come from ax.feed: they are taken for this rank's own, and if they are the "
        f"whole batch, each sample counts {ranks} times; write "
        "`for batch in ax.feed(tx, loader):`, and change batches inside the loss",
        NeutralityWarning,
        stacklevel=4,
    )


def _as_at_init(state: State) -> None:
    """Refuse gradients that no call of ours made, and weights unfrozen since `init`."""
    for _, p in () if state.pending else state.trained:
        if p.grad is None:
            continue
        raise PlacementError(
            "the model has gradients from elsewhere, which this step would add to its "
            "own; lend it to another loss by `with ax.frozen(state) as model:`, or "
            "drop them by state.model.zero_grad()"
        )
    if state.still and any(p.requires_grad for p in state.still):
        raise PlacementError(
            "a parameter that was frozen at ax.init gets gradients now, which would be "
            "neither reduced nor clipped; make a new state by ax.init from a new module"
        )


def _reduced(env: Env, out: Out) -> Callable[[], Out]:
    """Start adding loss, weight and every Mean of aux over ranks; waits when called."""
    flat = [] if out.aux is None else tree.flatten(out.aux, _is_mean)
    means = [mean_of(out), *(leaf for _, leaf in flat if isinstance(leaf, Mean))]
    packed = _packed(means, env)
    work = comm.sum_scalars(env, packed, async_op=True)

    def finish() -> Out:
        if work is not None:
            work.wait()
        (total, weight), *rest = packed.view(-1, 2).unbind()
        new = iter(rest)
        leaves = [Mean(*next(new)) if _is_mean(leaf) else leaf for _, leaf in flat]
        aux = tree.unflatten(out.aux, leaves, _is_mean) if flat else out.aux
        loss = (total / weight).to(_dtype(means[0].total))
        return attrs.evolve(out, loss=loss, weight=weight, aux=aux)

    return finish


def _fields(finish: Callable[[], Out], rows: int) -> Late:
    def late() -> tuple[Any, Any, Any]:
        out = finish()
        return out.loss, rows, out.aux

    return late


def _packed(means: list[Mean], env: Env) -> Tensor:
    """Totals and weights side by side, in float64 where the device has it."""
    wide = torch.float64 if kind_of(env.device).float64 else torch.float32
    first = means[0].total
    device = first.device if isinstance(first, Tensor) else env.device
    each = [
        torch.as_tensor(v, dtype=wide, device=device).reshape(())
        for m in means
        for v in (m.total, m.weight)
    ]
    return torch.stack(each)


def _dtype(total: Any) -> torch.dtype:
    return total.dtype if isinstance(total, Tensor) else torch.float32


def _set_aside(state: State) -> list[tuple[Any, Tensor]]:
    """Gradients of earlier calls: they are whole, and must not be scaled once more."""
    earlier = [(p, p.grad.clone()) for _, p in state.trained if p.grad is not None]
    for p, _ in earlier:
        p.grad = None
    return earlier


def _put_back(earlier: list[tuple[Any, Tensor]]) -> None:
    for p, grad in earlier:
        p.grad = grad if p.grad is None else p.grad.add_(grad)
