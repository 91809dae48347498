"""Whether all ranks go on to the next weight, and if not, which of them left it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import attrs

from accelx import _torch, comm
from accelx.comm_wire import grouped
from accelx.errors import CollectiveError
from accelx.records import Env

GO, LEFT = b"go", b"left"
SHORT, LONG = 1e-4, 1e-2  # seconds between two looks at the store: at first, at most
PATIENCE = 1800.0  # seconds: as long as torch lets a collective wait


@attrs.frozen(eq=False)
class Room:
    """Where ranks leave word for each other: keys of the store, no collective.

    A collective that a rank does not reach would take the process group with it.
    """

    env: Env
    store: Any
    names: tuple[str, ...]  # of the weights, in the order in which they come
    timeout: float  # seconds


def room(env: Env, said: Mapping[str, str], timeout: float | None) -> Room:
    """A room of these ranks' own. One small collective.

    Raises CollectiveError on all ranks if they do not say the same of each weight.
    """
    wait = PATIENCE if timeout is None else timeout
    if env.world == 1:
        return Room(env, None, tuple(said), wait)
    ranks = comm.gather_objects(env, (secrets.token_hex(8), dict(said)))
    texts = [told for _, told in ranks]
    if any(list(told.items()) != list(texts[0].items()) for told in texts):
        every = {name: None for told in texts for name in told}
        odd = [n for n in every if len({told.get(n) for told in texts}) > 1]
        shown = ", ".join(odd[:5]) or "their order"
        raise CollectiveError(
            f"stream_weights wants the same weights on each of {env.world} ranks, but "
            f"they differ in {shown}; make the same model on all of them"
        )
    store = _torch.prefixed(f"accelx/stream/{ranks[0][0]}", _torch.default_store())
    return Room(env, store, tuple(said), wait)


def leave(here: Room, at: int) -> None:
    """Tell the others that this rank does not come to weight `at`. Waits for none."""
    if here.store is not None:
        with suppress(*_torch.store_errors()):  # gone, as are those who could read it
            here.store.set(f"{at}/{here.env.rank}", LEFT)


def meet(here: Room, at: int) -> None:
    """Wait until all ranks come to weight `at`, or behind the last.

    If one left, or does not come in time, CollectiveError on each, in the same words.
    """
    if here.store is None:
        return
    keys = [f"{at}/{rank}" for rank in range(here.env.world)]
    with _served():
        here.store.set(keys[here.env.rank], GO)
        told = _told(here, keys)
        found = _verdict(here, at, told).encode()
        # ranks may look at different moments: the first to say what it found counts
        agreed = here.store.compare_set(f"{at}/agreed", "", found)
        # all have come here, so none looks back
        if here.env.main and at and agreed == GO:
            for key in (*range(here.env.world), "agreed"):
                here.store.delete_key(f"{at - 1}/{key}")
    if agreed != GO:
        raise CollectiveError(agreed.decode())


@contextmanager
def _served() -> Generator[None]:
    try:
        yield
    except _torch.store_errors() as error:
        raise CollectiveError(
            "stream_weights wants the store that ranks meet in, but the rank that "
            f"serves it is gone ({error}); look at what it raised"
        ) from error


def _told(here: Room, keys: Sequence[str]) -> list[bytes | None]:
    """What each rank said; None of one that did not in time."""
    end, pause = time.monotonic() + here.timeout, SHORT
    while not here.store.check(keys) and time.monotonic() < end:
        time.sleep(pause)
        pause = min(2 * pause, LONG)
    return [here.store.get(k) if here.store.check([k]) else None for k in keys]


def _verdict(here: Room, at: int, told: Sequence[bytes | None]) -> str:
    if all(one == GO for one in told):
        return GO.decode()
    last = f"at {here.names[at - 1]!r}" if at else "before the first"
    words = {LEFT: "left", None: f"took more than {here.timeout:g} s"}
    ranks = grouped([words.get(one, "") for one in told])
    ends = " and ".join(f"{ranks[w]} {w} {last}" for w in words.values() if w in ranks)
    return (
        f"stream_weights wants every rank to take all {len(here.names)} weights, but "
        f"{ends}; look at what was raised there, or give a slow consumer more time: "
        "timeout=..."
    )
