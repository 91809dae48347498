"""Gradients on one rank from one call of a loss: there is nothing to add up."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from accelx.cut import Args
from accelx.records import Engine, Loss, Out, timed
from accelx.rows import look
from accelx.state import State

Whole = Callable[[State, Args], tuple[State, Out]]


def alone(
    loss: Loss,
    engine: Engine,
    general: Callable[[Loss], Whole],
    ready: Callable[[State], None],
    failed: Callable[[BaseException, State], None],
) -> Whole:
    """What `general(loss)` gives, to the bit, in one function.

    A small step takes some 200 us, and each function on its way 0.4. All but a plain
    mean over the rows of one batch goes to the general one. `ready` refuses a state,
    `failed` tidies up.
    """
    whole = general(loss)
    plain = True  # until the loss returns something else than a mean alone

    def grads(state: State, args: Args) -> tuple[State, Out]:
        nonlocal plain
        marked, rows = look(args)
        if marked is not None:
            odd = marked.padded or marked.rows != marked.total or len(args) > 1
            rows = None if odd else marked.rows
        if not (plain and rows) or state.pending or "loss_scale" in state.slots:
            return whole(state, args)
        ready(state)
        try:
            result = loss(state.model, *args)
            plain = type(result) is Tensor and result.requires_grad and not result.ndim
            plain = plain and result.is_floating_point()
            if plain:
                out = Out(result.detach(), rows)
                engine.backward(state, result, 1.0)
                engine.settle(state, 1.0)
                if marked is not None and marked.waited is not None:
                    timed(out, marked.waited.take())
                return state, out
        except BaseException as error:
            failed(error, state)
            raise
        return general(lambda *_: result)(state, args)

    return grads
