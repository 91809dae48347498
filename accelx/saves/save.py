"""How ranks save one state: each its slices, then one the manifest, then the commit."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from accelx import comm, storage
from accelx.errors import CheckpointError, DamagedError
from accelx.match import Selector
from accelx.records import Env
from accelx.saves.boxes import whole
from accelx.saves.commit import (
    COMMIT,
    Commit,
    check_sizes,
    folder_name,
    write_commit,
)
from accelx.saves.contents import Contents, contents, rest
from accelx.saves.fingerprint import fingerprint
from accelx.saves.flat import Held
from accelx.saves.lie import local_at
from accelx.saves.manifest import MANIFEST, Manifest, Part, write_manifest
from accelx.saves.memory import inside
from accelx.saves.plan import Known, Plan
from accelx.saves.spread import check_selects, merged, stages_of
from accelx.saves.strict import digest, dumps
from accelx.saves.write import Slab, write_part
from accelx.state import State
from accelx.storage import Store

LATE = (0.1, 0.4, 1.6)  # seconds between looks at a listing that lacks something
Meet = Callable[[str, Any], list[Any]]  # (where, mine) -> every rank's, in rank order


@attrs.frozen(eq=False)
class Job:
    """A save that is decided: what this rank writes, and where."""

    env: Env
    store: Store
    slabs: Sequence[Slab]
    manifest: Manifest  # without its parts
    metrics: Mapping[str, float]


def decide(
    env: Env,
    state: State,
    url: str,
    select: Selector | None = None,
    metrics: Mapping[str, float] | None = None,
    base: Callable[[Mapping[str, Held]], Mapping[str, Any]] = lambda left: {},
    known: Known | None = None,
) -> Job:
    """The job of saving `state` under `url`. Two small collectives; nothing is written.

    `known` is what earlier saves of the caller's found. Raises CheckpointError on every
    rank if ranks hold different things.
    """
    known = known or Known(env.rank, env.world)
    rest("save_state", env, state)
    check_selects(state, "save_state", select)
    held, error = _held(env, state, select, known.memo)
    if (stages := stages_of(state)) is not None:
        held, error = merged(stages, held, error)
    plan = known.planned(held.lies)
    name = _agree(env, held, plan, error, folder_name(state.step))
    store = storage.inside(storage.at(url), name)
    manifest = Manifest(
        about(state.step, state.skipped, env.world),
        (),
        plan.layouts,
        plan.entries,
        held.aliases,
        held.values,
        base(held.left),
    )
    return Job(env, store, _slabs(known, held), manifest, metrics or {})


def about(step: int, skipped: int, world: int) -> dict[str, Any]:
    """What a manifest says of the run and of who wrote it."""
    return {
        "step": step,
        "skipped": skipped,
        "position": step + skipped,
        "world": world,
        "accelx": sys.modules["accelx"].__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _held(
    env: Env, state: State, select: Selector | None, memo: dict[Any, Any]
) -> tuple[Contents, Exception | None]:
    """What is saved, or why it cannot be; on several ranks for `_agree` to raise."""
    try:
        return contents(state, env, select, memo), None
    except Exception as error:  # a state_dict of the user's may raise anything
        if env.world == 1:
            raise
        return Contents({}, {}, {}, {}, {}), error


def _own(held: Contents) -> dict[str, str]:
    """Digests of what users write: of plain data and ties, and of buffers and slots.

    These are compared to the bit, since ranks share the writing. Of weights and
    optimizers ranks compare how they lie: steps keep them the same.
    """
    said = {k: digest(dumps(v)) for k, v in held.values.items()}
    said["ties"] = digest(dumps(held.aliases))
    for k in held.own:
        tensor = held.tensors[k]
        if isinstance(tensor, Tensor) and held.lies[k].slices is None:
            said[k] = f"{said.get(k, '')} {fingerprint(tensor)}"
    return said


def _agree(
    env: Env, held: Contents, plan: Plan, error: Exception | None, name: str
) -> str:
    """Rank 0's name for the folder, once all ranks describe the same state."""
    told = None if error is None else str(error)
    if told is not None and not isinstance(error, CheckpointError):
        told = f"{type(error).__name__}: {error}"
    own = _own(held)
    both = digest(dumps([own, plan.digest]))
    ranks = comm.gather_objects(env, (name, both, told))
    for rank, (_, _, failure) in enumerate(ranks):
        if failure is not None:
            raise CheckpointError(f"rank {rank}: {failure}") from error
    if len({one for _, one, _ in ranks}) > 1:
        raise CheckpointError(
            f"a checkpoint wants the same state on each of {env.world} ranks, but they "
            f"differ in {', '.join(_odd(env, own, plan))}; make it the same "
            "(ax.broadcast), or keep what is a rank's own out of the slots"
        )
    return ranks[0][0]


