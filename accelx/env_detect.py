"""Which launcher started this process, and where that puts it among the ranks.

Pure: a mapping in, an Env out. A reader of a launcher returns None where its variables
are not set, and the first one that returns an Env wins. Launchers nest (torchrun under
srun, mpirun inside a SLURM job), so the innermost come first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import attrs

from accelx.env_slurm import first_host, port_of, step_tasks, tasks_here
from accelx.env_vars import Vars, fail, place, placed
from accelx.records import Env


def detect(environ: Mapping[str, str]) -> Env:
    """Where this process stands, from the variables that its launcher has set.

    Knows accelx.spawn, torchrun, Open MPI, MVAPICH, PMI (MPICH, Hydra, Intel MPI),
    SLURM, Kubernetes operators, SageMaker and TPU hosts; none is one process alone.
    Reads `environ` and nothing else: the device stays "cpu" and the backend None.
    Raises DetectError where variables are missing or disagree, and lists what it found.
    """
    found = Vars(environ)
    readers = (_agent, _openmpi, _mvapich, _pmi, _slurm, _pods, _sagemaker, _tpu)
    for read in readers:
        env = read(found)
        if env is not None:
            return env
    return Env()


def _agent(found: Vars) -> Env | None:
    """accelx.spawn, torchrun, or a rank whose variables were written by hand."""
    if not found.some("LOCAL_RANK", "RANK", "ACCELX_LAUNCHER"):
        return None
    if found.some("RANK") and not found.some("LOCAL_RANK", "ACCELX_LAUNCHER"):
        return None  # an operator's pod, or written by hand under srun or mpirun
    rank, world, local = found.ints("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not found.some("GROUP_RANK", "TORCHELASTIC_RUN_ID"):
        for other in (_openmpi, _mvapich, _pmi, _slurm):
            other(found)  # raises where it says another rank
    size = found.int("LOCAL_WORLD_SIZE", found.int("LOCAL_SIZE"))
    if size is None and (world == 1 or found.loopback()):
        size = world
    if size is None:
        raise fail(found, "LOCAL_WORLD_SIZE is missing", "set it to the ranks per node")
    made = place(found, rank, world, local, size, node=found.int("GROUP_RANK"))
    if nodes := found.int("GROUP_WORLD_SIZE"):
        made = attrs.evolve(made, nodes=nodes)
    launcher = found.get("ACCELX_LAUNCHER") or "torchrun"
    return placed(found, made, launcher)


def _openmpi(found: Vars) -> Env | None:
    return _mpi(found, "openmpi", "OMPI_COMM_WORLD_")


def _mvapich(found: Vars) -> Env | None:
    return _mpi(found, "mvapich", "MV2_COMM_WORLD_")


def _mpi(found: Vars, launcher: str, prefix: str) -> Env | None:
    names = [prefix + name for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    if not found.some(names[0], names[1]):
        return None
    rank, world, local, size = found.ints(*names)
    return placed(
        found, place(found, rank, world, local, size), launcher, port=port_of(found)
    )


def _pmi(found: Vars) -> Env | None:
    """MPICH, Hydra and Intel MPI; `srun --mpi=pmi2` sets PMI_RANK too and is SLURM."""
    if not found.some("PMI_RANK", "PMI_SIZE"):
        return None
    rank, world = found.ints("PMI_RANK", "PMI_SIZE")
    if (found.int("SLURM_PROCID"), step_tasks(found)) == (rank, world):
        return None
    local = found.int("MPI_LOCALRANKID", found.int("PMI_LOCAL_RANK"))
    size = found.int("MPI_LOCALNRANKS", found.int("PMI_LOCAL_SIZE"))
    if world == 1:
        local, size = local or 0, size or 1
    if local is None or size is None:
        raise fail(
            found,
            "PMI_RANK is set without the rank on this node",
            "pass MPI_LOCALRANKID and MPI_LOCALNRANKS on to the ranks",
        )
    return placed(
        found, place(found, rank, world, local, size), "pmi", port=port_of(found)
    )


def _slurm(found: Vars) -> Env | None:
    """A task of srun. A shell of salloc or sbatch is one process, like any."""
    world = step_tasks(found)
    if world is None:
        return None
    rank, local, node = found.ints("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
    made = place(found, rank, world, local, tasks_here(found, node, world), node=node)
    nodes = found.int("SLURM_STEP_NUM_NODES")
    nodes = nodes or found.int("SLURM_NNODES", found.int("SLURM_JOB_NUM_NODES"))
    made = attrs.evolve(made, nodes=nodes or made.nodes)
    host = "127.0.0.1" if made.nodes == 1 else first_host(found)
    return placed(found, made, "slurm", host, port_of(found))


def _pods(found: Vars) -> Env | None:
    """One process in each pod of a Kubernetes training operator or indexed job."""
    if found.some("PET_NNODES", "PET_NPROC_PER_NODE"):
        _refuse_unread_torchrun(found)
    if not found.some("RANK", "WORLD_SIZE"):
        return None
    index = found.int("RANK", found.int("JOB_COMPLETION_INDEX"))
    world = found.int("WORLD_SIZE")
    if index is None or world is None:
        missing = "WORLD_SIZE" if world is None else "RANK"
        mend = f"set {missing}, or unset what was found to run one process"
        raise fail(found, f"{missing} is missing", mend)
    made = place(found, index, world, 0, 1, node=index)
    return placed(found, made, "kubernetes")


def _refuse_unread_torchrun(found: Vars) -> None:
    """PET_* are the arguments of a torchrun that was not used."""
    nodes = found.get("PET_NNODES") or "1"
    one_each = (found.get("PET_NPROC_PER_NODE") or "1") == "1"
    if one_each and (nodes == "1" or found.some("RANK")):
        return
    raise fail(
        found,
        "the operator has set torchrun's arguments (PET_*), but this process was not "
        "started by torchrun",
        'make the command "torchrun train.py": torchrun reads PET_* itself',
    )


def _sagemaker(found: Vars) -> Env | None:
    """One process on each host, as SageMaker's script mode starts them."""
    if not found.some("SM_HOSTS", "SM_CURRENT_HOST"):
        return None
    hosts = _hosts(found)
    here = found.get("SM_CURRENT_HOST")
    if here not in hosts:
        raise fail(
            found, f"SM_CURRENT_HOST is not one of {hosts}", "set SM_HOSTS to the hosts"
        )
    gpus = found.int("SM_NUM_GPUS") or 0
    if gpus > 1:
        raise fail(
            found,
            f"this is one process on a host of {gpus} GPUs, each of which wants a rank",
            f'start with "python -m accelx.spawn -n {gpus} train.py", or give the '
            'estimator distribution={"torch_distributed": {"enabled": True}}',
        )
    rank = hosts.index(here)
    made = place(found, rank, len(hosts), 0, 1, node=rank)
    return placed(found, made, "sagemaker", hosts[0], 7777)


