"""A pipeline at work: init, feed, grads, apply, step, measure."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import attrs
import torch
from torch import nn

from accelx import gradients, tree
from accelx.cut import rows_in
from accelx.data.stream import Stream
from accelx.engines.copies import furnished
from accelx.engines.methods import say_sliced
from accelx.engines.placed import UNPLACED, engine_of, seal
from accelx.env_part import rows_env
from accelx.errors import DataError, PlacementError
from accelx.fit_full import say_full
from accelx.gradients import env_of
from accelx.gradients_read import check_loss, check_scalar
from accelx.loader import Loader, as_loader, batches
from accelx.optimizers import make
from accelx.records import Loss, Mean, Out, Transform, made_in, moved
from accelx.run_told import under_way
from accelx.state import (
    State,
    check_state,
    frozen_in,
    spend,
    stepped,
    trainable,
)
from accelx.transform import check_transform

Step = Callable[..., tuple[State, Out]]


def init(
    tx: Transform,
    model: nn.Module | Callable[[], nn.Module],
    optim: Callable[[Any], Any] | None = None,
) -> State:
    """Place the model, make optimizers over it, open each pass's slot: the first State.

    `model` is a module or a function that makes one; `optim` maps the placed model to
    an optimizer, or to a list of them, and is left out for a model that is not trained.
    The model is changed in place, its object, class and names stay (L8). Raises
    PlacementError for a module placed twice, an optimizer object in place of a
    function, or parameters that no optimizer moves.
    """
    check_transform("init", tx)
    if not isinstance(model, nn.Module) and not callable(model):
        raise TypeError(
            f"ax.init wants a torch.nn.Module or a function that makes one, got "
            f"{type(model).__name__}; write ax.init(tx, lambda: Net(...), optim)"
        )
    state = State(model)
    for one in tx:
        if one.place is not None:
            state = one.place(state, tx)
    state = _placed(state, tx)
    state = attrs.evolve(
        state,
        optimizers=make(optim, state.model),
        trained=trainable(state.model),
        still=frozen_in(state.model),
    )
    for one in tx:
        if one.start is not None:
            state = one.start(state, tx)
    for one in tx:
        if one.restore is not None:
            state = one.restore(state, tx)
    return state


def _placed(state: State, tx: Transform) -> State:
    """The state with a module in it also where no pass placed one."""
    if "shard_model" in state.slots:
        return state
    model = furnished(state.model, tx)
    seal(model)
    return attrs.evolve(state, model=model)


def feed(
    tx: Transform,
    loader: Any,
    start: int | State = 0,
    stop: int | None = None,
) -> Iterator[Any]:
    """Batches on this rank's device, from step `start` up to `stop`, in O(1).

    `loader` is a torch DataLoader, a Loader, or a stream. `start` is a step, or a
    State, which also counts batches that a skipped update used, and holds where a
    stream stands. Without `stop` the batches end with the epoch in which `start` lies;
    with it they go on through as many epochs as it takes, each in an order of its own.
    The batch at step k depends on the dataset, the seed and k alone (L10).
    """
    check_transform("feed", tx)
    made: Loader | Stream = as_loader(loader)
    for one in tx:
        if one.feed is not None:
            made = one.feed(made)
    placed = tx.find("shard_model")
    ranks = 1 if placed is None else rows_env(placed.env).world
    if placed is not None and made.world != ranks:
        raise DataError(
            f"the model is on {ranks} ranks with rows of their own and the data cut "
            f"for {made.world}, so rows would count more than once; put "
            "shard_loader(env) and shard_model(env) of the same env into the chain"
        )
    if not isinstance(start, State):
        return batches(made, start, stop)
    return batches(made, start.position, stop, start.slots.get("shard_loader"))


def grads(tx: Transform, loss: Loss) -> Step:
    """The first half of a step: (State, *args) -> (State, Out) with whole gradients.

    `loss(model, *args)` returns a scalar that is a mean over rows, a Mean, or one of
    them with aux. Gradients are added to those that the state has not applied yet,
    reduced over ranks, unscaled and not clipped. Spends the state.
    """
    check_transform("grads", tx)
    check_loss("grads", loss)
    run = gradients.pipeline(tx, loss)

    def gradients_of(state: State, *args: Any) -> tuple[State, Out]:
        check_state("grads", state)
        began = perf_counter()
        with under_way("grads", state, loss, args):
            after, out = run(state, args)
        times = {**out.times, "grads": perf_counter() - began}
        out = attrs.evolve(out, late=None, times=times)
        after = attrs.evolve(after, pending=True)
        spend(state, f"grads at step {after.step}")
        return after, out

    return gradients_of


def apply(tx: Transform) -> Step:
    """The second half: (State, Out) -> (State, Out), clip, schedule, update.

    Spends the state.
    """
    check_transform("apply", tx)
    run = _update(tx)

    def applied(state: State, out: Out) -> tuple[State, Out]:
        check_state("apply", state)
        if not state.optimizers:
            raise _unmoved("apply")
        with under_way("apply", state):
            return _spending(run, state, state, out, out.times.get("grads", 0.0))

    return applied


def step(tx: Transform, loss: Loss) -> Step:
    """A training step, (State, *args) -> (State, Out): apply after grads.

    The batch in `args` is this rank's part of the global batch; `Out.loss` is the mean
    over all of it. Spends the state: go on with the one that it returns (L7).
    """
    check_transform("step", tx)
    check_loss("step", loss)
    first, second = gradients.pipeline(tx, loss), _update(tx, own=True)

    def one_step(state: State, *args: Any) -> tuple[State, Out]:
        if type(state) is not State or state.spent is not None:
            check_state("step", state)
        if not state.optimizers:
            raise _unmoved("step")
        began = perf_counter()
        if state.slots.get("shard_model", UNPLACED).env.world == 1:  # waits for nobody
            after, out = first(state, args)
            return _spending(second, state, after, out, perf_counter() - began)
        with under_way("step", state, loss, args):
            after, out = first(state, args)
            return _spending(second, state, after, out, perf_counter() - began)

    return one_step


def _unmoved(name: str) -> PlacementError:
    return PlacementError(
        f"ax.{name} wants an optimizer to move the weights, got a state without one; "
        "write ax.init(tx, model, lambda m: AdamW(m.parameters(), 3e-4)), or ax.measure"
        " to evaluate"
    )


def _spending(
    run: Step, state: State, after: State, out: Out, seconds: float
) -> tuple[State, Out]:
    """`run(after, out, seconds)`; spends `state`, also where it fails half-way."""
    number = state.step
    try:
        after, out = run(after, out, seconds)
    except BaseException as error:
        say_full(error, after, env_of(after))
        spend(state, f"step {number}, which failed half-way")
        raise
    spend(state, f"step {number}")
    return after, out


def _update(tx: Transform, own: bool = False) -> Step:
    """Passes before, the optimizers, passes after; what the engine does is left out.

    `own`: nobody has the report of the gradients but who calls this.
    """

    def whole(state: State, out: Out, seconds: float) -> tuple[State, Out]:
        state, out = update(state, out, seconds)
        for over in last:
            state, out = over(state, out)
        return state, out

    def update(state: State, out: Out, seconds: float) -> tuple[State, Out]:
        began = perf_counter()
        engine = state.slots.get("shard_model", UNPLACED).engine
        active = acting and [p for p in acting if p.name not in engine.handles]
        for one in active:
            if one.before is not None and out.skipped is None:
                state, out = one.before(state, out)
        if out.skipped is not None:
            (engine.drop or _drop)(state)
            return stepped(state, made=False), out
        engine.update(state)
        torch.clear_autocast_cache()  # 0.1 us; an autocast around keeps old weights
        took = perf_counter() - began
        times = {**out.times, "grads": seconds, "update": took}
        state, out = stepped(state, made=True), finish(out, times)
        for one in active:
            if one.after is not None:
                state, out = one.after(state, out)
        return state, out

    finish = made_in if own and not any(p.before or p.backward for p in tx) else moved
    acting = [p for p in tx if p.before is not None or p.after is not None]
    last: list[Any] = [p.done for p in tx if p.done is not None]
    return whole if last else update


def _drop(state: State) -> None:
    state.model.zero_grad(set_to_none=True)


def measure(tx: Transform, fn: Loss) -> Callable[..., Any]:
    """An evaluation step: (State, *args) -> this rank's Means, with no gradient.

    `fn(model, *args)` returns a scalar that is a mean over rows, a Mean, or a tree of
    them; the result has a Mean for each, and rows that only pad count for nothing. Of
    batches with static shapes only a Mean is taken, with `row_weights` in it. Add them
    up over batches, then `reduce` over ranks: exact on any number of ranks. The
    state is not spent, the model is in evaluation mode.
    """
    check_transform("measure", tx)
    for one in tx:
        if one.forward is not None:
            fn = one.forward(fn)
    last = [one.done for one in tx if one.done is not None]

    def measured(state: State, *args: Any) -> Any:
        marked = rows_in(args, env_of(state).world)
        rows = marked.rows
        with evaluating(state) as model:
            result = fn(model, *args)

        def one(leaf: Any) -> Any:
            if isinstance(leaf, Mean):
                total, weight = (
                    torch.as_tensor(leaf.total),
                    torch.as_tensor(leaf.weight),
                )
            elif marked.padded:
                raise gradients.plain_mean("a number that ax.measure takes")
            else:
                check_scalar(leaf)
                total = torch.as_tensor(leaf) * (rows or 1)
                weight = torch.tensor(rows or 1)
            if not rows:  # the same kind on each rank, and nothing even if nan
                total, weight = torch.zeros_like(total), torch.zeros_like(weight)
            return Mean(total, weight)

        means = tree.map_leaves(one, result, lambda node: isinstance(node, Mean))
        for over in last:
            over(state, None)
        return means

    return measured


@contextmanager
def evaluating(state: State) -> Generator[Any]:
    """The model in evaluation mode, without gradients. The state is not spent."""
    check_state("evaluating", state)
    modes = {m: m.training for m in state.model.modules()}
    state.model.eval()
    try:
        with torch.no_grad():
            yield state.model
    except RuntimeError as error:
        say_sliced(error)
        raise
    finally:
        for module, training in modes.items():
            module.training = training
        _rest(state)


@contextmanager
def frozen(state: State) -> Generator[Any]:
    """The model as a critic: gradients flow through it, none into it, none are reduced.

    For another model's step: pass it to that step as an argument.
    """
    check_state("frozen", state)
    trained = [p for p in state.model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        with engine_of(state).quiet(state):
            yield state.model
    finally:
        for p in trained:
            p.requires_grad_(True)
        _rest(state)


def _rest(state: State) -> None:
    placed = state.slots.get("shard_model")
    if placed is not None:
        placed.rest()
