"""How a loss becomes whole gradients: one mean over every microbatch and every rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import attrs
import torch
from torch import Tensor

from accelx import comm, tree
from accelx.cut import Args, mean_of, rows_in, unmarked
from accelx.engines.buffers import say_parted
from accelx.engines.kept import as_at_init
from accelx.engines.methods import say_sliced
from accelx.engines.placed import UNPLACED
from accelx.env_device import widest
from accelx.env_part import rows_env
from accelx.errors import LossError, NeutralityWarning, PlacementError
from accelx.fit_full import say_full
from accelx.gradients_alone import Whole, alone
from accelx.gradients_read import as_total, detached, read, say_own, trains
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
from accelx.rows import Rows, leading, look, one_mark
from accelx.state import State

Grads = Callable[..., tuple[State, Out]]
Inner = Callable[[State, Args, Rows], tuple[State, Out]]


def pipeline(tx: Transform, loss: Loss) -> Whole:
    """(State, args) -> (State, Out) that adds the whole gradient to the parameters'.

    What the engine of the state handles itself is left out of the run.
    """
    made: list[Any] = [None, None, None]  # for states of one engine and Env at a time

    def grads(state: State, args: Args) -> tuple[State, Out]:
        placed = state.slots.get("shard_model", UNPLACED)
        engine, env = placed.engine, placed.env
        if made[0] is not engine or made[1] is not env:
            as_at_init(state)
            made[:] = engine, env, _composed(tx, loss, engine, env)
        return made[2](state, args)

    return grads


def _composed(tx: Transform, loss: Loss, engine: Engine, env: Env) -> Whole:
    sharded = tx.find("shard_loader") is not None

    def general(loss: Loss) -> Whole:
        return _whole(unreduced(tx, loss, engine, env), engine, env, sharded)

    active = [p for p in tx if p.name not in engine.handles]
    wrapped = any(p.forward or p.backward for p in active)
    if wrapped or env.world > 1 or engine.carry or engine.through:
        return general(loss)

    def failed(error: BaseException, state: State) -> None:
        _tidied(error, state, env)

    return alone(loss, engine, general, _as_at_init, failed)


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
    return state.slots.get("shard_model", UNPLACED).env


def _local(loss: Loss, engine: Engine, share: int) -> Inner:
    """Forward and backward of one microbatch on this rank; nothing is divided yet.

    Gradients come out as of the total over all rows, divided by what `_unit` says.
    """

    backward, carry = engine.backward, engine.carry

    def local(state: State, args: Args, rows: Rows) -> tuple[State, Out]:
        value, scale, out = weighed(state, loss(state.model, *args), args, rows, share)
        leaf = None if carry is None else carry(state)
        if leaf is None:
            backward(state, value, scale)
        else:
            count = 0 if isinstance(out.loss, Mean) else out.weight
            backward(state, value, scale, leaf, _carried(leaf, value, count))
        return state, out

    return local


def weighed(
    state: State, result: Any, args: Args, rows: Rows, share: int = 1
) -> tuple[Tensor, float, Out]:
    """What a loss returned: a scalar to go backward from, its scale, and the report.

    Where `share` ranks hold parts of the same rows, a mean is of a part of each row.
    """
    scaler, unit, count = state.slots.get("loss_scale"), rows.total or 1, rows.rows
    up = 1.0 if scaler is None else scaler.scale
    usual = type(result) is Tensor and share == 1 and not rows.padded and count
    usual = usual and result.is_floating_point()  # not complex, which `read` refuses
    if usual and result.requires_grad and not result.dim():  # without another call
        return result, up * (count / unit), Out(result.detach(), count)
    value, aux = read(result)
    if rows.padded:
        aux = _padded(value, aux, args, rows)
    if isinstance(value, Mean):
        total = trains(as_total(value))
        if not rows.rows:  # a placeholder takes part, and counts for nothing
            none = Mean(torch.zeros_like(total), 0)
            return total, 0.0, Out(cast(Any, none), 0, aux=_empty(aux))
        kept = Mean(total.detach(), detached(value.weight))
        return total, up / unit, Out(cast(Any, kept), kept.weight, aux=aux)
    count = count if share == 1 or not count else count / share
    aux = aux if rows.rows else _empty(aux)
    out = Out(value.detach(), count, aux=aux)
    return trains(value), up * (count / unit), out


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


def _carried(leaf: Any, loss: Tensor, rows: Any) -> Tensor:
    """What an engine that can reduces along: the loss of this microbatch's rows."""
    total = loss.detach().to(leaf.dtype) * rows
    return total if rows else torch.zeros_like(total)


def _unit(total: int) -> float:
    """What gradients are divided by ahead of time: the batch's rows, if all know them.

    So that a mean over rows needs no second look at the gradients, and sums over tokens
    stay of the size of means, which half precision asks for.
    """
    return float(total or 1)


def _empty(aux: Any) -> Any:
    """The aux of a placeholder: Means of nothing, tensors without rows."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Mean):
            return Mean(torch.zeros_like(torch.as_tensor(leaf.total)), 0)
        return leaf[:0] if isinstance(leaf, Tensor) and leaf.dim() else leaf

    return None if aux is None else tree.map_leaves(one, aux, _is_mean)


def _is_mean(node: Any) -> bool:
    return isinstance(node, Mean)


def _whole(inner: Inner, engine: Engine, env: Env, sharded: bool) -> Whole:
    """Reduce weights, losses and aux over ranks at once, then make gradients whole."""
    ranks = rows_env(env).world  # with rows of their own
    doubtful = sharded and ranks > 1
    first = ranks > 1 and engine.through is None

    def whole(state: State, args: Args) -> tuple[State, Out]:
        nonlocal doubtful, first
        rows = _rows(args, ranks)
        _as_at_init(state)
        if doubtful and not rows.total:
            doubtful = False
            _warn_of_whole_batches(rows.rows, ranks)
        unit, up = rows.total, state.slots.get("loss_scale")
        scale = 1.0 if up is None else 1.0 / up.scale
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
        except BaseException as error:
            _tidied(error, state, env)
            raise
        finally:
            if leaf is not None:
                leaf.grad = None
            if earlier:
                _put_back(earlier)
        if first:
            first = False
            say_own(out.aux)
            if not state.position:  # of the run, on all ranks alike
                say_parted(state, env)
        return state, out if rows.waited is None else timed(out, rows.waited.take())

    return whole


def _tidied(error: BaseException, state: State, env: Env) -> None:
    """Leave no half of a gradient behind, and say more of the error."""
    say_full(error, state, env)
    say_sliced(error)
    for _, p in state.trained:
        p.grad = None
    if "shard_model" in state.slots:
        state.slots["shard_model"].forget()


def _rows(args: Args, ranks: int) -> Rows:
    """The rows of `args`; refuses rows cut over ranks for a model on one."""
    marked, here = look(args)
    rows = unmarked(here, ranks) if marked is None else marked
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
    first = means[0].total
    device = first.device if isinstance(first, Tensor) else env.device
    values: list[Any] = [v for m in means for v in (m.total, m.weight)]
    packed = torch.empty(len(values), dtype=widest(env.device), device=device)
    for i, value in enumerate(values):  # a number needs no copy to the device
        known = isinstance(value, Tensor | int | float)
        packed[i] = value if known else torch.as_tensor(value)
    return packed


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
