"""What differs between systems, as a table."""

import sys

import pytest

from accelx.errors import SpawnError
from accelx.launch.machine import Machine
from accelx.launch.options import parse
from accelx.launch.plan import asked_for, resolve
from accelx.launch.system import (
    ASKED,
    LINUX,
    System,
    check_here,
    check_system,
    decide,
    offered,
)

MAC = {"fork", "wait4"}  # of Python 3.11 and 3.12
MADE = {"starts": "fork", "loopback": "lo0", "tether": "pipe", "binds": False}
MADE |= {"stacks": "file", "rss_unit": 1}


@pytest.mark.parametrize(
    ("name", "has", "environ", "made"),
    [
        ("linux", LINUX, {}, System()),
        ("linux", LINUX, {"USE_LIBUV": "0"}, System(libuv=False)),
        ("linux", LINUX, {"USE_LIBUV": "1"}, System()),
        ("linux", LINUX - {"memfd_create"}, {}, System(stacks="file")),
        ("linux", LINUX - {"sched_setaffinity"}, {}, System(binds=False)),
        ("darwin", MAC, {}, System(**MADE, peeks=False)),
        ("darwin", MAC | {"waitid"}, {}, System(**MADE)),
        ("freebsd14", LINUX, {}, System(loopback="lo0", tether="pipe", binds=False)),
    ],
)
def test_a_system_is_decided_by_its_name_and_what_it_has(name, has, environ, made):
    """Loopback, tether, cores, stacks, waiting, units of memory, and the store."""
    assert decide(name, has, environ) == made


@pytest.mark.parametrize(
    ("name", "has", "called"),
    [
        ("win32", (), "Windows"),
        ("emscripten", (), "a browser"),
        ("wasi", (), "wasi"),
        ("linux", LINUX - {"fork"}, "linux"),
    ],
)
def test_a_system_without_fork_is_told_what_to_write(name, has, called):
    """One process needs no launcher."""
    assert decide(name, has).starts == "none"
    said = rf"by fork, which {called} does not have; .*: python train\.py"
    with pytest.raises(SpawnError, match=said):
        check_system(name, has, "train.py")


@pytest.mark.parametrize(("name", "has"), [("linux", LINUX), ("darwin", MAC)])
def test_a_system_with_fork_is_not_refused(name, has):
    """The control."""
    check_system(name, has, "train.py")


def test_this_system_is_looked_at():
    """What `os` has here is found, and starts ranks."""
    assert offered() <= set(ASKED)
    assert "fork" in offered()
    check_here("train.py")
    assert decide(sys.platform, offered()).starts == "fork"


def test_the_plan_follows_the_system():
    """macOS: another loopback, no binding, and `--bind always` says so."""
    machine = Machine(system="darwin", has=frozenset(MAC))
    asked = asked_for(parse(["-n", "1", "train.py"]))
    made = resolve(asked, {}, machine)
    assert made.system == System(**MADE, peeks=False)
    assert made.exports["GLOO_SOCKET_IFNAME"] == "lo0"
    assert made.shares == ()
    bound = asked_for(parse(["-n", "1", "--bind", "always", "train.py"]))
    with pytest.raises(SpawnError, match="on darwin"):
        resolve(bound, {}, machine)
    assert resolve(bound, {}, Machine()).shares == ((0,),)  # the control
