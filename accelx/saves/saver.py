"""Saves that a chain makes: now or beside the training, and what is removed after."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import attrs

from accelx import comm, storage
from accelx.errors import CheckpointError, CheckpointWarning
from accelx.match import Selector
from accelx.records import Env, Mean
from accelx.saves.background import Background
from accelx.saves.commit import (
    COMMIT,
    check_sizes,
    found,
    look,
    open_manifest,
    step_of,
)
from accelx.saves.fingerprint import fingerprints
from accelx.saves.plan import Known
from accelx.saves.retain import Retain
from accelx.saves.save import Job, decide, run
from accelx.state import State, Transient


@attrs.define(eq=False)
class Saver(Transient):
    """The slot "save_state": where saves go, and the one that is under way."""

    env: Env
    url: str
    keep: Retain | None = None
    wait: bool = True
    select: Selector | None = None
    base: Mapping[str, Any] | None = None  # fingerprints of weights that are left out
    background: Background = attrs.field(factory=Background)
    known: Known = attrs.field(  # of the saves before
        default=attrs.Factory(lambda self: Known(self.env.rank, self.env.world), True)
    )
    saved: int = -1  # the position that was saved last
    told: bool = False  # whether it was looked for what a user should hear once

    def __deepcopy__(self, memo: dict[int, Any]) -> Saver:
        return self  # a fork saves to the same place

    def save(self, state: State, metrics: Mapping[str, float], wait: bool) -> str:
        """Save `state`; with `wait` it is committed on return."""
        self.background.join()
        check_select(state, self.select)
        rest = self.select, metrics, self._fingerprints, self.known
        job = decide(self.env, state, self.url, *rest)
        self.saved = state.position
        if wait:
            url = run(job, lambda _, told: comm.gather_objects(self.env, told))
            self._after(job)
            return url
        self.background.start(job, self._after)
        return job.store.url

    def _fingerprints(self, left: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.base is None:
            self.base = fingerprints(self.env, left) if left else {}
        return self.base

    def _after(self, job: Job) -> None:
        """What rank 0 does once a save is committed."""
        if not self.env.main:
            return
        if not self.told:
            self.told = True
            _say_later(self.url, job)
            _say_unscored(self.keep, job)
        if self.keep is not None:
            self._retain(job, self.keep)

    def _retain(self, job: Job, keep: Retain) -> None:
        """Remove what `keep` lets go, once the new commit has been read back."""
        try:
            listing = found(self.url)
            new = next((one for one in listing if one.url == job.store.url), None)
            if new is None or new.commit is None:
                return  # the store lists late: the next save removes what this one may
            check_sizes(*open_manifest(new))
        except (OSError, CheckpointError) as error:
            _warn(f"{job.store.url} was not read back, so no older one goes", error)
            return
        for one in keep(listing):
            if one.name != new.name:
                try:
                    storage.remove_folder(storage.at(one.url), first=[COMMIT])
                except OSError as error:
                    _warn(f"the old checkpoint {one.url} could not be removed", error)


def _warn(what: str, error: Exception) -> None:
    """Say that no room was made: the run goes on, since nothing is wrong with it."""
    warnings.warn(f"{what}: {error}", CheckpointWarning, stacklevel=2)


def _say_later(url: str, job: Job) -> None:
    """Warn of checkpoints of later steps: a run that went back is not gone on with."""
    step = job.manifest.about["step"]
    store = storage.at(url)
    try:
        names = [n for n in storage.sizes(store) if (step_of(n) or 0) > step]
        later = [n for n in names if look(storage.inside(store, n), n).commit]
    except OSError as error:
        _warn(f"{store.url} could not be looked through for later steps", error)
        return
    if later:
        warnings.warn(
            f"step {step} was saved under {store.url}, where {max(later)} is of a "
            "later step: load_state takes that one, and keep=... counts it. After "
            "going back, save under another URL, or remove what you went back from",
            CheckpointWarning,
            stacklevel=2,
        )


def _say_unscored(keep: Any, job: Job) -> None:
    """Warn of a metric that no save has, since the best would not be kept."""
    best = getattr(keep, "best", None)
    if best and job.metrics and best[0] not in job.metrics:
        warnings.warn(
            f"retain(best=...) wants a metric of the step, got {best[0]!r}, and the "
            f"step has {', '.join(job.metrics)}; return it in a dict as the loss's aux",
            CheckpointWarning,
            stacklevel=2,
        )


def anchored(url: str) -> str:
    """`url`, or for a path the absolute one: a later chdir must not move a run.

    Raises what `storage.at` raises for a URL that nothing could be saved under.
    """
    store = storage.at(url)
    if step_of(store.root.rpartition("/")[2]) is not None:
        raise ValueError(
            f"a run wants a folder for its checkpoints, got {store.url}, which is "
            "named as one checkpoint is, and would be taken for it; name the one above"
        )
    return (store.root or "/") if store.local else url


def check_select(state: State, select: Selector | None) -> None:
    """Refuse to leave out a weight that is trained."""
    from accelx.saves.contents import selected

    lost = [n for n, p in state.trained if not selected(select, n, p)]
    if lost:
        raise CheckpointError(
            f"save_state(select=...) wants to keep every weight that is trained, but "
            f"{select!r} leaves out {', '.join(lost[:5])}; freeze them, or write "
            'select="trainable"'
        )


def metrics_of(out: Any) -> dict[str, float]:
    """The loss, and the numbers of an aux that is a dict, for `retain(best=...)`."""
    numbers: dict[str, float] = {"loss": float(out.loss)}
    aux = out.aux if isinstance(out.aux, Mapping) else {}
    for name, value in aux.items():
        number = value.value if isinstance(value, Mean) else value
        if isinstance(number, int | float) or (
            hasattr(number, "dim") and not number.dim()
        ):
            numbers[str(name)] = float(number)
    return {k: v for k, v in numbers.items() if v - v == 0}  # JSON has finite numbers
