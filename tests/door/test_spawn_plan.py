"""What the launcher decides before it starts anything: pure functions, as tables."""

import attrs
import pytest

from accelx.errors import SpawnError
from accelx.launch.failure import Failure, first, raised
from accelx.launch.machine import Cpu, Machine, near, shares, usable_gpus
from accelx.launch.options import parse
from accelx.launch.place import alone, rank_variables
from accelx.launch.plan import asked_for, check_cores, check_gpus, resolve
from accelx.launch.system import LINUX, check_system

# Two NUMA nodes of four cores; CPU n + 8 is the second hardware thread of core n.
BIG = tuple(Cpu(n % 8 // 4, n % 8 // 4, n % 8, n) for n in range(16))
SERVER = Machine(host="server", cpus=BIG)


def plan(*words, machine=SERVER, **environ):
    """The plan for a command line that ends in `train.py`."""
    return resolve(asked_for(parse([*words, "train.py"])), environ, machine)


def setting(made, name):
    """Value and source of one setting."""
    (found,) = [s for s in made.settings if s.name == name]
    return found.value, found.source


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (1, [{*range(16)}]),
        (2, [{0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15}]),
        (8, [{n, n + 8} for n in range(8)]),
        (9, []),
    ],
)
def test_ranks_get_whole_cores_node_by_node(ranks, expected):
    """Hardware threads of a core stay together, and neighbours on one NUMA node."""
    assert [set(share) for share in shares(BIG, ranks)] == expected


@pytest.mark.parametrize("ranks", range(1, 9))
def test_no_cpu_is_lost_or_given_twice(ranks):
    """The shares are a partition, and differ by one core at most."""
    split = shares(BIG, ranks)
    assert sorted(cpu for share in split for cpu in share) == list(range(16))
    assert max(map(len, split)) - min(map(len, split)) <= 2


