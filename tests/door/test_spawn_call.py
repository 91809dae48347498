"""`spawn(fn, n=2)` from a program: results, failures, and what cannot be sent."""

import importlib
import os
import re
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

import accelx as ax
from tests.door.spawning import LONG, SCRIPTS, program

pytestmark = [pytest.mark.door, pytest.mark.timeout(3 * LONG)]


QUICK = ("good", "bad", "local", "lock", "unsendable", "none")


@pytest.fixture(scope="module")
def said():
    """What calls.py says of each case; meanwhile another waits for its time limit."""
    with ThreadPoolExecutor(2) as pool:
        run = partial(program, SCRIPTS / "calls.py", timeout=2 * LONG)
        done = list(pool.map(lambda cases: run(*cases), [("slow",), QUICK]))
    assert [one.stderr for one in done] == ["", ""]
    text = "".join(one.stdout for one in done)
    parts = re.split(r"^== (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def place(word):
    """What a rank of a call knows; a function of an imported module."""
    return word, os.environ["RANK"], os.environ["WORLD_SIZE"]


def test_results_come_back_in_the_order_of_ranks(said):
    """Tensors and objects of the program's own types, through a collective."""
    assert said["good"] == "[(1.5, True, 0), (1.5, True, 1)]\n"


def test_the_failing_ranks_traceback_comes_back(said):
    """The exception itself; in its cause which rank and line; nothing on the screen."""
    text = said["bad"]
    assert text.startswith("LookupError: nothing under that name, from SpawnError(")
    assert "rank 1 failed: LookupError: nothing under that name" in text
    assert 'calls.py", line' in text


def test_a_function_that_is_in_no_module_travels_whole(said):
    """A closure of a script, and what it gives, of the script's own type."""
    assert said["local"] == "[(True, 6, True)]\n"


def test_a_time_limit_names_who_was_late(said):
    """The rank that had returned is not named."""
    assert re.search(r"within \d+ s, but rank 1 had not", said["slow"])


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("lock", "local cannot be sent.*make locks, files and connections within it"),
        ("unsendable", "a lock cannot be sent.*return plain data"),
        ("none", "1 or more, got 0; write n=2"),
    ],
)
def test_what_cannot_be_sent_is_told_the_remedy(case, words, said):
    """Arguments and results that no pickle takes, no ranks."""
    assert re.search(f"SpawnError.*{words}", said[case])


def test_a_program_without_a_guard_is_told_so():
    """No ranks of ranks: the line to add is named."""
    done = program(SCRIPTS / "unguarded.py")
    assert done.returncode == 1
    assert 'put it under `if __name__ == "__main__":`' in done.stderr
    assert "unguarded.py" in done.stderr


def test_a_program_with_threads_may_call_and_nothing_is_left(tmp_path, monkeypatch):
    """Nothing is forked from the caller; the folder of the call is removed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    results = ax.spawn(place, "here", n=2)
    stop.set()
    thread.join()
    assert results == [("here", "0", "2"), ("here", "1", "2")]
    assert list(tmp_path.iterdir()) == []


def test_the_module_is_callable_too():
    """`accelx.spawn` is a function and a program, whichever way it was imported."""
    module = importlib.import_module("accelx.spawn")
    with pytest.raises(ax.SpawnError, match="1 or more, got 'x'"):
        module(place, n="x")
    assert module.spawn is ax.spawn
