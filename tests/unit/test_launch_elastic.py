"""Nodes and restarts of a job, decided before anything is started; and their parts."""

import os
import socket

import attrs
import pytest

from accelx.env_detect import detect
from accelx.errors import SpawnError
from accelx.launch import address, texts, watch, wire
from accelx.launch.elastic import Elastic, agent_variables, beat_of
from accelx.launch.fork import _anonymous_file, close
from accelx.launch.machine import Machine
from accelx.launch.meeting import _twice
from accelx.launch.options import parse
from accelx.launch.place import Place, rank_variables
from accelx.launch.plan import asked_for, resolve
from accelx.launch.running import Rank, Run
from accelx.launch.settings import File

MEET = ("--rendezvous", "a:1")


def plan(*words, file=None, **environ):
    """The plan of `jobs/train.py`, two ranks a node."""
    asked = asked_for(parse(["-n", "2", *words, "jobs/train.py"]))
    return resolve(asked, environ, Machine(), file)


def row(made, name):
    """Value and source of one setting."""
    (found,) = [s for s in made.settings if s.name == name]
    return found.value, found.source


@pytest.mark.parametrize(
    ("words", "made"),
    [
        ((), None),
        (("--nodes", "1"), None),
        (("--restarts", "0"), None),
        (("--restarts", "3"), Elastic(restarts=3)),
        (("--nodes", "2", *MEET), {"fewest": 2, "most": 2}),
        (("--nodes", "1:4", *MEET), {"fewest": 1, "most": 4}),
        (("--min", "2", "--max", "8", *MEET), {"fewest": 1, "most": 4}),
        (("--min", "6", "--max", "6", *MEET), {"fewest": 3, "most": 3}),
        (("--min", "2", "--max", "2"), None),
        (
            ("--nodes", "2", *MEET, "--node-rank", "1", "--restarts", "5"),
            {"fewest": 2, "most": 2, "node_rank": 1, "restarts": 5},
        ),
    ],
)
def test_nodes_and_restarts_make_the_agents_orders(words, made):
    """One node without restarts needs no agent; ranks are counted in whole nodes."""
    if isinstance(made, dict):
        whole = {"rendezvous": ("a", 1), "job_id": "train.py", "picks_interface": True}
        made = Elastic(**whole, **made)
    assert plan(*words).elastic == made


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--nodes", "2"),
            "address to meet at.*got none; write --rendezvous HOST:29400",
        ),
        (("--min", "2"), "the fewest and the most, got --min 2 --max None"),
        (("--min", "4", "--max", "2", *MEET), "got --min 4 --max 2; write --nodes 1:4"),
        (("--min", "3", "--max", "8", *MEET), "nodes of 2 ranks.*; write --nodes 2:4"),
        (
            ("--nodes", "2", "--min", "2", "--max", "4", *MEET),
            "got --min 2 --max 4 and --nodes 2; write --nodes 2",
        ),
        (
            ("--nodes", "1:2", *MEET, "--node-rank", "0"),
            "that stays, got --node-rank 0 and --nodes 1:2; write --node-rank auto",
        ),
        (
            ("--nodes", "2", *MEET, "--node-rank", "2"),
            "from 0, got 2; write .*-rank 1 ",
        ),
        (MEET, "--rendezvous is about several nodes, got one; write --nodes 2 beside"),
        (("--job-id", "x", "--restarts", "1"), "--job-id is about several nodes"),
        (("--lost-after", "9"), "--lost-after is about several nodes"),
    ],
)
def test_orders_that_contradict_are_refused(words, said):
    """With the user's numbers, and words that work."""
    with pytest.raises(SpawnError, match=said):
        plan(*words)


@pytest.mark.parametrize("words", [("--restarts", "2"), ("--nodes", "2", *MEET)])
def test_a_call_starts_its_ranks_once(words):
    """A function's results come from ranks of this machine; a script has no results."""
    asked = attrs.evolve(asked_for(parse(["-n", "2", *words, "f"])), kind="call")
    with pytest.raises(SpawnError, match=r"start once, got nodes \d and restarts \d;"):
        resolve(asked, {}, Machine())
    plan(*words)  # the control


@pytest.mark.parametrize("text", ["2", "1:4", "a:1", "[::1]:7"])
def test_what_is_read_is_written_the_same_way(text):
    """Words of one command line become words of another."""
    read = texts.endpoint if text[0] in "a[" else texts.nodes
    assert str(read(text)) == text


def test_what_a_file_says_of_nodes_is_shown_where_it_is_not_used():
    """A file serves several commands: with one node, its rendezvous is no error."""
    file = File("accelx.toml", {"rendezvous": "a:1", "nodes": 2})
    assert row(plan(file=file), "rendezvous") == ("a:1", "accelx.toml")
    assert row(plan(file=file), "nodes") == ("2", "accelx.toml")
    alone = plan("--nodes", "1", file=file)
    assert alone.elastic is None
    assert row(alone, "rendezvous") == (
        "not used",
        "accelx.toml, but there is one node",
    )
    assert row(alone, "MASTER_ADDR")[0] == "127.0.0.1"


def test_slurm_says_where_to_meet_and_which_job_it_is():
    """The first host of the job and its number; a word of the user's goes first."""
    slurm = {"SLURM_JOB_NODELIST": "n[07-09]", "SLURM_JOB_ID": "4711"}
    made = plan("--nodes", "3", **slurm)
    host, port = made.elastic.rendezvous
    assert (host, made.elastic.job_id) == ("n07", "slurm-4711")
    assert 15000 <= port < 25000
    assert row(made, "rendezvous")[1] == "environment: first host of SLURM's job"
    own = plan("--nodes", "3", *MEET, "--job-id", "b", **slurm).elastic
    assert (own.rendezvous, own.job_id) == (("a", 1), "b")


