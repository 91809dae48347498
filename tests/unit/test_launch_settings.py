"""Settings of the launcher: which source wins, what is refused, and with what words."""

import attrs
import pytest
from hypothesis import given, strategies as st

from accelx.errors import SpawnError
from accelx.launch import config
from accelx.launch.machine import Machine
from accelx.launch.nearest import nearest
from accelx.launch.options import parse
from accelx.launch.plan import asked_for, resolve, table
from accelx.launch.settings import KNOWN, Choice, File, decide

# Texts of each setting, and what they mean.
TEXTS = {
    "num_ranks": {"1": 1, "2": 2, "7": 7, "auto": "auto"},
    "log_dir": {"logs": "logs", "a b": "a b", "none": None},
    "prefix": {"yes": True, "on": True, "no": False, "0": False},
    "grace": {"0": 0.0, "1.5": 1.5, "30": 30.0},
    "timeout": {"600": 600.0, "0.5": 0.5, "none": None},
    "bind": {how: how for how in ("auto", "always", "numa", "never")},
    "nodes": {"1": (1, 1), "2": (2, 2), "1:4": (1, 4)},
    "min_ranks": {"1": 1, "8": 8},
    "max_ranks": {"8": 8, "16": 16},
    "node_rank": {"auto": None, "0": 0, "3": 3},
    "rendezvous": {"a-1:4": ("a-1", 4), "b": ("b", 29400), "[::1]:5": ("::1", 5)},
    "job_id": {"run-7": "run-7", "a/b.c:1": "a/b.c:1"},
    "restarts": {"0": 0, "3": 3},
    "last_call": {"0": 0.0, "2.5": 2.5},
    "join_timeout": {"1": 1.0, "600": 600.0},
    "lost_after": {"4": 4.0},
}
DEFAULTS = {"prefix": False, "grace": 30.0, "bind": "auto", "restarts": 0}
DEFAULTS |= {"last_call": 10.0, "join_timeout": 600.0}


def test_every_setting_is_in_the_table():
    """A new setting gets its texts here."""
    assert set(TEXTS) == {known.name for known in KNOWN}


def given_somewhere():
    """Some settings with some of their texts."""
    texts = {name: st.sampled_from(sorted(values)) for name, values in TEXTS.items()}
    return st.fixed_dictionaries({}, optional=texts)


@given(given_somewhere(), given_somewhere(), given_somewhere())
def test_the_first_source_that_speaks_decides(words, variables, lines):
    """Command line, environment, file, default: for every setting, in every mixture."""
    environ = {f"ACCELX_{name.upper()}": text for name, text in variables.items()}
    chosen = decide(words, environ, File("x.toml", lines))
    for name, texts in TEXTS.items():
        sources = {
            "command line": words,
            f"environment: ACCELX_{name.upper()}": variables,
        }
        sources["x.toml"] = lines
        spoken = [
            (s, texts[found[name]]) for s, found in sources.items() if name in found
        ]
        expected = [*spoken, ("default", DEFAULTS.get(name))][0]
        assert (chosen[name].source, chosen[name].value) == expected


@given(given_somewhere())
def test_silence_decides_nothing(variables):
    """An empty variable is as good as none; the control: one that speaks is heard."""
    empty = {f"ACCELX_{name.upper()}": "" for name in TEXTS}
    assert decide({}, empty, None) == decide({}, {}, None)
    loud = empty | {f"ACCELX_{name.upper()}": text for name, text in variables.items()}
    heard = decide({}, loud, None)
    assert {n for n, c in heard.items() if c.source != "default"} == set(variables)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("num_ranks = 8", 8),
        ('num_ranks = "auto"', "auto"),
        ("prefix = true", True),
        ("prefix = false", False),
        ("grace = 2.5", 2.5),
        ("timeout = 600", 600.0),
        ('timeout = "none"', None),
        ('log_dir = "logs"', "logs"),
        ('bind = "never"', "never"),
        ("nodes = 2", (2, 2)),
        ('nodes = "1:4"', (1, 4)),
        ('rendezvous = "node0:29400"', ("node0", 29400)),
    ],
)
def test_a_file_is_toml(tmp_path, line, value):
    """Numbers, words and truth values as TOML writes them."""
    path = tmp_path / "job.toml"
    path.write_text(f"# of the job\n{line}\n")
    file = config.read(str(path))
    name = line.partition(" ")[0]
    assert decide({}, {}, file)[name] == Choice(value, str(path))


