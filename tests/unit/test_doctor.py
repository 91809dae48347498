"""What a report is made of, what it warns of, and that it holds no secret."""

import copy
import json
import socket
import threading
import tomllib

import pytest

from accelx import storage
from accelx.doctors import (
    advice,
    door,
    look,
    net,
    network,
    options,
    report,
    store,
    text,
)
from accelx.errors import StorageError
from accelx.records import Env
from accelx.testing import run
from tests.unit.source import ROOT

GIB = 2**30
FINE = {
    "accelx": "0.1.0",
    "python": "3.11.7",
    "system": {"name": "Linux", "machine": "x86", "container": False}
    | {"infiniband": False},
    "cpu": {"usable": 8, "present": 16, "cores": 4, "nodes": 1, "quota": None},
    "memory": {"total": 64 * GIB, "available": 32 * GIB, "limit": None, "used": None},
    "torch": {"version": "2.13.0+cu130", "cuda": "13.0", "hip": None, "threads": 4}
    | {"nccl": "2.29.1", "driver": "580.95"}
    | {"backends": ["gloo", "nccl"], "accelerator": "cuda"}
    | {"devices": [{"name": "H100", "memory": 80 * GIB}]},
    "gpus_present": 1,
    "required": {"torch": "2.13.0", "attrs": "26.1"},
    "optional": {"rich": "15", "s3fs": None},
    "detected": {"error": "", "launcher": "torchrun", "rank": 1, "world": 2}
    | {"local_rank": 1, "local_world": 2, "node": 0, "nodes": 1}
    | {"rendezvous": "tcp://127.0.0.1:1", "device": "cuda:1", "backend": "nccl"}
    | {"variables": {"RANK": "1", "WORLD_SIZE": "2"}},
    "variables": {},
    "limits": {"nofile": 65536, "memlock": None, "nproc": 100},
    "folders": {"shm": {"size": 8 * GIB, "free": 8 * GIB}}
    | {"temporary": {"size": 99 * GIB, "free": 9 * GIB}},
}


def changed(path, value):
    """The report of a machine that is well, but for one thing."""
    data = copy.deepcopy(FINE)
    *above, last = path.split(".")
    node = data
    for name in above:
        node = node[name]
    node[last] = value
    return data


def test_a_machine_that_is_well_has_no_warning():
    """The control: what follows is not said of everything."""
    assert advice.advice(FINE) == []
    assert "nothing to warn of" in report.lines(report.report(FINE))


@pytest.mark.parametrize(
    ("path", "value", "what", "remedy"),
    [
        ("detected.error", "RANK is missing", "RANK is missing", "variables"),
        ("torch.version", "2.8.1+cpu", "older", "torch>=2.9"),
        ("torch.backends", [], "no gloo", "distributed"),
        ("required.attrs", None, "attrs", "pip install attrs"),
        ("cpu.quota", 1.5, "1.5 CPUs", "OMP_NUM_THREADS=1"),
        ("torch.threads", 64, "64 threads", "OMP_NUM_THREADS=8"),
        ("memory.available", GIB, "memory are left", "end"),
        ("limits.nofile", 1024, "1024 files", "ulimit -n"),
        ("folders.shm.free", 2**26, "/dev/shm", "--shm-size"),
        ("folders.temporary.free", 2**26, "temporary", "TMPDIR"),
        ("variables", {"CUDA_LAUNCH_BLOCKING": "1"}, "slower", "unset CUDA_LAUNCH"),
    ],
)
def test_each_thing_that_is_not_well_is_told_with_a_remedy(path, value, what, remedy):
    """One change, one warning, and what to do in the same breath."""
    [found] = advice.advice(changed(path, value))
    assert what in found["what"]
    assert remedy in found["remedy"]
    lines = report.lines(report.report(changed(path, value)))
    assert any(found["what"] in line and remedy in line for line in lines)


def test_a_gpu_that_torch_cannot_use_is_explained():
    """By the build of torch, by what hides it, or by the driver."""
    blind = changed("torch.accelerator", "cpu")
    [driver] = advice.advice(blind)
    assert "driver for CUDA 13.0" in driver["remedy"]
    blind["variables"]["CUDA_VISIBLE_DEVICES"] = "-1"
    assert advice.advice(blind)[0]["remedy"] == "unset CUDA_VISIBLE_DEVICES"
    blind["torch"]["cuda"] = None
    assert "build of torch for CUDA" in advice.advice(blind)[0]["remedy"]


