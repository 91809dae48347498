"""The job files of examples/cluster, as far as they run without the cluster."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import accelx as ax
from tests.door.spawning import LONG, ROOT, SCRIPTS, environment

pytestmark = [pytest.mark.door, pytest.mark.timeout(4 * LONG)]

FOLDER = ROOT / "examples/cluster"
STEPS = 80
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def run(*words, **more):
    """A command from the root of the repository."""
    return subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=environment(**{"OMP_NUM_THREADS": "1", "PATH": PATH, **more}),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )


def losses(text):
    """step -> loss, as printed."""
    return {int(k): float(v) for k, v in re.findall(r"^step (\d+): (\S+)", text, re.M)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same program in one process: the judge."""
    url = tmp_path_factory.mktemp("alone")
    done = run("python", FOLDER / "train.py", "--url", url, "--steps", STEPS)
    assert done.returncode == 0, done.stderr
    assert "from step 0: 1 ranks by none" in done.stdout
    assert len(losses(done.stdout)) == STEPS
    return losses(done.stdout)


@pytest.fixture
def cluster(tmp_path):
    """Stands for SLURM: `srun` starts two ranks here, `scontrol` notes its words."""
    for name, body in {
        "srun": f'exec python {SCRIPTS / "tasks.py"} srun "$@"',
        "scontrol": f'echo "$@" >> {tmp_path / "told"}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def submit(**more):
        """The job as it ended, and what scontrol has been told so far."""
        job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_PROCID": "0"}
        more |= {**job, "PATH": f"{tmp_path}:{PATH}", "URL": str(tmp_path / "run")}
        done = run("bash", FOLDER / "slurm.sbatch", "--steps", STEPS, **more)
        told = tmp_path / "told"
        return done, told.read_text() if told.exists() else ""

    return submit


def test_a_slurm_job_is_requeued_and_goes_on(cluster, alone):
    """SIGUSR1 before the limit: saved, requeued, and one process's losses in the end.

    The control is the second run, which nobody disturbs: it requeues nothing.
    """
    first, told = cluster(SEND="USR1")
    assert first.returncode == 0, first.stderr
    assert "from step 0: 2 ranks by slurm" in first.stdout
    assert told == f"requeue {os.getpid()}\n"
    before = losses(first.stdout)
    assert len(before) < STEPS
    second, told = cluster()
    assert second.returncode == 0, second.stderr
    assert told.count("requeue") == 1
    begun = int(re.search(r"from step (\d+): 2 ranks", second.stdout)[1])
    assert begun in (len(before), len(before) + 1), "the step that it left in is saved"
    found = before | losses(second.stdout)
    assert set(alone) - set(found) <= {begun}
    assert found == pytest.approx({step: alone[step] for step in found}, abs=2e-5)


def test_mpirun_trains_as_one_process(alone, tmp_path):
    """Open MPI's own launcher where it is, else its variables; two steps."""
    words = ["python", FOLDER / "train.py", "--url", tmp_path, "--steps", 2]
    if shutil.which("mpirun"):
        done = run("mpirun", "--oversubscribe", "--allow-run-as-root", "-n", 2, *words)
    else:
        done = run("python", SCRIPTS / "tasks.py", "openmpi", *words)
    assert "from step 0: 2 ranks by openmpi" in done.stdout, done.stderr
    wanted = {step: alone[step] for step in (1, 2)}
    assert losses(done.stdout) == pytest.approx(wanted, abs=2e-5)


def test_a_job_file_is_valid_shell():
    """And `sbatch` reads its options: they stand before the first command."""
    subprocess.run(["bash", "-n", FOLDER / "slurm.sbatch"], check=True)
    lines = (FOLDER / "slurm.sbatch").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and line[0] != "#")
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert options == [line for line in lines[:first] if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in options
    assert "#SBATCH --signal=USR1@120" in options


def pods(job):
    """The variables of each pod, as the training operator v1 sets them."""
    spec = job["spec"]
    each = int(spec.get("nprocPerNode", 1))
    counts = {
        kind: one["replicas"] for kind, one in spec["pytorchReplicaSpecs"].items()
    }
    ports = spec["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    port = {port["name"]: port["containerPort"] for port in ports["ports"]}
    nodes = sum(counts.values())
    for node in range(nodes):
        yield {
            "MASTER_ADDR": f"{job['metadata']['name']}-master-0",
            "MASTER_PORT": str(port["pytorchjob-port"]),
            "WORLD_SIZE": str(nodes * each),
            "RANK": str(node),
            "PET_NNODES": str(nodes),
            "PET_NODE_RANK": str(node),
            "PET_NPROC_PER_NODE": str(each),
        }


def test_the_pods_of_a_pytorchjob_find_their_places():
    """One rank a pod, four pods, one meeting point."""
    job = yaml.safe_load((FOLDER / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    envs = [ax.detect(variables) for variables in pods(job)]
    assert [env.rank for env in envs] == [0, 1, 2, 3]
    assert {(env.world, env.local_rank, env.nodes, env.launcher) for env in envs} == {
        (4, 0, 4, "kubernetes")
    }
    assert {env.rendezvous for env in envs} == {"tcp://accelx-master-0:23456"}
    for one in job["spec"]["pytorchReplicaSpecs"].values():
        [container] = one["template"]["spec"]["containers"]
        assert container["name"] == "pytorch", "the operator sets variables there alone"
        assert (ROOT / container["command"][1]).exists()
        assert one["restartPolicy"] == "OnFailure", "75 is started again"


def test_pods_with_several_ranks_want_torchrun():
    """The control: the same file with eight a pod is refused, with what to write."""
    job = yaml.safe_load((FOLDER / "pytorchjob.yaml").read_text())
    job["spec"]["nprocPerNode"] = "8"
    with pytest.raises(ax.DetectError, match="torchrun reads PET_"):
        ax.detect(next(pods(job)))


def sagemaker(**more):
    """The arguments that the script would give the estimator."""
    spec = importlib.util.spec_from_file_location("job", FOLDER / "sagemaker_job.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.settings("role", "bucket", "image", **more)


def hosts(arguments, gpus):
    """The variables of the process that SageMaker starts on each host."""
    names = [f'"algo-{n + 1}"' for n in range(arguments["instance_count"])]
    for n, name in enumerate(names):
        own = {"SM_HOSTS": f"[{','.join(names)}]", "SM_CURRENT_HOST": name.strip('"')}
        own["SM_NUM_GPUS"] = str(gpus)
        if not arguments["distribution"]:
            yield own
            continue
        for local in range(gpus):  # torchrun's, within SageMaker's
            yield own | {
                "RANK": str(n * gpus + local),
                "WORLD_SIZE": str(len(names) * gpus),
                "LOCAL_RANK": str(local),
                "LOCAL_WORLD_SIZE": str(gpus),
                "GROUP_RANK": str(n),
                "GROUP_WORLD_SIZE": str(len(names)),
                "MASTER_ADDR": "algo-1",
                "MASTER_PORT": "7777",
                "TORCHELASTIC_RUN_ID": "none",
            }


def test_the_hosts_of_a_sagemaker_job_find_their_places():
    """torchrun's ranks with eight GPUs a host; one rank a host without."""
    many, one = sagemaker(), sagemaker(gpus=1)
    assert (FOLDER / many["entry_point"]).exists()
    envs = [ax.detect(variables) for variables in hosts(many, 8)]
    assert [env.rank for env in envs] == list(range(16))
    assert {env.launcher for env in envs} == {"torchrun"}
    envs = [ax.detect(variables) for variables in hosts(one, 1)]
    assert [(env.rank, env.world, env.launcher) for env in envs] == [
        (0, 2, "sagemaker"),
        (1, 2, "sagemaker"),
    ]
    assert {env.rendezvous for env in envs} == {"tcp://algo-1:7777"}


def test_eight_gpus_without_torchrun_are_refused():
    """The control: what the script would have got wrong, and what it writes."""
    arguments = sagemaker() | {"distribution": None}
    with pytest.raises(ax.DetectError, match="torch_distributed"):
        ax.detect(next(hosts(arguments, 8)))
    assert sagemaker()["distribution"] == {"torch_distributed": {"enabled": True}}


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="no ray here")
def test_actors_of_ray_train_as_one_process(tmp_path):
    """The example's own comparison; the control: actors with labels of their own."""
    source = (ROOT / "examples/ray_train.py").read_text()
    apart = source.replace("argmax(1))", "argmax(1).roll(os.getpid()))")
    assert apart != source
    gaps = []
    for name, text in {"same.py": source, "apart.py": f"import os\n{apart}"}.items():
        (tmp_path / name).write_text(text)
        done = run("python", tmp_path / name)
        assert done.returncode == 0, done.stderr
        gaps.append(float(re.search(r"all ranks: ([\d.]+)", done.stdout)[1]))
    assert gaps[0] < 2e-5 < gaps[1]
