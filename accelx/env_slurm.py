"""How SLURM writes down the tasks and hosts of a job step."""

from __future__ import annotations

import re
import zlib

from accelx.env_vars import Vars, fail

# A shell of salloc or sbatch is a step with a number of its own; slurm.h, SLURM_*_STEP.
SHELL_STEPS = 0xFFFFFFF0


def step_tasks(found: Vars) -> int | None:
    """How many tasks srun started together with this one; None outside of srun."""
    step = found.int("SLURM_STEP_ID", found.int("SLURM_STEPID"))
    if step is None or step >= SHELL_STEPS or not found.some("SLURM_PROCID"):
        return None
    tasks = found.int("SLURM_STEP_NUM_TASKS", found.int("SLURM_NTASKS"))
    if tasks is None:
        tasks = found.int("SLURM_NPROCS")
    if tasks is None:
        raise fail(
            found, "SLURM_NTASKS is missing", "write srun --ntasks=N, or unset SLURM_*"
        )
    return tasks


def tasks_here(found: Vars, node: int, world: int) -> int:
    """How many tasks of this step are on node number `node`."""
    text = found.get("SLURM_STEP_TASKS_PER_NODE") or found.get("SLURM_TASKS_PER_NODE")
    counts = _counts(found, text) if text else []
    if sum(counts) == world and node < len(counts):
        return counts[node]
    each = found.int("SLURM_NTASKS_PER_NODE")
    nodes = found.int("SLURM_STEP_NUM_NODES", found.int("SLURM_NNODES")) or 1
    if each is not None and each * nodes == world:
        return each
    return -(-world // nodes)


def _counts(found: Vars, text: str) -> list[int]:
    """The tasks of each node in "2(x3),1"."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", part)
        if match is None:
            raise fail(
                found, f"{text!r} is no count of tasks", 'it is written like "2(x3),1"'
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(found: Vars) -> str | None:
    """The first host of "n[01-03,7],m2", which is where task 0 runs."""
    text = found.get("SLURM_STEP_NODELIST") or found.get("SLURM_JOB_NODELIST")
    text = text or found.get("SLURM_NODELIST")
    if text is None:
        return None
    # The first range of each bracket, up to the first comma outside of brackets.
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", _first(text))


def _first(text: str) -> str:
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            return text[:at]
    return text


def port_of(found: Vars) -> int:
    """A port, 15000 to 24999: the same for all ranks of one job, other for others."""
    job = found.get("SLURM_JOB_ID") or found.get("SLURM_JOBID") or ""
    names = ("SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_PORT")
    told = [job, *(found.get(name) or "" for name in names)]
    return 15000 + zlib.crc32(" ".join(told).encode()) % 10000