def test_a_container_that_is_full_and_infiniband_that_cannot_lock():
    """Two facts together make these."""
    full = changed("memory.limit", 4 * GIB)
    full["memory"]["used"] = 3 * GIB
    assert "4.29 GB left" in advice.advice(full)[0]["what"]
    locked = changed("limits.memlock", 65536)
    assert advice.advice(locked) == []
    locked["system"]["infiniband"] = True
    assert advice.advice(locked)[0]["remedy"] == "ulimit -l unlimited"


def test_the_report_says_what_was_recognised_and_from_which_variables():
    """Only what detect read and found is named as the reason."""
    environ = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1234",
        "HOME": "elsewhere",
    }
    found = look.detected(environ)
    assert (found["launcher"], found["rank"], found["world"]) == ("torchrun", 0, 2)
    assert found["variables"] == {k: v for k, v in environ.items() if k != "HOME"}
    assert look.detected({})["variables"] == {}
    broken = look.detected({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"})
    assert "LOCAL_WORLD_SIZE" in broken["error"]


def test_no_secret_is_in_a_report():
    """Neither by its variable's name nor in a URL, whatever a launcher sets."""
    secret = "hunter2hunter2"
    environ = {
        "SLURM_JWT": secret,
        "AWS_SECRET_ACCESS_KEY": secret,
        "HF_TOKEN": secret,
        "SLURM_AUTH_COOKIE": secret,
        "MASTER_PASSWORD": secret,
        "GLOO_SOCKET_IFNAME": f"http://me:{secret}@host/",
        "NCCL_DEBUG": "INFO",
        "RANK": "0",  # without the rest: detect lists what it found
        "LOCAL_RANK": "0",
    }
    made = report.report(look.look(environ))
    assert made["detected"]["error"]
    shown = json.dumps(made) + "\n".join(report.lines(made))
    assert secret not in shown
    assert "NCCL_DEBUG" in shown  # the control: others are there


def test_a_report_of_this_machine_is_whole_and_plain_data():
    """Every part has its line, and JSON brings the same data back."""
    made = report.report(look.look({}))
    assert json.loads(json.dumps(made)) == made
    lines = report.lines(made)
    for title in ("accelx doctor", "machine", "devices", "limits"):
        assert title in lines
    assert made["required"]["torch"] == made["torch"]["version"]
    assert made["cpu"]["usable"] >= made["cpu"]["cores"] >= 1


def test_what_accelx_requires_is_what_the_report_looks_for():
    """The lists are those of the project, and the extras are among the others."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = {d.split(">")[0].split("=")[0] for d in project["dependencies"]}
    assert set(look.REQUIRED) == wanted
    extras = project["optional-dependencies"]
    names = [d for k in ("cli", "s3", "gcs", "data", "quant") for d in extras[k]]
    assert {n.split(">")[0].split("=")[0] for n in names} <= set(look.OPTIONAL)


def test_the_door_reports_as_text_and_as_json(capsys):
    """Both say the same; wrong words end in code 2."""
    assert door.main([]) == 0
    assert "where this process stands" in capsys.readouterr().out
    assert door.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accelx"]
    assert door.main(["nett"]) == 2
    assert "all options" in capsys.readouterr().err
    assert door.main(["store", "nowhere://x"]) == 2
    assert "wants a URL" in capsys.readouterr().err
    assert door.main(["net", "-n", "0"]) == 2


def measured(rank, **named):
    """What one rank of two hosts might find."""
    return {
        "rank": rank,
        "world": 2,
        "launcher": "torchrun",
        "backend": "gloo",
        "connect": 0.1,
        "device": "cpu",
        "node": rank,
        "host": f"n{rank}",
        "resolves": [f"10.0.0.{rank}"],
        "why": "",
        "address": "10.0.0.1",
        "ports": [],
        "clock": {"ahead": 0.0, "latency": 1e-4},
        "all_reduce": [{"bytes": 1000, "seconds": 0.001 * (rank + 1), "right": True}],
        **named,
    }


def test_speed_is_that_of_the_slowest_rank():
    """Bandwidth is of the bus: twice the bytes times (w - 1) / w."""
    made = network.judged([measured(0), measured(1)])
    assert made["all_reduce"] == [
        {"bytes": 1000, "seconds": 0.002, "bandwidth": 1000 / 0.002}
    ]
    assert (made["hosts"], made["warnings"]) == (2, [])
    assert "nothing to warn of" in network.lines(made)


@pytest.mark.parametrize(
    ("named", "what", "remedy"),
    [
        ({"resolves": [], "why": "unknown"}, "does not resolve", "/etc/hosts"),
        ({"resolves": ["127.0.1.1"]}, "resolves to 127.0.1.1", "GLOO_SOCKET_IFNAME"),
        (
            {"ports": [{"to": 0, "address": "10.0.0.0:9", "why": "refused"}]},
            "cannot reach rank 0 at 10.0.0.0:9: refused",
            "open ports",
        ),
        ({"clock": {"ahead": -3.0, "latency": 0.0}}, "3.0 s behind", "NTP"),
        (
            {"all_reduce": [{"bytes": 1000, "seconds": 0.1, "right": False}]},
            "wrong sums",
            "NCCL_P2P_DISABLE",
        ),
    ],
)
def test_what_is_wrong_between_ranks_is_told(named, what, remedy):
    """With the rank, its host, and what to change."""
    made = network.judged([measured(0), measured(1, **named)])
    [found] = made["warnings"]
    assert what in found["what"]
    assert "rank 1 on n1" in found["what"]
    assert remedy in found["remedy"]
    assert any(found["what"] in line for line in network.lines(made))


def test_a_port_that_nobody_serves_is_not_reached():
    """And one where something else answers is not taken for ours."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert "refused" in net._reach("127.0.0.1", port)
    assert net.ports(Env(), "127.0.0.1") == []
    assert net.towards("tcp://127.0.0.1:80") == "127.0.0.1"
    assert net.towards("tcp://no.such.host.invalid:80") == "127.0.0.1"


def test_a_store_is_tried_and_left_as_it_was(tmp_path):
    """Every step is done; folders that were made on the way are gone."""
    where = tmp_path / "deep" / "er"
    made = store.tried(str(where), 3 * 2**20 + 1)
    assert made["sound"], made
    assert [s for s in made["steps"] if s["error"]] == []
    assert "load and compare it" in [s["step"] for s in made["steps"]]
    assert list(tmp_path.iterdir()) == []
    assert store.lines(made)[-1].startswith("sound")


def test_what_was_there_stays(tmp_path):
    """A folder in use, with other files in it, is not touched."""
    (tmp_path / "run").write_text("mine")
    assert store.tried(f"file://{tmp_path}", 100)["sound"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_memory_is_left_empty():
    """Nothing lies in fsspec's memory afterwards."""
    import fsspec

    assert store.tried("memory://doctor/run", 100)["sound"]
    assert fsspec.filesystem("memory").find("/doctor") == []


def test_a_store_that_lies_is_found_out(tmp_path, monkeypatch):
    """A read that gives other bytes, and a listing that keeps what was removed."""
    real = storage.read
    monkeypatch.setattr(storage, "read", lambda *a: real(*a)[:-1] + b"?")
    made = store.tried(str(tmp_path), 100)
    assert not made["sound"]
    failed = [s for s in made["steps"] if s["error"]]
    assert [s["step"] for s in failed] == ["read it back"]
    assert "14 bytes that were written" in failed[0]["error"]
    assert list(tmp_path.iterdir()) == []  # also after a failure
    assert "NOT sound: read it back" in store.lines(made)
    monkeypatch.setattr(storage, "read", real)
    monkeypatch.setattr(storage, "remove", lambda *a: None)
    made = store.tried(str(tmp_path), 100)
    assert [s["step"] for s in made["steps"] if s["error"]] == ["remove one"]


def test_a_folder_that_may_not_be_written_is_told(tmp_path):
    """In the words of the system, with exit code 1 and nothing left."""
    (tmp_path / "file").write_text("no folder")
    code = door.main(["store", str(tmp_path / "file"), "--size", "1", "--json"])
    assert code == 1
    with pytest.raises(StorageError, match="do not save there"):
        store._wanted("this", False, "that")


def test_columns_and_times_are_plain():
    """Numbers on the right, nothing that would drive a terminal, few digits."""
    assert text.columns("a >b", [("x", 10), ("\x1b[1m", 2)]) == [
        "a         b",
        "x        10",
        "\\x1b[1m   2",
    ]
    each = [text.duration(s) for s in (12.3456, 0.0123456, 2e-6, 0.0)]
    assert each == ["12.3 s", "12.3 ms", "2 us", "0 us"]
    assert text.facts("title", []) == []


def test_variables_that_were_asked_for_are_remembered():
    """By value, where they are set to something; the rest of a mapping is as it was."""
    noted = look.Noted({"A": "1", "B": "", "C": "3"})
    assert (noted.get("A"), noted.get("B"), noted.get("D")) == ("1", "", None)
    assert noted.read == {"A": "1"}
    assert dict(noted) == {"A": "1", "B": "", "C": "3"}
    assert len(noted) == 3


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("RANK", True),
        ("NCCL_SOCKET_IFNAME", True),
        ("AWS_SECRET_ACCESS_KEY", False),
        ("GITHUB_TOKEN", False),
        ("SLURM_JWT", False),
        ("DB_PASSWORD", False),
        ("HTTP_AUTHORIZATION", False),
        ("SSH_AUTH_SOCK", False),
        ("GOOGLE_APPLICATION_CREDENTIALS", False),
        ("session_cookie", False),
    ],
)
def test_a_name_tells_of_a_secret(name, shown):
    """Such a variable is left out before anything looks at it."""
    assert (name in look.open_ones({name: "value"})) is shown


def test_urls_of_variables_are_shown_without_their_secrets():
    """Neither user nor password nor query."""
    given = {"MASTER_ADDR": "http://me:pass@host/x?sig=abc"}
    assert look.open_ones(given) == {"MASTER_ADDR": "http://host/x?..."}


def files(folder, **texts):
    """Files of a system that is made up."""
    for name, value in texts.items():
        (folder / name.replace("__", ".")).write_text(value)


def test_the_driver_is_what_the_kernel_tells(tmp_path, monkeypatch):
    """Of NVIDIA's line the version, and nothing where there is no such file."""
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release"
    files(tmp_path, version=f"{line} Build\nGCC version: gcc 12.3\n")
    monkeypatch.setattr(look, "DRIVER", tmp_path / "version")
    assert look._driver() == "580.95.05"
    monkeypatch.setattr(look, "DRIVER", tmp_path / "none")
    assert look._driver() is None


@pytest.mark.parametrize(
    ("texts", "limit", "used"),
    [
        ({"memory__max": "1000000\n", "memory__current": "400\n"}, 1000000, 400),
        ({"memory__max": "max\n", "memory__current": "400\n"}, None, 400),
        ({"memory__max": str(2**63), "memory__current": "1"}, None, 1),
        ({}, None, None),
    ],
)
def test_the_limit_of_a_container_is_read(tmp_path, monkeypatch, texts, limit, used):
    """`max`, and more than the machine has, are no limit."""
    files(tmp_path, **texts)
    monkeypatch.setattr(look, "GROUPS", tmp_path)
    found = look.memory()
    assert (found["limit"], found["used"]) == (limit, used)
    assert found["total"] >= found["available"] > 0


def test_limits_are_those_of_this_process():
    """As the system tells them; one without end is None."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = min(512, soft)
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
    try:
        assert look.look({})["limits"]["nofile"] == low
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_report_reads_well_in_each_of_its_forms():
    """Several devices, a container, NUMA nodes and a launcher have their words."""
    data = copy.deepcopy(FINE)
    data["cpu"] |= {"nodes": 2, "quota": 6.5}
    data["system"]["container"] = True
    data["memory"] |= {"limit": 40 * GIB, "used": GIB}
    data["variables"] = {"NCCL_DEBUG": "INFO"}
    said = "\n".join(report.lines(report.report(data)))
    for words in (
        *("Linux, in a container", "8 on 4 cores, 2 NUMA nodes, quota 6.5"),
        "bound to   8 of 16 CPUs",
        *("container  42.9 GB, 1.07 GB used", "cuda:0    H100, 85.9 GB"),
        *("launcher    torchrun", "because of  RANK=1, WORLD_SIZE=2"),
        *("rank        1 of 2", "on node     0 of 1, local rank 1 of 2"),
        *("meets at    tcp://127.0.0.1:1", "NCCL_DEBUG  INFO"),
        *("memlock    unlimited", "installed  rich 15", "not        s3fs"),
        "cuda:1, with several ranks over nccl",
        *("driver    580.95", "backends  gloo, nccl 2.29.1"),
    ):
        assert words in said, words
    data["detected"] = {"error": "RANK is missing", "variables": {}}
    assert "cannot tell  RANK is missing" in "\n".join(
        report.lines(report.report(data))
    )
    data["required"]["attrs"] = None
    assert "attrs MISSING" in "\n".join(report.lines(report.report(data)))


def test_a_report_of_odd_devices_and_limits():
    """mps has a name alone, an unknown memory and no accelerator are said so."""
    data = copy.deepcopy(FINE)
    data["torch"] |= {"devices": [{"name": "mps"}], "accelerator": "mps"}
    data["memory"] |= {"total": None, "available": None}
    said = "\n".join(report.lines({**data, "warnings": []}))
    assert "mps:0     mps" in said
    assert "unknown, unknown available" in said
    data["torch"] |= {"devices": [], "backends": [], "nccl": None}
    said = "\n".join(report.lines({**data, "warnings": []}))
    assert "none that torch can use" in said
    assert "backends     none" in said


def test_no_text_of_a_report_drives_a_terminal():
    """What a variable or a device is called may hold anything."""
    data = copy.deepcopy(FINE)
    data["variables"] = {"NCCL_DEBUG": "\x1b[31mred\nline"}
    lines = report.lines(report.report(data))
    assert any("\\x1b[31mred\\nline" in line for line in lines)
    assert not any("\x1b" in line for line in lines)


def test_the_network_of_one_process_is_told_as_that():
    """No group, no speed, and the words say so."""
    one = measured(0, world=1, backend=None, all_reduce=[])
    made = network.judged([one])
    assert made["all_reduce"] == []
    assert network.lines(made)[0].endswith("over nothing: one process")


def test_ports_that_fail_are_in_the_table():
    """By the ranks that were not reached, and clocks by their sign."""
    ports = [{"to": 0, "address": "a:1", "why": "refused"}]
    late = {"ahead": 0.002, "latency": 1e-5}
    made = network.judged([measured(0), measured(1, ports=ports, clock=late)])
    row = next(line for line in network.lines(made) if "none to 0" in line)
    assert "+2 ms" in row
    assert "10 us" in row


def test_a_port_where_something_else_answers_is_not_ours():
    """The greeting tells."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer():
            there, _ = server.accept()
            with there:
                there.sendall(b"HTTP/1.1")

        thread = threading.Thread(target=answer)
        thread.start()
        assert net._reach("127.0.0.1", port) == "something else answers there"
        thread.join()


def test_a_name_that_does_not_resolve_is_a_finding_and_no_error(monkeypatch):
    """gloo would fail on it later, and say less."""
    monkeypatch.setattr(socket, "gethostname", lambda: "no.such.host.invalid")
    found = net.name()
    assert (found["host"], found["resolves"]) == ("no.such.host.invalid", [])
    assert found["why"]


@pytest.mark.multi
def test_ranks_measure_each_other():
    """Three ranks reach all others, right sums, and clocks of one machine."""

    def measured_here(env):
        return net.measured(env)

    each = run(3)(measured_here)()
    assert [one["ports"] for one in each] == [[], [], []]
    assert [len(one["all_reduce"]) for one in each] == [4, 4, 4]
    assert all(speed["right"] for one in each for speed in one["all_reduce"])
    assert each[0]["clock"] == {"ahead": 0.0, "latency": 0.0}
    assert all(one["clock"]["latency"] > 0 for one in each[1:])
    assert all(abs(one["clock"]["ahead"]) < 0.5 for one in each)


@pytest.mark.multi
def test_a_clock_that_is_ahead_is_found(monkeypatch):
    """The control: a rank whose clock was set forward by an hour."""

    def ahead(env):
        real = net.time.time
        if env.rank == 1:
            monkeypatch.setattr(net.time, "time", lambda: real() + 3600)
        return net.clock(env)["ahead"]

    zero, one = run(2)(ahead)()
    assert zero == 0.0
    assert one == pytest.approx(3600, abs=1)


@pytest.mark.multi
def test_a_rank_that_does_not_serve_is_not_reached(monkeypatch):
    """The control: the others name it, and it reaches them."""

    def deaf(env):
        if env.rank == 0:
            monkeypatch.setattr(net, "_serve", lambda server: None)
        else:
            monkeypatch.setattr(net, "WAIT", 0.3)
        return [port["to"] for port in net.ports(env, "127.0.0.1")]

    assert run(2)(deaf)() == [[], [0]]


class Liar:
    """A store that does one thing otherwise than it was told."""

    def __init__(self, monkeypatch, name, lie):
        real = getattr(storage, name)
        monkeypatch.setattr(storage, name, lambda *a, **k: lie(real, *a, **k))


def longer(real, where):
    """A listing in which each object is a byte longer."""
    return {name: size and size + 1 for name, size in real(where).items()}


@pytest.mark.parametrize(
    ("name", "lie", "step"),
    [
        ("write", lambda real, *a: None, "read it back"),
        ("sizes", longer, "list"),
        ("read", lambda real, s, n, c: real(s, n, c) * 2, "read it back"),
    ],
)
def test_each_lie_of_a_store_is_found_at_its_step(
    tmp_path, monkeypatch, name, lie, step
):
    """What was not written, is listed wrongly, or is read as something else."""
    Liar(monkeypatch, name, lie)
    made = store.tried(str(tmp_path), 100)
    failed = [s["step"] for s in made["steps"] if s["error"]]
    assert failed[0] == step
    assert not made["sound"]


def test_what_cannot_be_removed_is_told(tmp_path, monkeypatch):
    """The last two steps are done whatever came before, and say so."""
    Liar(monkeypatch, "remove_folder", lambda real, *a: None)
    made = store.tried(str(tmp_path), 100)
    [failed] = [s for s in made["steps"] if s["error"]]
    assert failed["step"] == "nothing is left"
    assert "wanted an empty listing" in failed["error"]


def test_a_store_of_a_users_own_kind_of_error_is_told(tmp_path, monkeypatch):
    """Whatever a filesystem raises is a step that failed, and no traceback."""

    class OwnError(Exception):
        """Not one of accelx, nor of the system."""

    def fails(real, *a, **k):
        raise OwnError("s3://me:secret1234@host is gone")

    Liar(monkeypatch, "read", fails)
    made = store.tried(str(tmp_path), 100)
    [failed] = [s for s in made["steps"] if s["error"]]
    assert failed["error"] == "OwnError: s3://host is gone"


def test_speeds_are_told_of_what_is_large():
    """Bytes over seconds, and nothing for small steps or those that failed."""
    step = {"step": "write", "seconds": 0.5, "bytes": 10**9, "error": ""}
    assert store._speed(step) == "2.00 GB/s"
    assert store._speed({**step, "bytes": 0}) == ""
    assert store._speed({**step, "error": "no"}) == ""


def test_a_key_press_and_a_reader_that_has_gone_are_no_errors(monkeypatch):
    """Ctrl-C is code 130; `| head` is 0."""

    def raising(error):
        def run(given):
            raise error

        return run

    monkeypatch.setattr(door, "_run", raising(KeyboardInterrupt()))
    assert door.main([]) == 130
    monkeypatch.setattr(door, "_run", raising(StorageError("s3://me:pw12@h is gone")))
    assert door.main([]) == 1


def test_the_words_before_and_after_a_command_mean_the_same():
    """--json may stand on either side, and defaults are those of the help."""
    assert options.parse(["--json", "net"]).json
    assert options.parse(["net", "--json"]).json
    assert not options.parse(["net"]).json
    given = options.parse(["net", "-n", "3", "--timeout", "5"])
    assert (given.n, given.timeout) == (3, 5.0)
    assert (options.parse(["net"]).n, options.parse(["store", "x"]).size) == (2, 16)


@pytest.mark.parametrize("words", [["store"], ["net", "-n", "x"], ["store", "a", "b"]])
def test_words_that_are_too_few_or_too_many_are_wrong_use(words, capsys):
    """Told with where all of them are listed."""
    assert door.main(words) == 2
    assert "--help" in capsys.readouterr().err
