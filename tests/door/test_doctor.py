"""The doctor as a program: several ranks, and a real object store."""

import http.client
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from accelx.doctors import door
from tests.door.spawning import LONG, environment

pytestmark = pytest.mark.door
SECRET = "tops3cret"


def doctor(*words, launcher=(), **more):
    """Run the door; what it wrote, and its exit code."""
    return subprocess.run(
        [sys.executable, "-m", *launcher, "accelx.doctor", *words],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=LONG,
    )


def test_ranks_of_this_machine_reach_each_other():
    """Two ranks find their names, ports and clocks, and add up as ranks should."""
    done = doctor("net", "-n", "2", "--json")
    assert done.returncode in (0, 1), done.stderr
    data = json.loads(done.stdout)
    assert [one["rank"] for one in data["ranks"]] == [0, 1]
    assert (data["world"], data["hosts"], data["backend"]) == (2, 1, "gloo")
    for one in data["ranks"]:
        assert one["ports"] == []
        assert one["address"] == "127.0.0.1"
        assert abs(one["clock"]["ahead"]) < 1  # the same clock
        assert all(speed["right"] for speed in one["all_reduce"])
    assert data["ranks"][1]["clock"]["latency"] > 0
    assert len(data["all_reduce"]) == 4
    assert done.returncode == int(bool(data["warnings"]))


def test_under_a_launcher_it_measures_the_ranks_that_are_there():
    """Started as ranks, the processes are measured, and one of them prints."""
    launcher = ("accelx.spawn", "-n", "2", "-m")
    done = doctor("net", launcher=launcher)
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.count("2 ranks on 1 hosts, by accelx, over gloo") == 1
    assert "all_reduce" in done.stdout


@pytest.fixture
def bucket():
    """A real S3 server with one bucket: the variables that lead there."""
    if find_spec("moto") is None or find_spec("s3fs") is None:
        pytest.skip("moto or s3fs is not installed")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    asked = http.client.HTTPConnection(host, port)
    asked.request("PUT", "/bucket")
    assert asked.getresponse().status == 200
    asked.close()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    server.stop()


def names(variables):
    """How much lies in the folder, as the server lists it; others use the bucket."""
    host = variables["AWS_ENDPOINT_URL"].removeprefix("http://")
    asked = http.client.HTTPConnection(host)
    asked.request("GET", "/bucket?list-type=2&prefix=run/")
    told = asked.getresponse().read().decode()
    asked.close()
    return told.count("<Key>")


def test_an_object_store_is_tried_and_left_empty(bucket):
    """Objects and a checkpoint are written, read, compared and removed over HTTP."""
    done = doctor("store", "s3://bucket/run", "--size", "1", "--json", **bucket)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(done.stdout)
    assert data["sound"]
    assert data["url"] == "s3://bucket/run"
    assert [s["step"] for s in data["steps"] if not s["error"]][-1] == "nothing is left"
    assert names(bucket) == 0
    assert SECRET not in done.stdout + done.stderr


def test_a_bucket_that_is_not_there_is_told(bucket):
    """What failed is said, with exit code 1 and without the secret."""
    done = doctor("store", "s3://nobucket/run", "--size", "1", **bucket)
    assert done.returncode == 1
    assert "NOT sound: write a small object" in done.stdout
    assert SECRET not in done.stdout + done.stderr


def here(monkeypatch, capsys, *words, **variables):
    """What the door prints in this process, with these variables; its code is 0."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert door.main(words) == 0
    return capsys.readouterr().out


def test_the_report_of_a_task_of_slurm_has_no_secret_in_it(monkeypatch, capsys):
    """The whole program, in an environment as clusters have them."""
    variables = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "1",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "77",
        "SLURM_JWT": SECRET,
        "WANDB_API_KEY": SECRET,
        "HF_TOKEN": SECRET,
        "NCCL_DEBUG": "INFO",
        "HTTPS_PROXY": f"http://me:{SECRET}@proxy:3128",
    }
    done = doctor(**variables)
    assert done.returncode == 0, done.stderr
    # deepspeed, which other tests import, writes it for the whole process
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    told = here(monkeypatch, capsys, "--json", **variables)
    for text in (done.stdout + done.stderr, told):
        assert SECRET not in text
        assert "slurm" in text
        assert "SLURM_STEP_NODELIST" in text
    data = json.loads(told)
    assert (data["detected"]["rank"], data["detected"]["world"]) == (1, 4)
    assert data["detected"]["rendezvous"].startswith("tcp://n1:")
    assert data["variables"] == {"NCCL_DEBUG": "INFO"} | {
        name: value
        for name, value in data["variables"].items()
        if name in ("OMP_NUM_THREADS", "TMPDIR")
    }


def test_variables_that_disagree_are_a_warning_and_no_failure(monkeypatch, capsys):
    """The report is what one wants just then."""
    wrong = {"LOCAL_RANK": "0", "RANK": "5", "WORLD_SIZE": "2"}
    data = json.loads(here(monkeypatch, capsys, "--json", **wrong))
    assert data["detected"]["error"]
    assert data["detected"]["error"] in [w["what"] for w in data["warnings"]]
    text = here(monkeypatch, capsys)
    assert "cannot tell" in text
    assert "-> set or unset the variables" in text


def test_what_is_no_command_is_told_at_once():
    """Without torch, on the standard error, with code 2."""
    done = doctor("nett")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "invalid choice: 'nett'" in done.stderr
    assert "python -m accelx.doctor --help" in done.stderr


def test_a_reader_that_goes_is_no_error():
    """`| head -1` ends in silence."""
    code = f"{sys.executable} -m accelx.doctor | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "accelx doctor\n"
    assert done.stderr == ""
