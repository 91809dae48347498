"""Jobs of several nodes, and jobs that start again: the same numbers, nothing left."""

import base64
import contextlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from tests.door.scripts.where import listening
from tests.door.spawning import (
    LONG,
    ROOT,
    SCRIPTS,
    Forked,
    command,
    environment,
    forked,
)
from tests.door.test_spawn_ends import gone, runs
from tests.door.test_spawn_safety import LOOPBACK, parents

pytestmark = [pytest.mark.door, pytest.mark.timeout(4 * LONG)]
STEPS = 9
TRAIN = SCRIPTS / "elastic.py"
SPACES = [f"accelx-{os.getpid()}-{end}" for end in "ab"]  # network namespaces
FIRST = "10.213.77.1"  # address of the first; the second has .2


def free_port():
    """A port that was free just now: a rendezvous has to be told one.

    None of those that the kernel gives away to whoever asks for any.
    """
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    dice = random.Random(time.time_ns())  # pytest has set the global one
    while True:
        try:
            with socket.create_server(("127.0.0.1", dice.randrange(10000, given))) as s:
                return s.getsockname()[1]
        except OSError:
            continue


def serves(port):
    """Whether a rendezvous is there: the first that comes to its address opens it."""
    rows = [s.split() for s in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(r[3] == "0A" and int(r[1].partition(":")[2], 16) == port for r in rows)


@pytest.fixture
def start(tmp_path):
    """Start launchers, their output in files; all end with the test."""
    with contextlib.ExitStack() as stack:
        started = []

        def one(*words, before=(), **more):
            out = stack.enter_context((tmp_path / f"out-{len(started)}").open("w+"))
            if before:
                process = subprocess.Popen(
                    [*before, *command(*words)],
                    env=environment(**more),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                )
                stack.callback(process.wait)
                stack.callback(process.kill)
            else:
                process = Forked(*words, stdout=out.fileno(), folder=ROOT, **more)
                stack.callback(process.close)
            process.said = Path(out.name).read_text
            started.append(process)
            return process

        yield one


def until(claim, *processes, seconds=LONG):
    """Wait for `claim()`; fail with what launchers said if it does not come."""
    limit = time.monotonic() + seconds
    while not claim():
        words = "\n".join(p.said() for p in processes)
        assert time.monotonic() < limit, words
        assert any(p.poll() is None for p in processes), words
        time.sleep(0.02)


def ended(*processes):
    """The exit codes, with what was said."""
    codes = [process.wait(LONG) for process in processes]
    return codes, [process.said() for process in processes]


def gates(folder, *steps):
    """Close the gates after these steps (or "K-of-N"); a function that opens one."""
    for number in steps:
        (folder / f"gate-{number}").touch()
    return lambda number: (folder / f"gate-{number}").unlink()


def weights(folder):
    """The weights that a run has ended with."""
    return torch.load(folder / "weights.pt")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights of one plain process, and of two ranks that nothing happens to."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    words = [sys.executable, TRAIN, folders[0], str(STEPS)]
    subprocess.run(words, env=environment(), check=True, timeout=LONG)
    done = forked("-n", 2, TRAIN, folders[1], STEPS)
    assert done.returncode == 0, done.stderr
    return [weights(folder) for folder in folders]


def same(made, wanted, atol=0.0):
    """Whether all weights are equal, to the bit or to rounding."""
    assert made.keys() == wanted.keys()
    return all(torch.allclose(made[k], wanted[k], rtol=0, atol=atol) for k in wanted)


def test_killed_ranks_start_again_and_end_as_if_they_had_not(
    tmp_path, start, undisturbed
):
    """kill -9 of each of two ranks in turn: the weights of a quiet run, to the bit."""
    opened = gates(tmp_path, 2, 5)
    words = ("-n", 2, "--restarts", 2, "--logs", tmp_path / "logs")
    job = start(*words, TRAIN, tmp_path, STEPS)
    for number, rank in ((2, 1), (5, 0)):
        until((tmp_path / f"step-{number}-of-2").exists, job)
        pids = [int((tmp_path / f"pid-{r}").read_text()) for r in (0, 1)]
        found = listening(parents(job.pid))
        os.kill(pids[rank], signal.SIGKILL)
        opened(number)
        assert set(found) == {LOOPBACK}
        assert gone(pids)
    (code,), (said,) = ended(job)
    assert code == 0, said
    assert same(weights(tmp_path), undisturbed[1])
    assert not same(weights(tmp_path), undisturbed[0])  # the control: bits do differ
    assert re.findall(r"rank (\d) on .* killed by SIGKILL", said) == ["1", "0"]
    assert "attempt 2 starts, with 2 ranks; 0 more restarts allowed" in said
    assert not (tmp_path / "logs/failure.json").exists()
    assert (
        json.loads((tmp_path / "logs/attempt-1/failure.json").read_text())["rank"] == 0
    )
    assert "'accelx'" in (tmp_path / "env-0").read_text()
    assert "?attempt=2'" in (tmp_path / "env-0").read_text()


def test_a_job_goes_from_three_nodes_to_two_and_back(tmp_path, start, undisturbed):
    """One launcher is killed, another comes: the curve is that of one quiet process."""
    # two that wait no longer for the third do a step, and not the one that is looked at
    opened, port = gates(tmp_path, "1-of-2", 3, 6, "7-of-2"), free_port()
    words = ["-n", 1, "--nodes", "2:3", "--rendezvous", f"127.0.0.1:{port}"]
    words += ["--restarts", 3, "--last-call", 1, "--lost-after", 4]
    words += [TRAIN, tmp_path, STEPS]
    nodes = [start(*words)]
    until(lambda: serves(port), *nodes)  # the first, which is to stay
    nodes += [start(*words), start(*words)]
    until((tmp_path / "step-3-of-3").exists, *nodes)
    lost = parents(nodes[2].pid)
    assert len(lost) == 3  # launcher, agent and rank
    nodes[2].kill()
    nodes[2].wait()
    assert gone(lost)
    opened(3)
    until((tmp_path / "step-6-of-2").exists, *nodes[:2])
    nodes[2] = start(*words)
    codes, said = ended(*nodes)
    assert codes == [0, 0, 0], "\n".join(said)
    assert (tmp_path / f"step-{STEPS}-of-3").exists()
    assert same(weights(tmp_path), undisturbed[0], 1e-6)
    assert "open to the network" not in said[0]  # it was the loopback


def make_spaces():
    """Two network namespaces with a wire between them; False where that is refused."""
    if shutil.which("ip") is None:
        return False
    a, b = SPACES
    lines = [f"netns add {a}", f"netns add {b}"]
    lines += [f"link add acx0 netns {a} type veth peer name acx1 netns {b}"]
    for space, device, number in ((a, "acx0", 1), (b, "acx1", 2)):
        address = f"10.213.77.{number}/24"
        lines += [f"-n {space} addr add {address} dev {device}"]
        lines += [f"-n {space} link set {d} up" for d in (device, "lo")]
    quiet = {"stderr": subprocess.DEVNULL, "check": False}
    return not any(
        subprocess.run(["ip", *line.split()], **quiet).returncode for line in lines
    )


@pytest.fixture
def spaces():
    """How a command is started in each of two network namespaces."""
    made = make_spaces()
    if made:
        yield [["ip", "netns", "exec", space] for space in SPACES]
    for space in SPACES if shutil.which("ip") else ():
        subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)
    if not made:
        pytest.skip("network namespaces cannot be made here: needs root and iproute2")