NODE = ({0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15})
FOUR = tuple(Cpu(n // 2, 0, n, n) for n in range(8))  # four nodes of two cores


@pytest.mark.parametrize(
    ("cpus", "ranks", "expected"),
    [
        (BIG, 1, [NODE[0] | NODE[1]]),
        (BIG, 2, [NODE[0], NODE[1]]),
        (BIG, 3, [NODE[0], NODE[0], NODE[1]]),
        (BIG, 4, [NODE[0], NODE[0], NODE[1], NODE[1]]),
        (BIG, 17, [NODE[0]] * 9 + [NODE[1]] * 8),
        (FOUR, 2, [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        (FOUR, 3, [{0, 1}, {2, 3}, {4, 5, 6, 7}]),
    ],
)
def test_ranks_near_each_other_share_a_node(cpus, ranks, expected):
    """By `numa` a rank has all of a node, or several; no CPU is left out."""
    assert [set(share) for share in near(cpus, ranks)] == expected


@pytest.mark.parametrize(
    ("devices", "visible", "build", "count"),
    [
        (8, None, None, 8),
        (8, None, "cu130", 8),
        (8, None, "cpu", 0),
        (8, None, "rocm7.0", 0),
        (8, "0,1,2", None, 3),
        (8, "", None, 0),
        (8, "-1", None, 0),
        (8, "0,9,1", None, 1),
        (8, "GPU-8932f937,GPU-17a2", None, 2),
        (0, "0,1", None, 0),
    ],
)
def test_gpus_are_counted_as_cuda_counts_them(devices, visible, build, count):
    """CUDA_VISIBLE_DEVICES ends at the first entry without a device."""
    assert usable_gpus(devices, visible, build) == count


@pytest.mark.parametrize(("ranks", "gpus"), [(8, 4), (2, 1), (1000, 999)])
def test_more_ranks_than_gpus_are_refused(ranks, gpus):
    """The message has both counts, a command that works, and the way to the CPU."""
    with pytest.raises(SpawnError, match=f"{ranks} ranks.* {gpus} GPU") as caught:
        check_gpus(ranks, gpus, "train.py")
    assert f"write -n {gpus}" in str(caught.value)
    assert f"CUDA_VISIBLE_DEVICES= python -m accelx.spawn -n {ranks}" in str(
        caught.value
    )


def test_ranks_that_would_bring_the_machine_down_are_refused():
    """A slip of the finger starts no hundred thousand processes; 64 on 2 cores may."""
    check_cores(64, 2)
    with pytest.raises(SpawnError, match=r"100000 ranks.* 2 cores.*write -n 2"):
        check_cores(100_000, 2)
    with pytest.raises(SpawnError, match="512 at most"):
        plan("-n", "100000")


@pytest.mark.parametrize(("ranks", "gpus"), [(8, 8), (1, 8), (8, 0)])
def test_enough_gpus_or_none_are_no_obstacle(ranks, gpus):
    """As many ranks as GPUs, fewer, or any number on a machine without GPUs."""
    check_gpus(ranks, gpus, "train.py")


@pytest.mark.parametrize(
    ("machine", "count", "why"),
    [
        (attrs.evolve(SERVER, gpus=4), 4, "one per GPU"),
        (SERVER, 2, "one per NUMA node"),
        (Machine(), 1, "one per NUMA node"),
    ],
)
def test_auto_counts_gpus_then_numa_nodes(machine, count, why):
    """`-n auto` says what it counted."""
    made = plan("-n", "auto", machine=machine)
    assert made.num_ranks == count
    assert why in setting(made, "num_ranks")[1]


@pytest.mark.parametrize(
    ("words", "environ", "name", "value", "source"),
    [
        ((), {}, "OMP_NUM_THREADS", "4", "default: 8 cores / 2 ranks"),
        ((), {"OMP_NUM_THREADS": "3"}, "OMP_NUM_THREADS", "3", "environment"),
        ((), {"OMP_NUM_THREADS": "3,2"}, "OMP_NUM_THREADS", "3,2", "environment"),
        ((), {}, "GLOO_SOCKET_IFNAME", "lo", "default"),
        (
            (),
            {"GLOO_SOCKET_IFNAME": "eth0"},
            "GLOO_SOCKET_IFNAME",
            "eth0",
            "environment",
        ),
        ((), {}, "grace", "30 s", "default"),
        (("--grace", "5"), {}, "grace", "5 s", "command line"),
        (("--prefix",), {}, "prefix", "yes", "command line"),
        (("--log-dir", "d"), {}, "log_dir", "d", "command line"),
        ((), {}, "cpus", "0: 0-3+8-11, 1: 4-7+12-15", "default: auto"),
        (("--bind", "never"), {}, "cpus", "shared", "command line: never"),
        (
            ("--bind", "numa"),
            {"OMP_PLACES": "cores"},  # asked for, so done
            "cpus",
            "0: 0-3+8-11, 1: 4-7+12-15",
            "command line: numa, whole NUMA nodes",
        ),
        ((), {"OMP_PLACES": "cores"}, "cpus", "shared", "environment: OMP_PLACES"),
        ((), {"OMP_NUM_THREADS": "16"}, "cpus", "shared", "default: cores per rank"),
        ((), {"MASTER_PORT": "29500"}, "MASTER_PORT", "a free one", "not used"),
    ],
)
def test_a_setting_says_where_it_comes_from(words, environ, name, value, source):
    """The command line wins over the environment, and that over the default."""
    got, why = setting(plan("-n", "2", *words, **environ), name)
    assert got == value
    assert source in why


def test_what_the_user_has_set_is_not_exported_again():
    """Ranks inherit the environment; only what is missing in it is added."""
    assert plan("-n", "2").exports["OMP_NUM_THREADS"] == "4"
    assert "OMP_NUM_THREADS" not in plan("-n", "2", OMP_NUM_THREADS="1").exports


def test_a_quota_of_the_container_counts_as_cores():
    """Eight cores of which two may be used at a time: one thread for each of two."""
    made = plan("-n", "2", machine=attrs.evolve(SERVER, quota=2.5))
    assert setting(made, "OMP_NUM_THREADS")[0] == "1"


def test_one_core_for_a_rank_is_not_bound_unless_asked():
    """Loader workers would share that core with the rank that waits for them."""
    assert plan("-n", "8").shares == ()
    assert plan("-n", "8", "--bind", "always").shares[3] == (3, 11)
    with pytest.raises(SpawnError, match="core for each of 9 ranks, got 8 cores"):
        plan("-n", "9", "--bind", "always")


def test_a_rank_inside_a_rank_is_refused():
    """Started by torchrun, the launcher would multiply the ranks."""
    with pytest.raises(SpawnError, match="already is rank 3 of 8; write python train"):
        plan("-n", "2", RANK="3", WORLD_SIZE="8")


def test_windows_is_told_that_one_process_needs_no_launcher():
    """The platform is an argument, so that the message is tested everywhere."""
    check_system("linux", LINUX, "train.py")
    with pytest.raises(SpawnError, match=r"fork.*Windows.*python train\.py"):
        check_system("win32", (), "train.py")


def test_ranks_meet_on_this_machine_through_the_launchers_store():
    """The variables are those that torch's env:// reads."""
    made = plan("-n", "2")
    variables = rank_variables(made, alone(made, 4711)[1])
    assert variables["MASTER_ADDR"] == "127.0.0.1"
    assert variables["MASTER_PORT"] == "4711"
    assert variables["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    assert (variables["RANK"], variables["WORLD_SIZE"]) == ("1", "2")


def test_the_root_cause_is_the_first_that_is_no_echo():
    """A torch error about a lost peer is put behind failures that came after it."""
    closed = raised(0, RuntimeError("[pair.cc] Connection closed by peer"))
    killed = Failure(1, closed.time + 1, "signal", "killed by SIGKILL", 137)
    late = Failure(2, closed.time + 2, "exception", "ValueError", 1)
    read = "Read error. This is typically caused by a remote worker hanging"
    assert closed.follows
    assert raised(0, RuntimeError(read)).follows
    assert first([closed, late, killed]) is killed
    assert first([closed]) is closed
    own = raised(3, ConnectionError("database: connection closed by peer"))
    assert not own.follows  # the user's, not torch's