@pytest.mark.parametrize(
    ("words", "environ", "lines", "said"),
    [
        ({"num_ranks": "x"}, {}, {}, "1 or more, got 'x'; write -n 2, or -n auto for"),
        ({}, {"NUM_RANKS": "0"}, {}, "got '0' in ACCELX_NUM_RANKS; write ACCELX_NUM_"),
        (
            {},
            {},
            {"num_ranks": 0},
            "got 0 in a.toml; write num_ranks = 2, or num_ranks",
        ),
        ({}, {}, {"num_ranks": 2.0}, "1 or more, got 2.0 in a.toml"),
        ({}, {}, {"num_ranks": [2]}, r"1 or more, got \[2\] in a.toml"),
        ({"grace": "-1"}, {}, {}, "0 or more, got '-1'; write --grace 30"),
        ({"grace": "nan"}, {}, {}, "0 or more, got 'nan'; write --grace 30"),
        ({"nodes": "0"}, {}, {}, "or a range such as 1:4, got '0'; write --nodes 2"),
        ({"nodes": "4:1"}, {}, {}, "got '4:1'; write --nodes 2"),
        ({"nodes": "2:"}, {}, {}, "got '2:'; write --nodes 2"),
        ({}, {}, {"nodes": 2.0}, "got 2.0 in a.toml; write nodes = 2"),
        ({"rendezvous": "a:b"}, {}, {}, "host:port, got 'a:b'; write --rendezvous no"),
        ({"rendezvous": "a:0"}, {}, {}, "got 'a:0'; write --rendezvous node0:29400"),
        (
            {"node_rank": "-1"},
            {},
            {},
            "from 0, or auto, got '-1'; write --node-rank au",
        ),
        (
            {},
            {"JOB_ID": "a b"},
            {},
            "is one word, got 'a b' in .*; write ACCELX_JOB_ID",
        ),
        ({}, {}, {"restarts": True}, "0 or more, got True in a.toml; write restarts ="),
        ({"lost_after": "0"}, {}, {}, "1 or more, got '0'; write --lost-after 10"),
        (
            {},
            {"GRACE": "soon"},
            {},
            "got 'soon' in ACCELX_GRACE; write ACCELX_GRACE=30",
        ),
        ({}, {}, {"grace": True}, "got True in a.toml; write grace = 30"),
        (
            {"timeout": "0"},
            {},
            {},
            "more than 0, or none, got '0'; write --timeout 600",
        ),
        (
            {},
            {},
            {"prefix": "maybe"},
            "yes or no, got 'maybe' in a.toml; write prefix = t",
        ),
        (
            {},
            {"BIND": "all"},
            {},
            "numa or never, got 'all' in .*; write ACCELX_BIND=auto",
        ),
        (
            {},
            {},
            {"log_dir": ["x"]},
            r"a path, got \['x'\] in a.toml; write log_dir = \"lo",
        ),
        ({}, {}, {"grce": 3}, "settings of .* got 'grce'; did you mean grace"),
        ({}, {}, {"Num-Ranks": 3}, "got 'Num-Ranks'; did you mean num_ranks"),
        ({}, {}, {"zzz": 3}, "num_ranks, log_dir, .* got 'zzz'; remove it"),
        ({}, {"GRCE": "3"}, {}, "ACCELX_GRCE, which is no .* mean ACCELX_GRACE"),
        ({}, {"LOGDIR": "3"}, {}, "ACCELX_LOGDIR, which is no .* mean ACCELX_LOG_DIR"),
    ],
)
def test_what_cannot_be_meant_is_told_what_to_write(words, environ, lines, said):
    """What was wanted, what came and where, what to write in that same place."""
    variables = {f"ACCELX_{name}": text for name, text in environ.items()}
    with pytest.raises(SpawnError, match=said):
        decide(words, variables, File("a.toml", lines))


