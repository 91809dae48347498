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
from accelx.saves.memory import flat, inside
from accelx.saves.plan import Plan, planned
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
) -> Job:
    """The job of saving `state` under `url`. Two small collectives; nothing is written.

    Raises CheckpointError on every rank if ranks hold different things.
    """
    rest("save_state", env, state)
    check_selects(state, "save_state", select)
    held, error = _held(env, state, select)
    if (stages := stages_of(state)) is not None:
        held, error = merged(stages, held, error)
    plan = planned(held.lies, env.world)
    name = _agree(env, _said(held, plan), error, folder_name(state.step))
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
    return Job(env, store, _slabs(env, plan, held), manifest, metrics or {})


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
    env: Env, state: State, select: Selector | None
) -> tuple[Contents, Exception | None]:
    """What is saved, or why it cannot be; on several ranks for `_agree` to raise."""
    try:
        return contents(state, env.rank, env.world, env.device, select), None
    except Exception as error:  # a state_dict of the user's may raise anything
        if env.world == 1:
            raise
        return Contents({}, {}, {}, {}, {}), error


def _said(held: Contents, plan: Plan) -> dict[str, str]:
    """By what ranks compare their states: what must be one and the same on each.

    Of weights and optimizers it is how they lie: steps keep them the same. What users
    write into buffers and slots is compared to the bit, since ranks share the writing.
    """
    said = {k: digest(dumps(v)) for k, v in held.values.items()}
    said["ties"] = digest(dumps(held.aliases))
    cuts = [digest(repr(layout).encode()) for layout in plan.layouts]
    for k, e in plan.entries.items():
        said[k] = f"{e.dtype} {e.shape} {cuts[e.layout]}"
        tensor = held.tensors.get(k)  # other stages may have it
        if k in held.own and isinstance(tensor, Tensor) and not _is_cut(held, k):
            said[k] += f" {fingerprint(tensor)}"
    return said


def _is_cut(held: Contents, name: str) -> bool:
    return held.lies[name].slices is not None


def _agree(env: Env, said: dict[str, str], error: Exception | None, name: str) -> str:
    """Rank 0's name for the folder, once all ranks describe the same state."""
    told = None if error is None else str(error)
    if told is not None and not isinstance(error, CheckpointError):
        told = f"{type(error).__name__}: {error}"
    ranks = comm.gather_objects(env, (name, digest(dumps(said)), told))
    for rank, (_, _, failure) in enumerate(ranks):
        if failure is not None:
            raise CheckpointError(f"rank {rank}: {failure}") from error
    if len({one for _, one, _ in ranks}) > 1:
        each = comm.gather_objects(env, said)
        names = {k: None for one in each for k in one}
        odd = [k for k in names if len({one.get(k) for one in each}) > 1]
        raise CheckpointError(
            f"a checkpoint wants the same state on each of {env.world} ranks, but they "
            f"differ in {', '.join(odd[:5])}; make it the same (ax.broadcast), or keep "
            "what is a rank's own out of the slots"
        )
    return ranks[0][0]


def _slabs(env: Env, plan: Plan, held: Contents) -> list[Slab]:
    slabs = list[Slab]()
    for name, piece, box in plan.of(env.rank):
        entry = plan.entries[name]
        local = local_at(held.tensors[name], box)
        if held.lies[name].slices is None:  # whole on each rank, and cut between them
            local = inside(local, box, whole(entry.shape))
        data = flat(local)
        slabs.append(Slab(name, entry.number, piece, entry.dtype, box.shape, data))
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
