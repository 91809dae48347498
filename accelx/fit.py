"""The largest microbatch that fits into memory, found by trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from torch import Tensor, nn

from accelx import gradients, tree
from accelx._torch import is_dtensor
from accelx.comm_wire import exchange, grouped
from accelx.cut import cut, divisors, rows_in
from accelx.engines.placed import engine_of
from accelx.env_part import rows_env, sums_env
from accelx.errors import CollectiveError, DataError, OrderError, PlacementError
from accelx.fit_kept import forget, kept, unmade
from accelx.fit_memory import Meter, is_full, let_go, meter
from accelx.passes.accumulate import accumulate
from accelx.records import Env, Loss, Transform, check_env
from accelx.rows import leading, rows_of, stamp
from accelx.state import State, check_state
from accelx.transform import check_transform

MARGIN = 0.9  # of the room that is left, where memory must not run out on trial


@attrs.frozen
class _Tried:
    """How a trial with one microbatch of `rows` rows went on this rank."""

    rows: int
    full: str = ""  # what the allocator said
    grown: int = 0  # bytes at the peak beyond what is always held; 0 if not measured
    error: Exception | None = None  # of another kind


@attrs.frozen
class _Trial:
    """What is the same for every trial."""

    env: Env
    tx: Transform
    loss: Loss
    batch: Any
    state: State
    moments: int
    most: int  # rows of the rank that has most
    together: bool  # ranks need one another for a forward or backward pass
    meter: Meter | None


def fit_batch(
    env: Env, tx: Transform, loss: Loss, batch: Any, *, state: State, moments: int = 2
) -> Transform:
    """The `accumulate(n)` with the smallest n whose microbatches fit into memory.

    `batch` is what `ax.feed` yields, the largest that will come: n is one of 1, 2, 4
    and so on up to its rows, or a divisor of them under static shapes, the same on
    every rank. The global batch stays, so no number of the run changes (L4):
    `tx = ax.chain(tx, ax.fit_batch(env, tx, loss, batch, state=state))`.

    Effects: forward and backward passes, from one row up, until memory runs out on a
    rank or the whole batch fits; the state is not spent and is as before to the bit,
    random generators too. For what an optimizer makes at its first update, `moments`
    tensors like each weight are held (AdamW 2, SGD with momentum 1, without 0). On a
    CPU, and where ranks need one another for each pass (fsdp2), running out would kill
    or hang: there the next size is tried if 0.9 of what is left would hold it, by the
    growth so far. Raises PlacementError if not one row fits, OrderError if `tx`
    accumulates already, DataError for a batch without rows, and what the loss raises.
    """
    _check(env, tx, state)
    ranks = rows_env(env).world
    marked, here = rows_in((batch,), ranks), leading(batch)
    if here is None:
        raise DataError(
            "fit_batch wants a batch with rows to cut, got "
            f"{type(batch).__name__} without a tensor that has a dimension; give it "
            "what ax.feed yielded"
        )
    mine = here if marked.padded else marked.rows
    most = max(exchange(env, "fit_batch", mine))
    trial = _Trial(
        *(env, tx, loss, batch, state, moments, most),
        together=env.world > 1 and (ranks < env.world or _joined(state)),
        meter=meter(env.device),
    )
    with kept(state, tx, env.device):
        return accumulate(_smallest(trial, counts(most, marked.padded)))


def _check(env: Env, tx: Transform, state: State) -> None:
    check_env("fit_batch", env)
    check_transform("fit_batch", tx)
    check_state("fit_batch", state)
    if tx.find("accumulate") is not None:
        raise OrderError(
            f"fit_batch finds the n of accumulate(n), but the chain has {tx.brief()}; "
            "leave accumulate out of it, and add what fit_batch returns"
        )
    placed = gradients.env_of(state)
    if placed.world != (adding := sums_env(env).world):
        raise PlacementError(
            f"fit_batch wants the env of the model, which is on {placed.world} ranks, "
            f"got one of {adding}; give both the same env"
        )
    if any(p.grad is not None for p in state.model.parameters()):
        raise PlacementError(
            "fit_batch drops the gradients of its trials and wants a state without "
            "any, but this one has some; call it before ax.grads, or after ax.apply"
        )


def counts(rows: int, padded: bool) -> list[int]:
    """The numbers of microbatches that are tried, the largest and safest first."""
    if padded:
        return divisors(rows)[::-1]
    twos = [2**k for k in range(rows.bit_length()) if 2**k < rows]
    return [rows, *twos[::-1]]


def _joined(state: State) -> bool:
    """Whether a pass over the model waits for other ranks half-way."""
    modules = state.model.modules()
    batch_norms = any(isinstance(m, nn.SyncBatchNorm) for m in modules)
    return batch_norms or any(map(is_dtensor, state.model.parameters()))


def _smallest(trial: _Trial, falling: list[int]) -> int:
    """The last of `falling` that all ranks have memory for."""
    best, done = 0, list[_Tried]()
    let_go(trial.env.device, cycles=True)
    for n in falling:
        if done and not _promising(trial, done, -(-trial.most // n)):
            break
        tried = _try(trial, n)
        done.append(tried)
        if not _agreed(trial, tried, best):
            break
        best = n
    return best


def _promising(trial: _Trial, done: list[_Tried], rows: int) -> bool:
    """Whether a trial may be risked: it would raise, or is foreseen to fit on all."""
    env, meter = trial.env, trial.meter
    careful = trial.together or env.device.startswith("cpu")
    if not careful or (meter is None and not trial.together):
        return True
    if meter is None:
        raise PlacementError(
            "fit_batch foresees the memory of a model whose ranks wait for one another "
            f"in each pass, and {env.device} does not tell what it has left; write "
            "accumulate(n) with an n of your own"
        )
    fits = foreseen(done, rows) <= MARGIN * meter.room(trial.together)
    return all(exchange(env, "fit_batch", fits))


def foreseen(done: list[_Tried], rows: int) -> float:
    """Bytes that `rows` rows take: on the line through the last two trials."""
    last = done[-1]
    if len(done) == 1:  # never too little: what does not grow is counted as if it did
        return last.grown * rows / last.rows
    slope = max(0.0, (last.grown - done[-2].grown) / (last.rows - done[-2].rows))
    return last.grown + slope * (rows - last.rows)


def _agreed(trial: _Trial, tried: _Tried, best: int) -> bool:
    """Whether all ranks had memory; raises on all of them what one of them raised."""
    said = f"{type(tried.error).__name__}: {tried.error}" if tried.error else ""
    told = exchange(trial.env, "fit_batch", (said, tried.full))
    if tried.error is not None:
        raise tried.error
    errors = {who: what for what, who in grouped([e for e, _ in told]).items() if what}
    if errors:
        shown = "; ".join(f"{what} on {who}" for who, what in errors.items())
        raise CollectiveError(
            f"fit_batch wants the loss to run on every rank, got {shown}; mend the "
            "loss, or the batch of that rank"
        )
    full = {who: what for what, who in grouped([f for _, f in told]).items() if what}
    if full and not best:
        shown = "; ".join(f"{what} on {who}" for who, what in full.items())
        raise PlacementError(
            f"fit_batch wants memory for a microbatch of {tried.rows} of the "
            f"{trial.most} rows of a rank on {trial.env.device}, got none: {shown}; "
            'write shard_model(env, "fsdp2"), with_precision("bf16") or shorter rows'
        )
    return not full


def _try(trial: _Trial, n: int) -> _Tried:
    """One or two microbatches of `n`, forward and backward, with all that is held."""
    rows = -(-trial.most // n)
    before = 0 if trial.meter is None else trial.meter.start()
    full, error = "", None
    try:
        _run(trial, n)
    except Exception as caught:
        if not is_full(caught):
            caught.add_note(f"accelx: in a trial of fit_batch with {rows} rows")
            error = caught
        elif trial.together:
            raise PlacementError(
                f"memory ran out on rank {trial.env.rank} with {rows} rows, in a pass "
                "in which ranks wait for one another, so fit_batch cannot go on; write "
                "accumulate(n) with a larger n, or use more ranks"
            ) from caught
        else:
            full = str(caught).partition("\n")[0] or type(caught).__name__
    grown = 0 if trial.meter is None else max(0, trial.meter.peak() - before)
    forget(trial.state)
    let_go(trial.env.device, cycles=bool(full))
    return _Tried(rows, full, grown, error)


def _copied(part: Any) -> Any:
    """Rows of a trial's own: a loss may change them in place."""
    marked = rows_of(part)
    own = tree.map_leaves(lambda x: x.clone() if isinstance(x, Tensor) else x, part)
    return own if marked is None else stamp(own, marked)


def _run(trial: _Trial, n: int) -> None:
    """The second microbatch has the first one's gradients beside it; as has each."""
    state, ranks = trial.state, rows_env(trial.env).world
    engine, env = engine_of(state), gradients.env_of(state)
    inner = gradients.unreduced(trial.tx, trial.loss, engine, env)
    parts = [_copied(part) for part in cut((trial.batch,), n, ranks)[:2]]
    held = unmade(state, trial.moments)
    quiet: Callable[[Any], Any] = engine.quiet
    last = parts[-1:] if trial.together else []  # reduces, as the last of a step does
    with quiet(state):
        for part in parts[: len(parts) - len(last)]:
            inner(state, part, rows_in(part, ranks))
    for part in last:
        inner(state, part, rows_in(part, ranks))
    del held