def _odd(env: Env, own: Mapping[str, str], plan: Plan) -> list[str]:
    """Up to five names under which ranks describe different things. A collective."""
    said = dict(own)
    for k, lies in plan.said.items():
        said[k] = f"{lies} {said.get(k, '')}"
    each = comm.gather_objects(env, said)
    names = {k: None for one in each for k in one}
    return [k for k in names if len({one.get(k) for one in each}) > 1][:5]


def _slabs(known: Known, held: Contents) -> list[Slab]:
    slabs = list[Slab]()
    for one in known.shares:
        data = local_at(held.tensors[one.name], one.box)
        if one.cut:
            data = inside(data, one.box, whole(one.entry.shape))
        entry = one.entry
        slabs.append(
            Slab(one.name, entry.number, one.piece, entry.dtype, one.shape, data)
        )
    return slabs


def run(job: Job, meet: Meet) -> str:
    """Write and commit; the URL of the checkpoint. Ends alike on every rank.

    `meet` is how ranks hear of each other. Raises CheckpointError on all of them if one
    fails; nothing is committed then. Effects: files under the job's folder.
    """
    told = _attempt(
        lambda: attrs.astuple(write_part(job.store, job.env.rank, job.slabs))
    )
    parts = _all(job, meet("written", told), "write its slices")
    told = _attempt(lambda: _commit(job, parts)) if job.env.main else (True, None)
    _all(job, meet("committed", told), "commit")
    return job.store.url


def _attempt(do: Callable[[], Any]) -> tuple[bool, Any]:
    """(True, result) or (False, what was raised), to tell the other ranks."""
    try:
        return True, do()
    except Exception as error:  # told to all ranks, each of which raises it
        return False, f"{type(error).__name__}: {error}"


def _all(job: Job, told: Sequence[tuple[bool, Any]], what: str) -> list[Any]:
    for rank, (fine, result) in enumerate(told):
        if not fine:
            raise CheckpointError(
                f"a checkpoint wants every rank to {what}, but rank {rank} failed at "
                f"{job.store.url}: {result}\nNothing was committed; earlier "
                "checkpoints are as they were. Mend the cause and save again"
            )
    return [result for _, result in told]


def _commit(job: Job, parts: Sequence[Any]) -> None:
    each = tuple(Part(*one) for one in parts)
    commit(job.store, attrs.evolve(job.manifest, parts=each), job.metrics)


def commit(store: Store, manifest: Manifest, metrics: Mapping[str, float]) -> None:
    """Write the manifest of parts that are there, and at last the commit."""
    data = write_manifest(manifest)
    storage.write(store, MANIFEST, [data], len(data))
    _seen(store, manifest)
    said = manifest.about
    last = write_commit(
        Commit(
            said["step"],
            said["position"],
            time.time(),
            said["world"],
            manifest.size,
            len(manifest.tensors),
            len(data),
            digest(data),
            metrics,
        )
    )
    storage.write(store, COMMIT, [last], len(last))


def _seen(store: Store, manifest: Manifest) -> None:
    """Refuse to commit what a reader would not find: some stores list late."""
    for wait in (*LATE, None):
        try:
            return check_sizes(store, manifest)
        except DamagedError as error:
            if wait is None:
                raise CheckpointError(
                    f"rank 0 does not see what the others wrote ({error}); save into a "
                    "folder that all nodes share, or to an object store"
                ) from None
            time.sleep(wait)
    return None
