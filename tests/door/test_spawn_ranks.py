"""What a rank finds when it runs: its name, words, place, streams and sockets."""

import json
import os
from pathlib import Path

import pytest

from accelx.launch.machine import look, shares
from tests.door.spawning import SCRIPTS, launch

pytestmark = pytest.mark.door
LOOPBACK = "0100007F"  # 127.0.0.1 as the kernel writes it
BINDS = bool(shares(look(os.environ).cpus, 2))  # whether there is a core for each


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks of where.py have said, and the files that they left open."""
    unclosed = tmp_path_factory.mktemp("unclosed") / "of-rank-"
    bind = ("--bind", "always" if BINDS else "never")
    words = ("-n", 2, *bind, "where.py", "--lr", "3", "--print")
    done = launch(*words, UNCLOSED=str(unclosed))
    assert (done.returncode, done.stderr) == (0, "")
    said = list(map(json.loads, done.stdout.splitlines()))
    here = sorted((s for s in said if "name" in s), key=lambda s: s["variables"])
    files = [Path(f"{unclosed}{rank}").read_text() for rank in range(2)]
    return here, [s["farewell"] for s in said if "farewell" in s], files


def test_the_script_is_the_main_program(ranks):
    """Name, module, words and path are as `python where.py` has them."""
    for rank in ranks[0]:
        assert rank["name"] == "__main__"
        assert rank["main"]
        assert rank["argv"] == ["where.py", "--lr", "3", "--print"]
        assert rank["path"] == str(SCRIPTS)


def test_each_rank_knows_its_place(ranks):
    """Rank, world, local rank, local world, launcher."""
    assert [rank["variables"] for rank in ranks[0]] == [
        [str(rank), "2", str(rank), "2", "accelx"] for rank in range(2)
    ]


def test_nothing_listens_beyond_this_machine(ranks):
    """Launcher and ranks are reached on 127.0.0.1 alone; a public socket is seen."""
    for rank in ranks[0]:
        assert set(rank["listening"]) == {LOOPBACK}
        assert set(rank["control"]) > {LOOPBACK}


def test_ranks_draw_other_numbers(ranks):
    """As separate processes do: the state of one import is not handed to all."""
    first, second = (rank["random"] for rank in ranks[0])
    assert not set(first) & set(second)


@pytest.mark.skipif(not BINDS, reason="one core")
def test_cores_are_divided(ranks):
    """Each rank runs on CPUs of its own, with as many threads as it has cores."""
    first, second = (set(rank["cpus"]) for rank in ranks[0])
    assert not first & second
    assert ranks[0][0]["threads"] <= len(first)


def test_only_rank_0_has_the_terminal(ranks):
    """Two ranks that read one terminal would share out its characters."""
    assert (
        ranks[0][0]["stdin"] != ranks[0][1]["stdin"] == Path("/dev/null").stat().st_ino
    )


def test_exit_handlers_run_and_open_files_are_written(ranks):
    """Leaving without taking torch apart loses nothing that Python would have kept."""
    assert ranks[1] == ["__main__", "__main__"]
    assert ranks[2] == ["written, never flushed"] * 2


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A module with words of its own, under prefix and logs."""
    logs = tmp_path_factory.mktemp("logs")
    done = launch("-n", 2, "--prefix", "--log-dir", logs, "-m", "pack.job", "-n", "9")
    assert done.returncode == 0
    return done, logs


def test_a_module_runs_as_python_m_would(logged):
    """Its package is imported, its words are its own."""
    lines = logged[0].stdout.splitlines()
    assert {"[0] 0 __main__ pack -n 9", "[1] 1 __main__ pack -n 9"} <= set(lines)


def test_each_line_carries_its_rank(logged):
    """Also states of a progress bar, a last line without an end, and stderr."""
    of_rank_1 = [s for s in logged[0].stdout.splitlines() if s.startswith("[1]")]
    assert of_rank_1[1:] == ["[1]  10%", "[1]  90%", "[1] 100%", "[1] no end of line"]
    assert sorted(logged[0].stderr.splitlines()) == ["[0] to stderr", "[1] to stderr"]
    assert all(s.startswith(("[0] ", "[1] ")) for s in logged[0].stdout.splitlines())


def test_a_log_holds_what_its_rank_wrote(logged):
    """Both streams, byte for byte, without a prefix."""
    assert sorted(p.name for p in logged[1].iterdir()) == ["rank-0.log", "rank-1.log"]
    text = (logged[1] / "rank-1.log").read_bytes()
    assert text.startswith(b"1 __main__ pack -n 9\n")
    assert b" 10%\r 90%\r100%\nno end of line" in text
    assert b"to stderr\n" in text
