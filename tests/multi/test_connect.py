"""Ranks find one another by what a launcher set, and leave without a word."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
import torch.distributed as dist

from accelx import comm, env as env_module
from accelx.env import close, connect
from accelx.errors import CollectiveError
from accelx.records import Axis, Env
from accelx.testing import run

pytestmark = pytest.mark.multi


def free_port():
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def variables(rank, world, port):
    """What torchrun would set, but that rank 0 serves the store."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = map(str, (rank, world, rank, world))
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**dict(zip(names, values, strict=True)), **where}


def program(body, environ, log):
    """Run `body` as the script of a process of its own, its exit handlers included."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os.environ.update(environ)
        torch.set_num_threads(1)
        atexit._clear()
        try:
            body()
            code = 0
        except BaseException as error:
            sys.last_value = error
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stderr.flush()
    finally:
        os._exit(code)


def programs(body, folder, world=2):
    """Exit code and standard error of each rank."""
    port = free_port()
    logs = [folder / f"rank{rank}" for rank in range(world)]
    pids = [
        program(body, variables(rank, world, port), log)
        for rank, log in enumerate(logs)
    ]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def until_unserved(env):
    """Wait until rank 0 has gone: torch logs a store that goes while it is asked."""
    while env_module._answers(urlsplit(env.rendezvous)):
        time.sleep(0.05)


def test_starts_in_a_row_end_clean(tmp_path):
    """Each ends with code 0 and nothing on standard error, however ranks leave."""

    def leave_at_once():
        connect(device="cpu")

    def sum_and_leave():
        env = connect(device="cpu")
        assert comm.reduce(env, env.rank, "sum") == 1

    def main_leaves_late():
        time.sleep(0.05 * connect(device="cpu").main)

    def main_leaves_early():
        time.sleep(0.05 * connect(device="cpu").rank)

    def close_twice_and_mesh():
        env = connect(device="cpu", axes="a=2,b=-1")
        assert comm.mesh(env) is comm.mesh(connect(env))
        close(env)
        close(env)

    bodies = [leave_at_once, sum_and_leave, main_leaves_late, main_leaves_early]
    bodies.append(close_twice_and_mesh)
    for start in range(15):
        folder = tmp_path / str(start)
        folder.mkdir()
        assert programs(bodies[start % 5], folder) == [(0, ""), (0, "")], start


def test_ranks_that_leave_at_once_break_no_other(tmp_path):
    """The first of four to connect waits for the last; without that this hangs."""

    def body():
        connect(device="cpu")

    for start in range(3):
        folder = tmp_path / str(start)
        folder.mkdir()
        assert programs(body, folder, world=4) == [(0, "")] * 4


def test_ranks_meet_once_all_have_their_meshes(tmp_path, monkeypatch):
    """One that left before would break those that still connect within an axis."""

    def fn(env):
        made, mesh = tmp_path / str(env.rank), comm.mesh

        def noted(part):
            found = mesh(part)
            time.sleep(0.1 * env.main)
            with made.open("a") as file:
                file.write("x")
            return found

        monkeypatch.setattr(comm, "mesh", noted)
        connect(env, axes="a=2,b=-1")
        return made.read_text(), (tmp_path / "0").read_text()

    for mine, of_main in run(4)(fn)():
        assert mine == of_main != ""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_ends_the_program_and_hangs_nobody(tmp_path, rank):
    """The rank that failed says why, with code 1; the other leaves at its own end."""

    def body():
        env = connect(device="cpu")
        if env.rank == rank:
            raise KeyError("the cause")
        if env.rank:
            until_unserved(env)

    ends = programs(body, tmp_path)
    code, said = ends.pop(rank)
    assert code == 1
    assert said.count("KeyError: 'the cause'") == 1
    assert ends == [(0, "")]


def test_a_rank_that_outlives_the_store_leaves_quietly(tmp_path, monkeypatch):
    """Rank 0 waits for the others, but not for ever."""
    monkeypatch.setattr(env_module, "GOODBYE", 0.0)

    def body():
        env = connect(device="cpu")
        if env.rank:
            until_unserved(env)

    assert programs(body, tmp_path) == [(0, ""), (0, "")]


def test_the_store_of_one_machine_listens_on_loopback_alone(tmp_path):
    """Nobody outside can reach it; torch's own would listen on every interface."""

    def body():
        env = connect(device="cpu")
        comm.barrier(env)
        port = int(os.environ["MASTER_PORT"])
        tables = [Path("/proc/net", name).read_text() for name in ("tcp", "tcp6")]
        table = [line.split() for text in tables for line in text.splitlines()]
        listening = [row[1] for row in table if row[3] == "0A"]
        ours = [where for where in listening if where.endswith(f":{port:04X}")]
        comm.barrier(env)
        assert ours == [f"0100007F:{port:04X}"], ours

    assert programs(body, tmp_path) == [(0, ""), (0, "")]