@pytest.mark.parametrize(
    ("nodes", "words", "beat", "beats"),
    [
        (2, (), 2, 5),
        (32, (), 2, 5),
        (1024, (), 64, 5),
        (2, ("--lost-after", "60"), 12, 5),
        (2, ("--lost-after", "1"), 1, 4),
        (1024, ("--lost-after", "30"), 6, 5),
    ],
)
def test_heartbeats_get_rarer_with_the_nodes(nodes, words, beat, beats):
    """Each rewrites the state of all nodes; at least four may be missed."""
    made = plan("--nodes", f"1:{nodes}", *MEET, *words)
    assert (made.elastic.beat, made.elastic.beats) == (beat, beats)
    assert row(made, "lost_after")[0] == f"{beat * beats} s"
    assert beat_of(nodes) <= beat or words


def test_several_nodes_use_no_loopback():
    """gloo's interface is found at the start, and NCCL's is NCCL's affair."""
    made = plan("--nodes", "2", *MEET)
    assert not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & set(made.exports)
    assert row(made, "GLOO_SOCKET_IFNAME")[0] == "an interface"
    told = plan("--nodes", "2", *MEET, GLOO_SOCKET_IFNAME="eth7")
    assert not told.elastic.picks_interface
    alone = plan("--restarts", "2")  # the control
    assert alone.exports["GLOO_SOCKET_IFNAME"] == "lo"


def test_torchs_agent_shares_no_store_with_its_ranks():
    """Which is what lets a restart read the addresses of the attempt before."""
    assert agent_variables() == {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def test_a_rank_of_a_later_attempt_is_recognised():
    """By torchrun's variables; its prefix in the store is not the first attempt's."""
    place = Place(5, 6, 1, 4711, "10.0.0.1", 2, 3, attempt=2, interface="eth0")
    variables = rank_variables(plan("--nodes", "3", *MEET, "--restarts", "4"), place)
    env = detect(variables)
    found = (env.rank, env.world, env.local_rank, env.local_world, env.node, env.nodes)
    assert found == (5, 6, 1, 2, 2, 3)
    assert env.launcher == "accelx"
    assert env.rendezvous == "tcp://10.0.0.1:4711?attempt=2"
    assert variables["GLOO_SOCKET_IFNAME"] == "eth0"
    assert variables["TORCHELASTIC_MAX_RESTARTS"] == "4"
    first = Place(0, 2, 0, 4711)
    assert "attempt" not in detect(rank_variables(plan(), first)).rendezvous


def test_a_rank_of_a_node_is_given_once():
    """What two nodes claim is said with its number; 0 to n - 1 in any order is well."""
    assert _twice([2, 0, 1]) == ""
    assert "2 nodes were started with --node-rank 1; write 0 to 2" in _twice([1, 0, 1])


def test_lines_pass_between_launcher_and_agent():
    """Whole, in order, also two in one piece; and an end is an end."""
    ours, theirs = wire.pair()
    assert wire.hear(ours) is None
    wire.say(theirs, do="note", words="a\nb")
    wire.say(theirs, do="end", code=None)
    assert wire.hear(ours, None) == {"do": "note", "words": "a\nb"}
    assert wire.hear(ours) == {"do": "end", "code": None}
    theirs.end.close()
    with pytest.raises(EOFError):
        wire.hear(ours)
    wire.say(ours, do="stop")  # to one that is gone: reading has told
    ours.end.close()


def test_an_address_of_this_machine_is_listened_on_and_no_other():
    """The first takes it, the next is a guest; an address of elsewhere is not taken."""
    door = address.listen("127.0.0.1", 0)
    port = door.getsockname()[1]
    assert address.listen("127.0.0.1", port) is None
    assert address.listen("192.0.2.1", 0) is None  # reserved for documentation
    assert address.reach("127.0.0.1", port, 5) == "127.0.0.1"
    door.close()
    with pytest.raises(SpawnError, match=rf"answers at --rendezvous 127.0.0.1:{port} "):
        address.reach("127.0.0.1", port, 0)
    with pytest.raises(SpawnError, match="'no host' has no address here"):
        address.resolve("no host", 1)


def test_a_name_that_is_the_loopback_here_only_is_opened_to_others(monkeypatch):
    """Debian writes 127.0.1.1 beside a machine's own name in its /etc/hosts."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with address.listen("node7", 0) as door:
        assert door.getsockname()[0] == "0.0.0.0"
    with address.listen("127.0.1.1", 0) as door:  # the control: asked for by number
        assert door.getsockname()[0] == "127.0.1.1"


def test_the_interface_of_an_address_is_found():
    """The loopback's here; nothing for an address that is not."""
    assert address.interface_of("127.0.0.1") == "lo"
    assert address.interface_of("192.0.2.1") == ""


def test_ranks_are_recalled_also_by_a_word_that_was_read_with_the_one_before():
    """Of a launcher that came late to its agent's orders to start and to end them."""
    ours, theirs = wire.pair()
    wire.say(theirs, do="start")
    wire.say(theirs, do="stop")
    assert wire.hear(ours) == {"do": "start"}
    pid = os.posix_spawnp("sleep", ["sleep", "60"], os.environ)
    report, reports = os.pipe()
    os.close(reports)
    made = plan()
    run = Run(made, [Rank(0, pid, report, _anonymous_file(made))], [], agent=ours)
    try:
        watch.watch(run)
    finally:
        watch.let_signals()
    close(run)
    assert run.recalled
    assert run.ranks[0].code == 128 + 15
    for one in (ours, theirs):
        one.end.close()