def _hosts(found: Vars) -> list[str]:
    try:
        hosts = json.loads(found.get("SM_HOSTS") or "")
    except ValueError:
        hosts = None
    if not isinstance(hosts, list) or not hosts:
        raise fail(
            found, "SM_HOSTS is no JSON list of hosts", "set SM_HOSTS='[\"algo-1\"]'"
        )
    return [str(host) for host in hosts]


def _tpu(found: Vars) -> Env | None:
    """One process on each host of a TPU slice; its chips are one device to torch."""
    index = found.int("TPU_WORKER_ID", found.int("CLOUD_TPU_TASK_ID"))
    names = found.get("TPU_WORKER_HOSTNAMES")
    if index is None and names is None:
        alone = (found.get("PJRT_DEVICE") or "").upper() == "TPU"
        return Env(launcher="tpu") if alone else None
    hosts = [name.strip() for name in (names or "").split(",") if name.strip()]
    if index is None or not hosts:
        missing = "TPU_WORKER_HOSTNAMES" if index is not None else "TPU_WORKER_ID"
        raise fail(
            found, f"{missing} is missing", f"set {missing} as on the TPU's hosts"
        )
    made = place(found, index, len(hosts), 0, 1, node=index)
    return placed(found, made, "tpu", hosts[0], 29500)
