"""Launchers are told apart by their variables, and devices by what the machine has."""

from __future__ import annotations

import _thread
import os
import pickle

import attrs
import pytest
import torch
from hypothesis import given, strategies as st

from accelx import env_device
from accelx.env import connect, detect
from accelx.env_axes import lay_out
from accelx.env_device import Hardware, choose_backend, choose_device
from accelx.env_rest import rest
from accelx.errors import DetectError, PlacementError
from accelx.records import Axis, Env

SHELL = {"PATH": "/usr/bin", "HOME": "/home/user", "HOSTNAME": "n01", "SHLVL": "1"}

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_RANK": "5",
    "ROLE_NAME": "default",
    "ROLE_WORLD_SIZE": "8",
    "MASTER_ADDR": "node-0.cluster",
    "MASTER_PORT": "43211",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_RUN_ID": "17f2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "OMP_NUM_THREADS": "1",
}

SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOBID": "123456",
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_NODELIST": "gpu[07-08,11],old3",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_NNODES": "4",
    "SLURM_NTASKS": "7",
    "SLURM_NPROCS": "7",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEPID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08,11],old3",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_GTIDS": "4,5",
    "SLURM_LAUNCH_NODE_IPADDR": "10.1.0.2",
    "SLURM_SRUN_COMM_HOST": "10.1.0.2",
}

AGENT_OF_SRUN = {  # one srun task on each node, which is torchrun itself
    **SRUN,
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
}

SALLOC = {  # a shell in the allocation, without srun
    "SLURM_JOB_ID": "99",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "8",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}

SBATCH = {  # the batch script itself has SLURM_PROCID, but is no step
    **SALLOC,
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}

INTERACTIVE_STEP = {  # salloc with LaunchParameters=use_interactive_step
    **SBATCH,
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NUM_TASKS": "1",
}

OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_UNIVERSE_SIZE": "4",
    "OMPI_MCA_orte_num_nodes": "2",
    "PMIX_NAMESPACE": "2345009153",
    "PMIX_RANK": "3",
}

OPENMPI_IN_SLURM = {  # the SLURM task is mpirun's daemon on the node
    **OPENMPI,
    **AGENT_OF_SRUN,
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
}

HYDRA = {
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "PMI_FD": "7",
    "PMI_PORT": "n01:38911",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
    "GFORTRAN_UNBUFFERED_PRECONNECTED": "y",
}

MVAPICH = {
    "MV2_COMM_WORLD_RANK": "1",
    "MV2_COMM_WORLD_SIZE": "2",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
}

PYTORCHJOB = {
    "MASTER_ADDR": "bert-master-0",
    "MASTER_PORT": "23456",
    "WORLD_SIZE": "3",
    "RANK": "2",
    "PET_MASTER_ADDR": "bert-master-0",
    "PET_MASTER_PORT": "23456",
    "PET_NNODES": "3",
    "PET_NODE_RANK": "2",
    "PET_NPROC_PER_NODE": "1",
    "PYTHONUNBUFFERED": "1",
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
}

INDEXED_JOB = {
    "JOB_COMPLETION_INDEX": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "job-0.svc",
    "MASTER_PORT": "3389",
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
}

SAGEMAKER = {
    "SM_HOSTS": '["algo-1","algo-2"]',
    "SM_CURRENT_HOST": "algo-2",
    "SM_NUM_GPUS": "1",
    "SM_NUM_CPUS": "8",
    "SM_MODEL_DIR": "/opt/ml/model",
    "SM_NETWORK_INTERFACE_NAME": "eth0",
}

TPU_POD = {
    "TPU_WORKER_ID": "1",
    "TPU_WORKER_HOSTNAMES": "t-0,t-1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "PJRT_DEVICE": "TPU",
}

SPAWN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "50123",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "ACCELX_LAUNCHER": "accelx",
}

BY_HAND_IN_SRUN = {
    **SRUN,
    "RANK": "4",
    "WORLD_SIZE": "7",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "NODE_RANK": "2",
    "MASTER_ADDR": "gpu07",
    "MASTER_PORT": "29500",
}