def test_connecting_again_is_the_same_and_writes_nothing():
    """Once more gives the same Env; no variable changes; axes may be named anew."""

    def fn(env):
        before = dict(os.environ)
        again = connect(env)
        named = connect(env, axes="replicate=1,shard=-1")
        assert comm.mesh(named)["shard"].size() == env.world
        return again == env, dict(os.environ) == before, named.axes

    for same, untouched, axes in run(2)(fn)():
        assert same
        assert untouched
        assert axes == (Axis("replicate", 1), Axis("shard", 2))


def test_close_and_connect_again_over_one_store():
    """A second opening does not read the first one's addresses."""

    def fn(env):
        total = 0
        for _ in range(3):
            total += comm.reduce(env, 1, "sum")
            first = comm.mesh(env)
            close(env)
            assert not dist.is_initialized()
            env = connect(env)
            assert comm.mesh(env) is not first
        return total

    assert run(2)(fn)() == [6, 6]


def test_a_mesh_is_built_once_for_each_layout():
    """Equal axes give one object, of the shape and names asked; others another."""

    def fn(env):
        mesh = comm.mesh(env)
        other = comm.mesh(connect(env))
        flat = comm.mesh(connect(env, axes="data=-1"))
        here = (mesh is other, mesh is flat, mesh.mesh_dim_names, mesh.mesh.tolist())
        return (*here, mesh.get_coordinate())

    got = run(4, axes={"replicate": 2, "shard": -1})(fn)()
    for rank, (again, flat, names, ranks, coordinate) in enumerate(got):
        assert again
        assert not flat
        assert (names, ranks) == (("replicate", "shard"), [[0, 1], [2, 3]])
        assert list(coordinate) == [rank // 2, rank % 2]


def test_a_group_that_is_open_is_taken_if_it_fits():
    """The user's own group serves; one of other size is refused with both sizes."""

    def fn(env):
        taken = connect(Env(env.rank, 2, env.rank, 2), device="cpu")
        total = comm.reduce(taken, 1, "sum")
        told = []
        for other in (Env(), Env(env.rank, 3, 0, 3)):
            try:
                connect(other, device="cpu")
            except CollectiveError as error:
                told.append(str(error))
        return taken.backend, total, told

    for rank, (backend, total, told) in enumerate(run(2)(fn)()):
        assert (backend, total) == ("gloo", 2)
        assert f"rank 0 of 1, but rank {rank} of 2 is open already" in told[0]
        assert f"rank {rank} of 3, but rank {rank} of 2 is open already" in told[1]


def test_wrong_requests_are_refused_before_ranks_wait():
    """Axes that do not fit, and an Env that says not where to meet."""
    with pytest.raises(ValueError, match="world 6 does not split"):
        connect(Env(0, 6, 0, 6), axes="replicate=2,shard=4", device="cpu")
    with pytest.raises(CollectiveError, match="has no rendezvous"):
        connect(Env(0, 2, 0, 2), device="cpu")
