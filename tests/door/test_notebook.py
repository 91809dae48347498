"""Ranks from a notebook: a real kernel with threads, its own functions and classes."""

import json
import re

import nbformat
import pytest

from tests.door.spawning import LONG, SCRIPTS, program
from tests.door.test_spawn_ends import gone

pytestmark = [pytest.mark.door, pytest.mark.timeout(2 * LONG + 60)]

# One kernel for all: cells, by the name under which the tests find their outputs.
CELLS = {
    "set up": """
import os
import threading

import torch

import accelx as ax

%load_ext accelx
(torch.ones(3, requires_grad=True) * 2).sum().backward()  # torch has threads now
threading.Thread(target=threading.Event().wait, daemon=True).start()
factor, lock, device = 3, threading.Lock(), "cpu"


class Answer:
    def __init__(self, rank):
        self.rank = rank

    def times(self):
        return self.rank * factor


class Odd(Exception):
    def __init__(self, left, right):
        super().__init__(f"{left} and {right}")
        self.left = left


def parents():
    found, pid = [], os.getpid()
    while pid > 1:
        pid = int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
        found.append((pid, open(f"/proc/{pid}/cmdline").read()))
    return found


def outer(shift):
    def inner(given):
        env = ax.connect(device=device)
        print("rank", env.rank, "is here")
        total = ax.reduce(env, torch.tensor([float(env.rank)]), "sum")
        others = ax.gather_objects(env, Answer(env.rank))
        return total + shift, Answer(given), others[-1].times(), parents()
    return inner
""",
    "spawn": """
results = ax.spawn(outer(10), 4, n=2)
answers = [result[1] for result in results]
factor = 100
(
    [result[0].item() for result in results],
    [type(answer) is Answer for answer in answers],
    [result[2] for result in results],
    answers[0].times(),
    [os.getpid() in dict(result[3]) for result in results],
    ["ipykernel" in dict(result[3][:2])[result[3][0][0]] for result in results],
)
""",
    "interrupted": """
import time

def wait():
    print("pid", os.getpid(), "interrupt me", flush=True)
    time.sleep(600)

ax.spawn(wait, n=2)
""",
    "raised": """%%accelx -n 2
def fail():
    if env.rank == 1:
        raise Odd("salt", 2)

fail()
""",
    "caught": """
import sys
[type(sys.last_value) is Odd, sys.last_value.left, type(sys.last_value.__cause__)]
""",
    "magic": """%%accelx -n 2 --no-prefix
print("of", env.world)
factor = 7
last = ax.reduce(env, torch.tensor([env.rank + 1.0]), "sum").item()
last, Answer(2).times(), outer(1)(5)[1]
""",
    "untouched": """
factor, "last" in globals(), type(_[2]) is Answer
""",
    "cannot be sent": """%%accelx -n 2
lock.acquire()
""",
    "shell in it": """%%accelx -n 2
!ls
""",
    "a script": """%%accelx -n 2 train.py
1
""",
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """name of a cell -> kind of output -> what it says."""
    path = tmp_path_factory.mktemp("notebook") / "ranks.ipynb"
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS.values()]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    home = {"HOME": str(path.parent)}  # a user's own may hold anything, or be no place
    done = program(SCRIPTS / "notebook.py", str(path), timeout=2 * LONG, **home)
    assert done.returncode == 0, done.stderr
    found = {}
    for name, said in zip(CELLS, json.loads(done.stdout), strict=True):
        found[name] = {"stdout": "", "stderr": ""}
        for kind, text in said:
            old = found[name].get(kind, "")
            found[name][kind] = old + text if isinstance(text, str) else text
    assert found["set up"] == {"stdout": "", "stderr": ""}
    return found


def test_a_closure_of_a_cell_runs_on_ranks(outputs):
    """Results, with the notebook's own classes and the values that it had then.

    The last of them is the control: what the class does here afterwards follows the
    notebook's globals, so it is the notebook's class and no copy.
    """
    said = outputs["spawn"]
    sums, same, times, after, inside, _ = eval(said["result"])
    assert sums == [11.0, 11.0]
    assert same == [True, True]
    assert times == [3, 3]
    assert after == 400
    assert inside == [True, True]


def test_no_rank_is_forked_from_the_kernel(outputs):
    """A rank's parent is a launcher that was never the kernel; the kernel is above."""
    *_, forked = eval(outputs["spawn"]["result"])
    assert forked == [False, False]


def test_what_ranks_print_stands_in_the_cell(outputs):
    """Each line with its rank; without, where the line of the magic says so."""
    lines = outputs["spawn"]["stdout"].splitlines()
    assert sorted(lines) == ["[0] rank 0 is here", "[1] rank 1 is here"]
    lines = outputs["magic"]["stdout"].splitlines()
    assert sorted(lines) == ["of 2", "of 2", "rank 0 is here", "rank 1 is here"]


def test_a_ranks_exception_is_raised_as_it_is(outputs):
    """Type, text and attributes; above it the rank's traceback, with its lines."""
    name, text, trace = outputs["raised"]["error"]
    assert (name, text) == ("Odd", "salt and 2")
    lines = r'rank 1 failed.*line 4, in fail\n\s+raise Odd\("salt.*direct cause of'
    assert re.search(lines, re.sub(r"\x1b\[[0-9;]*m", "", trace), re.S)
    same, left, cause = outputs["caught"]["result"].strip("[]").split(", ")
    assert (same, left, cause) == ("True", "'salt'", "accelx.errors.SpawnError")


def test_the_magic_runs_a_cell_among_the_notebooks_names(outputs):
    """The last expression of rank 0 is the result; what it binds stays in the ranks.

    Functions of earlier cells see it there: 7 times 2.
    """
    assert outputs["magic"]["result"].startswith("(3.0, 14, <__main__.Answer at")
    assert outputs["untouched"]["result"] == "(100, False, True)"


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("cannot be sent", "the cell uses lock, which cannot be sent"),
        ("shell in it", "a shell command (!) stands in it; write it in a cell of"),
        ("a script", "settings alone, got '-n 2 train.py'; leave train.py out"),
    ],
)
def test_what_no_rank_can_run_is_refused(cell, words, outputs):
    """Before anything is started, with what to write."""
    name, text, _ = outputs[cell]["error"]
    assert name == "SpawnError"
    assert words in text


def test_an_interrupt_ends_all_ranks_and_the_notebook_goes_on(outputs):
    """KeyboardInterrupt in the cell; no rank is left; the next cells work."""
    assert outputs["interrupted"]["error"][0] == "KeyboardInterrupt"
    pids = re.findall(r"pid (\d+)", outputs["interrupted"]["stdout"])
    assert pids, "they were there"
    assert gone(map(int, pids))