# launcher, rank, world, local rank, local world, node, nodes, where they meet
ENVIRONS = {
    "nothing": ({}, ("none", 0, 1, 0, 1, 0, 1, None)),
    "torchrun": (
        TORCHRUN,
        ("torchrun", 5, 8, 1, 4, 1, 2, "tcp://node-0.cluster:43211"),
    ),
    "spawn": (SPAWN, ("accelx", 1, 2, 1, 2, 0, 1, "tcp://127.0.0.1:50123")),
    "srun": (SRUN, ("slurm", 4, 7, 0, 2, 2, 4, "tcp://gpu07:*")),
    "torchrun in srun": (
        {**AGENT_OF_SRUN, **TORCHRUN},
        ("torchrun", 5, 8, 1, 4, 1, 2, "tcp://node-0.cluster:43211"),
    ),
    "torchrun in mpirun": (
        {**OPENMPI, **TORCHRUN},
        ("torchrun", 5, 8, 1, 4, 1, 2, "tcp://node-0.cluster:43211"),
    ),
    "by hand in srun": (
        BY_HAND_IN_SRUN,
        ("torchrun", 4, 7, 0, 2, 2, 4, "tcp://gpu07:29500"),
    ),
    "salloc": (SALLOC, ("none", 0, 1, 0, 1, 0, 1, None)),
    "sbatch": (SBATCH, ("none", 0, 1, 0, 1, 0, 1, None)),
    "interactive step": (INTERACTIVE_STEP, ("none", 0, 1, 0, 1, 0, 1, None)),
    "openmpi": (
        {**OPENMPI, "MASTER_ADDR": "a", "MASTER_PORT": "1234"},
        ("openmpi", 3, 4, 1, 2, 1, 2, "tcp://a:1234"),
    ),
    "openmpi in slurm": (
        {**OPENMPI_IN_SLURM, "MASTER_ADDR": "a", "MASTER_PORT": "1234"},
        ("openmpi", 3, 4, 1, 2, 1, 2, "tcp://a:1234"),
    ),
    "hydra": (HYDRA, ("pmi", 1, 2, 1, 2, 0, 1, "tcp://127.0.0.1:*")),
    "srun --mpi=pmi2": (
        {**SRUN, "PMI_RANK": "4", "PMI_SIZE": "7"},
        ("slurm", 4, 7, 0, 2, 2, 4, "tcp://gpu07:*"),
    ),
    "hydra in slurm": (
        {
            **AGENT_OF_SRUN,
            **HYDRA,
            "PMI_RANK": "3",
            "PMI_SIZE": "4",
            "MASTER_ADDR": "a",
        },
        ("pmi", 3, 4, 1, 2, 1, 2, "tcp://a:*"),
    ),
    "mvapich": (MVAPICH, ("mvapich", 1, 2, 1, 2, 0, 1, "tcp://127.0.0.1:*")),
    "pytorchjob": (
        PYTORCHJOB,
        ("kubernetes", 2, 3, 0, 1, 2, 3, "tcp://bert-master-0:23456"),
    ),
    "indexed job": (
        INDEXED_JOB,
        ("kubernetes", 1, 2, 0, 1, 1, 2, "tcp://job-0.svc:3389"),
    ),
    "index alone": ({"JOB_COMPLETION_INDEX": "1"}, ("none", 0, 1, 0, 1, 0, 1, None)),
    "sagemaker": (SAGEMAKER, ("sagemaker", 1, 2, 0, 1, 1, 2, "tcp://algo-1:7777")),
    "one sagemaker host": (
        {**SAGEMAKER, "SM_HOSTS": '["algo-2"]', "SM_NUM_GPUS": "0"},
        ("sagemaker", 0, 1, 0, 1, 0, 1, None),
    ),
    "torchrun in sagemaker": (
        {**SAGEMAKER, "SM_NUM_GPUS": "4", **TORCHRUN},
        ("torchrun", 5, 8, 1, 4, 1, 2, "tcp://node-0.cluster:43211"),
    ),
    "tpu pod": (TPU_POD, ("tpu", 1, 2, 0, 1, 1, 2, "tcp://t-0:29500")),
    "one tpu host": ({"PJRT_DEVICE": "TPU"}, ("tpu", 0, 1, 0, 1, 0, 1, None)),
    "an address alone": ({"MASTER_ADDR": "a"}, ("none", 0, 1, 0, 1, 0, 1, None)),
    "restarted": (
        {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2", "MASTER_ADDR": "fe80::1"},
        ("torchrun", 5, 8, 1, 4, 1, 2, "tcp://[fe80::1]:43211?attempt=2"),
    ),
}


@pytest.mark.parametrize(("environ", "expected"), ENVIRONS.values(), ids=ENVIRONS)
def test_recorded_environments_give_their_place(environ, expected):
    """What a launcher sets is read as what it means, whatever else is set."""
    env = detect({**SHELL, **environ})
    here = (env.local_rank, env.local_world, env.node, env.nodes)
    assert (env.launcher, env.rank, env.world, *here) == expected[:-1]
    where = expected[-1]
    if where is not None and where.endswith(":*"):  # any port that all ranks share
        head, _, port = str(env.rendezvous).rpartition(":")
        assert head == where[:-2]
        assert 15000 <= int(port) < 25000
    else:
        assert env.rendezvous == where
    assert (env.device, env.backend, env.axes, env.alone) == ("cpu", None, (), False)


BROKEN = {
    "no world": ({"RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE is missing"),
    "no rank": ({"WORLD_SIZE": "2"}, "RANK is missing"),
    "local rank alone": ({"LOCAL_RANK": "0"}, "RANK, WORLD_SIZE are missing"),
    "rank too high": ({**TORCHRUN, "RANK": "8"}, "rank 8 is not in 0 to 7"),
    "local rank too high": ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4"),
    "negative": ({**TORCHRUN, "RANK": "-1"}, "rank -1"),
    "empty world": ({**TORCHRUN, "WORLD_SIZE": "0"}, "rank 5 is not in 0 to -1"),
    "more here than in all": ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "on this node"),
    "no number": ({**TORCHRUN, "RANK": "five"}, "RANK=five is no integer"),
    "no port": ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT is missing"),
    "port too high": ({**TORCHRUN, "MASTER_PORT": "70000"}, "port 70000"),
    "other rank by hand": ({**BY_HAND_IN_SRUN, "RANK": "3"}, "slurm says rank 4 of 7"),
    "other world by hand": ({**SRUN, "WORLD_SIZE": "9"}, "slurm says rank 4 of 7"),
    "other rank under mpi": ({**HYDRA, "RANK": "0"}, "pmi says rank 1 of 2"),
    "half of openmpi": ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE"),
    "nowhere to meet": (OPENMPI, "set MASTER_ADDR"),
    "no local rank in pmi": ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALRANKID"),
    "bad task count": ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x"}, "2(x"),
    "srun without tasks": (
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"},
        "SLURM_NTASKS is missing",
    ),
    "operator without torchrun": (
        {**PYTORCHJOB, "PET_NPROC_PER_NODE": "8"},
        'make the command "torchrun train.py"',
    ),
    "trainer without torchrun": (
        {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "1"},
        'make the command "torchrun train.py"',
    ),
    "sagemaker with gpus": ({**SAGEMAKER, "SM_NUM_GPUS": "8"}, "accelx.spawn -n 8"),
    "sagemaker elsewhere": ({**SAGEMAKER, "SM_CURRENT_HOST": "algo-9"}, "not one of"),
    "sagemaker garbage": ({**SAGEMAKER, "SM_HOSTS": "algo-1"}, "no JSON list"),
    "half a tpu": ({"TPU_WORKER_ID": "0"}, "TPU_WORKER_HOSTNAMES is missing"),
}


@pytest.mark.parametrize(("environ", "words"), BROKEN.values(), ids=BROKEN)
def test_partial_and_contradictory_variables_are_refused(environ, words):
    """The error says what is wrong and shows every launcher variable, and no other."""
    with pytest.raises(DetectError) as caught:
        detect({**SHELL, **environ})
    assert words in str(caught.value)
    for name, value in environ.items():
        if name.startswith(("RANK", "WORLD", "LOCAL", "SLURM", "PMI_", "OMPI_COMM")):
            assert f"{name}={value}" in str(caught.value)
    assert "/usr/bin" not in str(caught.value)


@given(
    st.integers(1, 64).flatmap(lambda w: st.tuples(st.integers(0, w - 1), st.just(w))),
    st.integers(1, 8),
)
def test_any_rank_of_any_world_round_trips(pair, size):
    """What torchrun or Open MPI would set for a rank is read back as that rank."""
    rank, world = pair
    if world % size:
        size = 1
    node, local = divmod(rank, size)
    where = {"MASTER_ADDR": "h", "MASTER_PORT": "1"}
    numbers = (rank, world, local, size)
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    theirs = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE")]
    theirs += [f"OMPI_COMM_WORLD_LOCAL_{name}" for name in ("RANK", "SIZE")]
    for names in (ours, theirs):
        env = detect({**where, **dict(zip(names, map(str, numbers), strict=True))})
        assert (env.rank, env.world, env.local_rank, env.local_world) == numbers
        assert (env.node, env.nodes) == (node, world // size)


def test_detect_reads_the_mapping_alone(monkeypatch):
    """The process's own environment says something else and is not looked at."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert detect({}) == Env()
    assert detect(os.environ) != Env()


def test_envs_are_values():
    """An Env pickles, hashes and compares, and two in one process are apart."""
    one, two = detect(TORCHRUN), detect({**TORCHRUN, "RANK": "4", "LOCAL_RANK": "0"})
    assert pickle.loads(pickle.dumps(one)) == one == detect(TORCHRUN)
    assert len({one, two, detect(TORCHRUN)}) == 2
    assert one != two
    assert eval(repr(one)) == one
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        one.rank = 0


AXES = {
    "none": (None, 6, [("data", 6)]),
    "text": ("replicate=2,shard=3", 6, [("replicate", 2), ("shard", 3)]),
    "filled": ("replicate=2, shard=-1", 6, [("replicate", 2), ("shard", 3)]),
    "filled first": ({"a": -1, "b": 2}, 8, [("a", 4), ("b", 2)]),
    "records": ((Axis("x", 4), Axis("y", 1)), 4, [("x", 4), ("y", 1)]),
}


@pytest.mark.parametrize(("axes", "world", "expected"), AXES.values(), ids=AXES)
def test_axes_multiply_to_the_world(axes, world, expected):
    """Text, a mapping and records mean the same, and -1 takes what is left."""
    assert lay_out(axes, world) == tuple(Axis(*pair) for pair in expected)


BAD_AXES = {
    "does not fit": (
        "replicate=2,shard=4",
        "world 6 does not split into axes replicate=2 × shard=4; "  # noqa: RUF001
        "use shard=3, or shard=-1 to fill",
    ),
    "cannot fill": ("replicate=4,shard=-1", "use sizes that multiply to it"),
    "too small": ("shard=3", "use shard=6"),
    "two open": ("a=-1,b=-1", "does not split"),
    "zero": ({"a": 0, "b": 6}, "does not split"),
    "twice": ("a=2,a=3", "each once"),
    "empty": ((), "at least one name"),
    "no size": ("data", 'written "name=size"'),
}


@pytest.mark.parametrize(("axes", "words"), BAD_AXES.values(), ids=BAD_AXES)
def test_axes_that_do_not_fit_say_what_does(axes, words):
    """The error shows the world, the axes and sizes that work."""
    with pytest.raises(ValueError, match=r".") as caught:
        lay_out(axes, 6)
    assert words in str(caught.value)


ONE, TWO = Env(), Env(1, 2, 1, 2)
DEVICES = {
    "cpu": (Hardware(), TWO, "cpu", "gloo"),
    "cuda": (Hardware("cuda", 2), TWO, "cuda:1", "nccl"),
    "cuda first": (Hardware("cuda", 2, xla=True), TWO, "cuda:1", "nccl"),
    "xpu": (Hardware("xpu", 2, xla=True), TWO, "xpu:1", "xccl"),
    "tpu, by torch_tpu": (Hardware("tpu", 4), TWO, "tpu:1", "tpu_dist"),
    "one that is not known": (Hardware("npu", 4), TWO, "npu:1", "gloo"),
    "mps": (Hardware("mps", 1), ONE, "mps", "gloo"),
    "mps is shared by no ranks": (Hardware("mps", 1), TWO, "cpu", "gloo"),
    "xla": (Hardware(xla=True), ONE, "xla", "gloo"),
}


@pytest.mark.parametrize(
    ("hardware", "env", "device", "backend"), DEVICES.values(), ids=DEVICES
)
def test_the_device_is_a_function_of_the_machine(hardware, env, device, backend):
    """Each machine has one best device, and each device one backend."""
    assert choose_device(hardware, env) == device
    assert choose_backend(device) == backend


def test_more_local_ranks_than_devices_are_refused():
    """The rank that finds no device says how many there are and what to write."""
    with pytest.raises(PlacementError, match=r"there are 1; .* connect\(device="):
        choose_device(Hardware("cuda", 1), TWO)


NAMED = {  # the machine, how many ranks, the device, what it is or why it is not
    "its local rank's": (Hardware("cuda", 2), TWO, "cuda", "cuda:1"),
    "this one": (Hardware("cuda", 2), TWO, "cuda:0", "cuda:0"),
    "mps": (Hardware("mps", 1), ONE, "mps", "mps"),
    "cpu": (Hardware("cuda", 2), TWO, "cpu", "cpu"),
    "mps of two": (Hardware("mps", 1), TWO, "mps", "without collectives.*2 ranks"),
    "too many": (Hardware("xpu", 1), TWO, "xpu", "there are 1; start"),
    "beyond": (Hardware("cuda", 2), ONE, "cuda:2", "one of the 2 devices"),
    "another": (Hardware("xpu", 2), ONE, "cuda", r"has 2 of xpu; .*device=\"xpu\""),
    "not here": (Hardware(), ONE, "mps", r"none but the CPU; .*device=\"cpu\""),
    "no kind": (Hardware("cuda", 1), ONE, "gpu", "has 1 of cuda"),
    "no number": (Hardware("cuda", 1), ONE, "cuda:a", "has 1 of cuda"),
    "no text": (Hardware(), ONE, 0, r"got 0; write device=\"cpu\""),
    "torch's": (Hardware(), ONE, torch.device("cuda:1"), 'write device="cuda:1"'),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_device_that_is_named_is_here_or_refused(monkeypatch, case):
    """Before torch says less of it; without an index it is the local rank's."""
    machine, env, device, wanted = NAMED[case]
    monkeypatch.setattr(env_device, "probe", lambda: machine)
    if wanted in ("cuda:1", "cuda:0", "mps", "cpu"):
        assert env_device.named_device(device, env) == wanted
    else:
        with pytest.raises((PlacementError, TypeError), match=wanted):
            connect(env, device=device)


def test_several_ranks_on_xla_are_refused():
    """Each would take itself for the only one: said before anything is opened."""
    with pytest.raises(PlacementError, match=r"one process.*2 ranks; start one"):
        choose_device(Hardware(xla=True), TWO)
    with pytest.raises(PlacementError, match="stay apart"):
        connect(attrs.evolve(TWO, device="xla"), backend="xla")
    with pytest.raises(PlacementError, match=r"connect\(device=\"cpu\"\)"):
        connect(TWO, device="xla:0")


def test_one_process_opens_no_group(monkeypatch):
    """Connecting alone changes no variable and opens nothing, and again is the same."""
    import torch.distributed as dist

    before = dict(os.environ)
    env = connect(Env(), device="cpu")
    assert env == connect(env) == connect(Env(), device="cpu")
    assert len(connect(Env(), device="cpu", axes="a=1,b=-1").axes) == 2
    assert (env.axes, env.backend) == ((Axis("data", 1),), None)
    assert not dist.is_initialized()
    assert dict(os.environ) == before


def test_python_ends_after_threads_that_are_not_its_own():
    """One that works, or waits for Python's lock, is waited for; one asleep is not."""
    done, never = [], _thread.allocate_lock()
    never.acquire()

    def work():
        for _ in range(1_000_000):
            pass
        done.append(True)
        never.acquire()

    _thread.start_new_thread(work, ())  # threading does not know of it
    assert rest(60)
    assert done
    never.release()
    pid = os.fork()
    if not pid:
        os._exit(not rest(60))
    assert os.waitpid(pid, 0)[1] == 0


def test_control_a_thread_that_never_rests_is_not_waited_for(tmp_path):
    """After the limit; and where the kernel does not say, at once."""
    (tmp_path / "77").mkdir()
    (tmp_path / "77/status").write_text("State:\tR (running)\n")
    assert not rest(0.02, tmp_path)
    (tmp_path / "77/status").write_text("State:\tS (sleeping)\n")
    assert rest(60, tmp_path)
    assert rest(60, tmp_path / "none")