def spares(port):
    """How many nodes wait for a place, as torch keeps it in its store."""
    store = TCPStore("127.0.0.1", port, is_master=False)
    state = pickle.loads(base64.b64decode(store.get(f"torch.rendezvous.{TRAIN.name}")))
    return len(state.redundancy_list)


def two_nodes(folder, start, host, prefixes, port, spare=False):
    """A job of two nodes with two ranks each, and a third launcher of another job.

    `spare`: and one node too many, which is the last of those returned.
    """
    opened = gates(folder, 1)
    words = ["-n", 2, "--nodes", 2, "--rendezvous", f"{host}:{port}"]
    train = [TRAIN, folder, 2]
    nodes = [start(*words, *train, before=prefix) for prefix in prefixes]
    until((folder / "step-1-of-4").exists, *nodes)
    other = start(*words, "--job-id", "other", *train, before=prefixes[1])
    codes, said = ended(other)
    sockets = [listening(parents(node.pid)) for node in nodes]
    if spare:
        nodes.append(start(*words, *train))
        until(lambda: spares(port), nodes[-1])
    opened(1)
    return nodes, sockets, (codes[0], said[0])


def check_two_nodes(folder, nodes, refused):
    """What holds of such a job wherever its nodes are."""
    codes, said = ended(*nodes)
    assert codes == [0, 0], "\n".join(said)
    assert (folder / "step-2-of-4").exists()
    lines = [(folder / f"env-{rank}").read_text() for rank in range(4)]
    assert [eval(line)[:5] for line in lines] == [
        (rank, 4, rank // 2, 2, "accelx") for rank in range(4)
    ]
    assert refused[0] == 2
    assert "job_id is 'elastic.py' at" in refused[1]
    assert "'other' here; give this job a --rendezvous of its own" in refused[1]
    assert "Traceback" not in refused[1]
    return said


def test_nodes_in_namespaces_meet_on_the_address_given(tmp_path, start, spaces):
    """Two machines as the kernel sees them; a stranger is refused."""
    nodes, sockets, refused = two_nodes(tmp_path, start, FIRST, spaces, 29400)
    said = check_two_nodes(tmp_path, nodes, refused)
    assert f"'elastic.py' meet at {FIRST}:29400" in said[0]
    assert "executed; for trusted networks only" in said[0]
    assert "meet at" not in said[1]  # it opens none
    assert f"'tcp://{FIRST}:" in (tmp_path / "env-3").read_text()
    assert set(sockets[0]) == {"014DD50A"}  # 10.213.77.1 as the kernel writes it
    assert set(sockets[1]) == {"024DD50A"}


def test_nodes_on_one_machine_meet_on_its_loopback(tmp_path, start):
    """Without namespaces: all sockets are on the loopback; a node too many waits."""
    found = two_nodes(tmp_path, start, "127.0.0.1", [[], []], free_port(), spare=True)
    (code,), (words,) = ended(found[0].pop())
    assert (code, words.count("without a use for this node")) == (0, 1)
    said = check_two_nodes(tmp_path, found[0], found[2])
    assert [set(sockets) for sockets in found[1]] == [{LOOPBACK}] * 2
    assert "meet at" not in said[0] + said[1]


def test_each_node_says_which_rank_failed_first(tmp_path, start):
    """Not that its own ranks lost a peer; and nothing of the job is left."""
    words = ["-n", 1, "--nodes", 2, "--rendezvous", f"127.0.0.1:{free_port()}"]
    made = []
    for node in (1, 0):
        logs = tmp_path / f"logs-{node}"
        more = ["--node-rank", node, "--logs", logs, TRAIN, tmp_path, 4, "fail-1-2"]
        made.append(start(*words, *more))
    until((tmp_path / "pid-0").exists, *made)
    job = set().union(*(parents(process.pid) for process in made))
    codes, said = ended(*made)
    assert codes == [1, 1]
    for text in said:
        lines = text.splitlines()
        assert re.fullmatch("rank 1 on .* failed: ValueError: enough of this", lines[0])
        assert " by peer" not in text
    for node in (0, 1):
        failure = json.loads((tmp_path / f"logs-{node}/failure.json").read_text())
        assert (failure["rank"], failure["exception"]) == (1, "ValueError")
    log = (tmp_path / "logs-0/attempt-0/rank-0.log").read_text()
    assert not log or " by peer" in log  # it was told to end before it had felt it
    assert gone(job)


def test_a_node_that_is_told_to_leave_saves_and_the_rest_goes_on(
    tmp_path, start, undisturbed
):
    """SIGTERM to one launcher: 75 there, no restart used up and no step lost here."""
    opened, port = gates(tmp_path, "1-of-1", 3), free_port()
    words = ["-n", 1, "--nodes", "1:2", "--rendezvous", f"127.0.0.1:{port}"]
    words += ["--last-call", 1, TRAIN, tmp_path, STEPS, "preempt"]
    nodes = [start(*words)]
    until(lambda: serves(port), *nodes)
    nodes.append(start(*words))
    until((tmp_path / "step-3-of-2").exists, *nodes)
    nodes[1].send_signal(signal.SIGTERM)
    until(lambda: "SIGTERM" in nodes[1].said(), nodes[1])
    opened(3)
    codes, said = ended(*nodes)
    assert codes == [0, 75], "\n".join(said)
    assert same(weights(tmp_path), undisturbed[0], 1e-6)
    assert not runs(nodes[1].pid)
