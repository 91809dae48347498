"""What an error says that came of full memory: what held it, and what needs less."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelx.fit_held import Held, device_use, held_by, resident
from accelx.fit_memory import is_full
from accelx.text import size

if TYPE_CHECKING:
    from accelx.records import Env
    from accelx.state import State

_ROWS = (
    "activations write accumulate(n), whose n ax.fit_batch finds, or "
    'remat(blocks), or with_precision("bf16")'
)


def say_full(error: BaseException, state: State, env: Env) -> None:
    """Add to an error of full memory what held it on this rank. Looks at no other."""
    if not is_full(error) or state.spent is not None:
        return
    held, largest = held_by(state)
    allocated, _, _, capacity = device_use(env.device)
    used = resident() if allocated is None else allocated
    placed = state.slots.get("shard_model")
    kind = None if placed is None else placed.engine.name
    error.add_note(full(env, kind, held, largest[:1], used, capacity))


def full(
    env: Env,
    kind: str | None,
    held: tuple[Held, ...],
    largest: tuple[tuple[str, str, int], ...],
    used: int | None,
    capacity: int | None,
) -> str:
    """Who holds how much, and what to write, first for what holds the most; pure.

    `kind` is that of the engine, `used` and `capacity` are bytes of the device.
    """
    parts: dict[str, int] = {}
    for one in held:
        parts[one.what] = parts.get(one.what, 0) + one.bytes
    there = [one for one in held if (one.device == "cpu") == (env.device == "cpu")]
    mine = sum(one.bytes for one in there)
    texts = [f"{what} {size(count)}" for what, count in parts.items()]
    rest = 0 if used is None else max(0, used - mine)
    texts += [f"activations and others {size(rest)}"] * (used is not None)
    whole = "" if capacity is None else f", of {size(capacity)}"
    most = "".join(f"; the largest is {name}, {size(n)}" for name, _, n in largest)
    remedies = [_ROWS, _for_state(env, kind)]
    if mine > rest:
        remedies.reverse()
    return (
        f"rank {env.rank} on {env.device} wanted more memory than there is; in use "
        f"were {', '.join(texts)}{whole}{most}. For {'; for '.join(remedies)}"
    )


def _for_state(env: Env, kind: str | None) -> str:
    if env.world == 1:
        return 'the state more ranks, with shard_model(env, "fsdp2")'
    if kind in ("fsdp2", "hsdp"):
        return f'the state more ranks, or shard_model(env, "{kind}", offload=True)'
    return 'the state write shard_model(env, "fsdp2")'
