"""Which checkpoint all ranks load, and what they do when it is damaged."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import attrs

from accelx import storage
from accelx.errors import CheckpointError, CheckpointWarning, DamagedError
from accelx.records import Env
from accelx.saves.commit import (
    COMMIT,
    Found,
    check_sizes,
    found,
    open_manifest,
    resolve,
    step_of,
)
from accelx.saves.load import Only, Rename, load
from accelx.saves.manifest import Manifest
from accelx.saves.together import Failure, from_main, outcome
from accelx.state import State, Transient
from accelx.storage import Store


@attrs.frozen
class Loaded(Transient):
    """The slot "load_state": what was loaded, or that nothing was there."""

    url: str | None = None
    step: int = 0
    skipped: tuple[str, ...] = ()  # newer checkpoints that were passed over, and why


@attrs.frozen
class Wish:
    """What to load."""

    missing: str = "error"
    rename: Rename = None
    only: Only = None
    verify: str = "touched"
    fallback: bool = False


def restored(env: Env, state: State, url: str, wish: Wish) -> State:
    """The state with the newest checkpoint under `url` in it; the slot says which.

    All ranks take the same one, and all raise if one of them cannot read it.
    """
    offered, passed = _offered(env, url)
    skipped = [f"{one.name}: {one.why}" for one in passed]
    _say(env, [f"{f} was passed over" for f in skipped])
    if not offered:
        if wish.missing == "fresh":
            return _noted(state, Loaded(skipped=tuple(skipped)))
        raise CheckpointError(
            f"load_state wants a checkpoint under {storage.at(url).url}, found none "
            "that is whole; write the URL that save_state was given, or "
            'load_state(..., missing="fresh") to start without one'
        )
    for one in offered:
        install, failure = _tried(env, state, one, wish)
        if install is not None:
            return _noted(install(), Loaded(one.url, one.step, tuple(skipped)))
        assert failure is not None
        if not wish.fallback or not (failure.damaged or failure.unread):
            raise failure.error
        skipped.append(f"{one.name}: {failure.text}")
        _say(env, [f"{one.name} was passed over, the one before taken: {failure.text}"])
    raise DamagedError(
        f"load_state wants a checkpoint under {storage.at(url).url} that can be read, "
        f"but all are damaged:\n  {chr(10).join(skipped)}"
    )


def _noted(state: State, loaded: Loaded) -> State:
    from accelx.state import with_slot

    return with_slot(state, "load_state", loaded)


def _say(env: Env, lines: list[str]) -> None:
    for line in lines if env.main else ():
        warnings.warn(line, CheckpointWarning, stacklevel=6)


def _offered(env: Env, url: str) -> tuple[list[Found], list[Found]]:
    """Checkpoints to try, newest first, and those whose commit is damaged."""
    try:
        listing = from_main(env, lambda: _listed(url))
    except DamagedError:  # the one checkpoint that was named
        raise
    except Exception as error:
        raise CheckpointError(
            f"load_state wants to list {storage.at(url).url}, but: {error}; mend the "
            "URL or the store"
        ) from error
    whole = [one for one in listing if one.commit is not None]
    newest = whole[-1].step if whole else -1
    odd = [one for one in listing if one.commit is None and one.step >= newest]
    return whole[::-1], [one for one in odd if one.why != "it has no commit"]


def _listed(url: str) -> list[Found]:
    store = storage.at(url)
    last = url.rstrip("/").rpartition("/")[2]
    if step_of(last) is not None or COMMIT in storage.sizes(store):
        return [resolve(url)]
    return found(url)


def _tried(
    env: Env, state: State, one: Found, wish: Wish
) -> tuple[Callable[[], State] | None, Failure | None]:
    """What installs a checkpoint that was read, or why none of the ranks does."""
    opened, failure = outcome(env, lambda: _opened(env, one))
    if opened is None:
        return None, failure
    store, manifest = opened
    rest = wish.rename, wish.only, wish.verify
    return outcome(env, lambda: load(env, state, store, manifest, *rest))


def _opened(env: Env, one: Found) -> tuple[Store, Manifest]:
    store, manifest = open_manifest(one)
    if env.main:
        check_sizes(store, manifest)
    return store, manifest