def test_other_variables_are_left_alone():
    """accelx's own, a Kubernetes service called accelx, and everybody else's."""
    others = {"ACCELX_LAUNCHER": "accelx", "ACCELX_SPAWN_LOADS": "x", "GRCE": "1"}
    others |= {"ACCELX_SERVICE_HOST": "10.0.0.1", "ACCELX_PORT_80_TCP_ADDR": "10.0.0.1"}
    assert decide({}, others, None) == decide({}, {}, None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grce", "5", "t.py"], "no option --grce; did you mean --grace"),
        (["--grce=5", "t.py"], "no option --grce; did you mean --grace"),
        (["--log_dir", "x", "t.py"], "no option --log_dir; did you mean --log-dir"),
        (["-N", "2", "t.py"], "no option -N; did you mean -n"),
        (["--nproc-per-node", "2", "t.py"], "did you mean -n"),
        (["--num_processes=2", "t.py"], "did you mean -n"),
        (
            ["--zzzzzz", "t.py"],
            "no option --zzzzzz; write the script's after the script",
        ),
        (["-m", "--call", "t.py"], "not allowed with"),
    ],
)
def test_an_unknown_option_names_the_nearest(words, said):
    """Also where another launcher's word was meant; what is hidden is not offered."""
    with pytest.raises(SpawnError, match=said):
        parse(["-n", "2", *words])


def test_a_known_option_is_taken_and_the_scripts_are_its_own():
    """The control: nothing of this is refused, and nothing after the script is read."""
    words = ("-n", "2", "--no-prefix", "--logs", "d", "t.py", "--grce", "--prefix")
    asked = asked_for(parse(words))
    assert asked.words == {"num_ranks": "2", "prefix": "no", "log_dir": "d"}
    assert (asked.target, asked.args) == ("t.py", ("--grce", "--prefix"))
    assert asked_for(parse(["--num-ranks", "3", "t.py"])).words == {"num_ranks": "3"}


@pytest.mark.parametrize(("name", "near"), [("GRACE", "grace"), ("qqq", None)])
def test_the_nearest_name_is_near(name, near):
    """Case does not count; what is like nothing is nothing."""
    assert nearest(name, ["grace", "bind"]) == near


def planned(*words, file=None, **environ):
    """The plan of `train.py`, on a machine of one core."""
    return resolve(asked_for(parse([*words, "train.py"])), environ, Machine(), file)


def test_the_plan_carries_what_was_decided():
    """Number of ranks, grace, prefix, logs and limit come from wherever they stand."""
    file = File("accelx.toml", {"num_ranks": 3, "prefix": True, "grace": 7})
    made = planned("--timeout", "9", file=file, ACCELX_LOG_DIR="logs", ACCELX_GRACE="8")
    found = (made.num_ranks, made.prefix, made.grace, made.timeout, made.log_dir)
    assert found == (3, True, 8.0, 9.0, "logs")
    rows = {tuple(line.split()[:3]) for line in table(made).splitlines()}
    assert ("num_ranks", "3", "accelx.toml") in rows
    assert ("grace", "8", "s") in rows
    sources = {s.name: s.source for s in made.settings}
    assert sources["timeout"] == "command line"
    assert sources["log_dir"] == "environment: ACCELX_LOG_DIR"
    assert sources["bind"] == "default"


def test_no_number_of_ranks_names_the_three_places():
    """Where it may stand, in each place's own spelling."""
    with pytest.raises(
        SpawnError, match=r"-n N, or ACCELX_NUM_RANKS=N .*num_ranks = N"
    ):
        planned()


def test_a_call_has_its_arguments_alone():
    """A program that calls gets no prefix or number of ranks that it did not write."""
    asked = attrs.evolve(asked_for(parse(["-n", "2", "f"])), kind="call")
    file = File("accelx.toml", {"num_ranks": 3, "prefix": True, "zzz": 1})
    made = resolve(asked, {"ACCELX_GRACE": "x", "ACCELX_PREFIX": "1"}, Machine(), file)
    assert (made.num_ranks, made.prefix, made.grace) == (2, False, 30.0)


def test_the_file_of_the_folder_is_read_without_asking(tmp_path, monkeypatch):
    """Only `accelx.toml`; another name has to be given."""
    monkeypatch.chdir(tmp_path)
    assert config.read(None) is None
    (tmp_path / "accelx.toml").write_text("grace = 1")
    (tmp_path / "other.toml").write_text("grace = 2")
    assert config.read(None) == File("accelx.toml", {"grace": 1})
    assert config.read("other.toml") == File("other.toml", {"grace": 2})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            None,
            "a file of settings, got '.*'.*No such file.*write --config accelx.toml",
        ),
        ("grace = \n", "is to be TOML, and is not .*line 1.*write one setting a line"),
        ("grace: 3", "is to be TOML"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, text, said):
    """One that is missing is an error where it was asked for."""
    path = tmp_path / "a.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpawnError, match=said):
        config.read(str(path))
