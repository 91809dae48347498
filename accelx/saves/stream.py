"""How a sharded model's weights come by one at a time, whole, on all ranks."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from accelx import _torch, comm
from accelx.comm_wire import together
from accelx.engines import apart
from accelx.errors import CheckpointError
from accelx.records import Env, check_env
from accelx.saves.contents import rest, state_tensors
from accelx.saves.flat import Flat, Held
from accelx.saves.meeting import Room, leave, meet, room
from accelx.saves.spread import stages_of
from accelx.state import State, check_state


def stream_weights(
    env: Env, state: State, timeout: float | None = None
) -> Generator[tuple[str, Tensor]]:
    """Every weight and persistent buffer in full, one (name, tensor) at a time.

    In the model's order, the same on all ranks, tied ones once under their first name;
    on `env.device`, without gradient. A sharded tensor is gathered when it is asked
    for, so that one is held at a time: let go of it before the next. Another is the
    model's own memory: read it, do not write. The state is not spent.

    Ranks go on together. If a consumer leaves, by an exception or `break`, or needs
    more than `timeout` seconds (None: 1800) for one weight, every rank that still
    waits raises the same CollectiveError, which says which rank and where; the rank
    that left keeps its own exception. A stream that is kept in a variable is left when
    it is closed: `with contextlib.closing(stream):`.

    The call is a collective, and so is each weight. Raises CheckpointError for a model
    that no pass placed on several ranks, CollectiveError for models that differ.
    """
    check_env("stream_weights", env)
    check_state("stream_weights", state)
    if timeout is not None and not timeout > 0:
        raise ValueError(
            f"stream_weights(timeout=...) wants seconds above 0, got {timeout!r}; "
            "write timeout=60.0, or leave it out"
        )
    held = held_weights("stream_weights", env, state)
    if packed_of(state):
        raise CheckpointError(
            "stream_weights wants weights as floats, but those of "
            f"{', '.join(packed_of(state)[:5])} are packed by quantize; read what is "
            "trained from state.model, or write export((env, state), url, only=...)"
        )
    return streamed(env, held, timeout)


def held_weights(name: str, env: Env, state: State) -> dict[str, Held]:
    """Weights and persistent buffers of a state by their first names."""
    together(env, name)
    rest(name, env, state)
    apart.agreed(state, name)
    if stages_of(state) is not None:
        raise CheckpointError(
            f"{name} wants every rank to know all weights, but the model is cut into "
            "stages; write url = ax.save_state(env, url)(state), and take it from there"
        )
    return state_tensors(state)[0]


def packed_of(state: State) -> list[str]:
    """Names of weights that `quantize` has packed."""
    slot = state.slots.get("quantize")
    return [] if slot is None else list(slot.weights)


def packed_in(values: Mapping[str, Any]) -> list[str]:
    """The same, of the values of a manifest."""
    match values.get("slots.quantize"):
        case {"v": {"weights": weights}}:
            return list(weights)
        case _:
            return []


def streamed(
    env: Env, held: Mapping[str, Held], timeout: float | None
) -> Generator[tuple[str, Tensor]]:
    """The tensors of `held` in its order, as `stream_weights` gives them."""
    said = {name: f"{t.dtype} {tuple(t.shape)}" for name, t in held.items()}
    stream = _stream(room(env, said, timeout), held)
    next(stream)
    return stream


def _stream(here: Room, held: Mapping[str, Held]) -> Generator[tuple[str, Tensor]]:
    with _leaving(here, 0):  # a generator that was never started ends without a word
        yield "", torch.empty(0, device="cpu")
    for at, (name, tensor) in enumerate(held.items()):
        meet(here, at)
        with _leaving(here, at + 1):
            yield name, _full(here.env, tensor)
    meet(here, len(held))


@contextmanager
def _leaving(here: Room, at: int) -> Generator[None]:
    try:
        yield
    except BaseException:  # GeneratorExit, mostly: the consumer has left
        leave(here, at)
        raise


def _full(env: Env, tensor: Any) -> Tensor:
    if isinstance(tensor, Flat):
        return comm.gather(env, tensor.local).view(tensor.shape)
    tensor = tensor.detach()
    return tensor.full_tensor() if _torch.is_dtensor(tensor) else tensor
