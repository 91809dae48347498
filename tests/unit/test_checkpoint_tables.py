"""What the checkpoint tool shows is whole at any width, and needs no torch to show."""

import subprocess
import sys

import pytest

from accelx.checkpoints import diff, screen, tables
from accelx.checkpoints.tables import Column, Table
from tests.unit.source import FILES, module_of

HOUR, DAY = 3600, 86400
NAMED = ("strict", "check", "boxes", "dtypes", "manifest", "commit", "verify", "retain")
LIGHT = [
    *(f"accelx.saves.{name}" for name in NAMED),
    *(f"accelx.{module_of(f)}" for f in FILES if f.startswith("storage")),
    *(f"accelx.{module_of(f)}" for f in FILES if f.startswith("checkpoint")),
]


def without_torch(modules):
    """The first of the modules whose import brings torch, or nothing."""
    program = (
        "import sys; from importlib import import_module\n"
        f"for name in {modules!r}:\n"
        "    import_module(name)\n"
        "    if 'torch' in sys.modules: print(name); break"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_what_the_tool_is_made_of_imports_no_torch():
    """Listing and checking checkpoints stays possible without torch."""
    assert len(LIGHT) > 20
    assert without_torch(LIGHT) == ""


def test_the_control_sees_torch():
    """A file that reads tensors is found by the same look."""
    assert without_torch([*LIGHT, "accelx.saves.read"]) == "accelx.saves.read"


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1234567, "1.23 MB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_400, "999 kB"),
        (999_600, "1.00 MB"),
        (5 * 10**9, "5.00 GB"),
        (2**63, "9.22 EB"),
    ],
)
def test_bytes_have_three_digits(count, said):
    """Sizes are in decimal units, rounded to three digits across the units too."""
    assert tables.size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s ago"),
        (59.9, "59 s ago"),
        (60, "1 min ago"),
        (HOUR - 1, "59 min ago"),
        (3 * HOUR, "3 h ago"),
        (2 * DAY - 1, "47 h ago"),
        (2 * DAY, "2 days ago"),
        (400 * DAY, "400 days ago"),
        (-5, "just now"),
        (-DAY, "in the future"),
    ],
)
def test_an_age_is_one_number(seconds, said):
    """The largest unit that fits, rounded down; clocks may differ by a little."""
    assert tables.age(1e9, 1e9 + seconds) == said


def test_an_unknown_age_is_a_dash():
    """What no commit tells has no age."""
    assert tables.age(None, 1e9) == "-"


@pytest.mark.parametrize(
    ("numbers", "said"),
    [([], "-"), ([3], "3"), ([0, 1, 2, 3, 7], "0-3, 7"), ([1, 3, 4], "1, 3-4")],
)
def test_parts_are_told_in_runs(numbers, said):
    """A thousand parts in a row are two numbers."""
    assert tables.spans(numbers) == said


def test_what_files_say_does_not_drive_the_terminal():
    """A name with escape codes or line ends, which anybody may write, is spelt out."""
    name = "model.\x1b[2J\r\n\x9b31mweight"
    assert tables.plain(name) == r"model.\x1b[2J\r\n\x9b31mweight"
    assert tables.plain("schön.[red]") == "schön.[red]"


@pytest.mark.parametrize(
    ("why", "said"),
    [
        (
            "s3://b/c/x.json wants to have 3 bytes, got nothing; take another",
            "x.json: got nothing",
        ),
        (
            "s3://b/c/x.json wants to hold a at 0 to 9, but ends before; take another",
            "x.json: ends before",
        ),
        ("it has no commit", "it has no commit"),
    ],
)
def test_a_reason_is_cut_to_what_came(why, said):
    """Of an error in three parts a table shows the file and the middle."""
    assert tables.came(why, "s3://b/c") == said


COLUMNS = (Column("name"), Column("bytes", right=True), Column("why", folds=True))
WHY = "it was cut off while the third of seven ranks wrote its slices"
TABLE = Table(COLUMNS, (("step-7", "1234567890", WHY), ("step-8", "5", "")))


def shown(capsys, monkeypatch, width, *blocks):
    """What is written to a pipe where COLUMNS says `width`."""
    monkeypatch.setenv("COLUMNS", str(width))
    screen.write(blocks)
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [1, 10, 25, 40, 79, 80, 200])
def test_a_narrow_screen_loses_nothing(capsys, monkeypatch, width):
    """Names and numbers stay in one piece, and text folds, at any width."""
    out = shown(capsys, monkeypatch, width, TABLE)
    assert "step-7" in out
    assert "1234567890" in out
    head = out.index("step-7")
    rest = out[head:].replace("step-7", "").replace("1234567890", "")
    letters = "".join(rest.partition("step-8")[0].split())
    assert letters == WHY.replace(" ", "")


def test_columns_fold_at_the_width(capsys, monkeypatch):
    """The control: lines are as long as COLUMNS says, where that is enough."""
    narrow = shown(capsys, monkeypatch, 40, TABLE).splitlines()
    wide = shown(capsys, monkeypatch, 200, TABLE).splitlines()
    assert max(map(len, narrow)) <= 40
    assert len(wide) == 3 < len(narrow)


def test_without_a_width_nothing_folds(capsys, monkeypatch):
    """A pipe gets each row in one line, however long."""
    monkeypatch.delenv("COLUMNS", raising=False)
    long = Table(COLUMNS, (("step-7", "1", "x" * 500),))
    screen.write([long, "y" * 500])
    assert [len(line) > 499 for line in capsys.readouterr().out.splitlines()] == [
        False,
        True,
        True,
    ]


def test_numbers_are_on_the_right(capsys, monkeypatch):
    """Digits of one weight stand under each other."""
    lines = shown(capsys, monkeypatch, 200, TABLE).splitlines()
    assert lines[1].index("1234567890") + 9 == lines[2].index("5")


def test_markup_of_rich_is_text(capsys, monkeypatch):
    """A name in brackets is shown, not obeyed."""
    table = Table((Column("name"),), (("[bold]w[/bold] :smile:",),))
    out = shown(capsys, monkeypatch, 80, table, "[red]x[/red]")
    assert "[bold]w[/bold] :smile:" in out
    assert "[red]x[/red]" in out


RAW = {
    "step": 3,
    "slots.lr": {
        "$": "record",
        "v": {"betas": {"$": "tuple", "v": [0.9, {"$": "float", "v": "nan"}]}},
    },
    "odd": {"$": "dict", "v": [[1, "a"], [{"$": "float", "v": "inf"}, None]]},
    "state": {"w": {"$": "tensor", "cpu": True}, "empty": []},
}


def test_values_are_told_by_path():
    """Typed JSON reads as plain values; tensors are told elsewhere."""
    assert diff.leaves(RAW) == {
        "step": 3,
        "slots.lr.betas.0": 0.9,
        "slots.lr.betas.1": "nan",
        "odd.1": "a",
        "odd.inf": None,
        "state.empty": [],
    }


def test_a_value_that_is_gone_is_not_none():
    """What one side lacks is left out of the change; None is a value."""
    assert diff.changes({"a": None, "b": 1, "c": 2}, {"b": 1, "c": 3, "d": 4}) == [
        {"name": "a", "a": None},
        {"name": "c", "a": 2, "b": 3},
        {"name": "d", "b": 4},
    ]


def test_a_change_reads_as_old_and_new():
    """Each kind of difference is one line; what is missing is told as nothing."""
    data = {
        "a": {"url": "file:///a"},
        "b": {"url": "file:///b"},
        "num_same": {"digests": 5, "bytes": 2},
        "added": ["w.new"],
        "removed": ["w.old"],
        "reshaped": [{"name": "w", "a": [2, 3], "b": [3, 2]}],
        "retyped": [{"name": "v", "a": "float32", "b": "bfloat16"}],
        "changed": [{"name": "u", "by": "bytes"}],
        "aliases": [],
        "base": [],
        "about": [],
        "values": [{"name": "lr", "a": 0.1, "b": 0.2}, {"name": "seed", "b": None}],
    }
    blocks = tables.diff(data)
    rows = {row for one in blocks if isinstance(one, Table) for row in one.rows}
    assert rows == {
        ("w.new", "added", ""),
        ("w.old", "removed", ""),
        ("w", "reshaped", "[2, 3] -> [3, 2]"),
        ("v", "retyped", "float32 -> bfloat16"),
        ("u", "changed", "by bytes"),
        ("lr", "0.1 -> 0.2"),
        ("seed", "nothing -> null"),
    }
    assert blocks[-1] == "7 tensors are the same: 5 by digests, 2 by bytes"


def row(step, **more):
    """What `ls --json` has of a checkpoint."""
    return {
        "name": f"step-{step}",
        "url": f"file:///run/step-{step}",
        "step": step,
        "position": step,
        "time": 1e9,
        "size": 5000,
        "num_ranks": 2,
        "num_tensors": 7,
        "metrics": {"loss": 0.25, "acc": 1 / 3},
        "whole": True,
        "why": "",
        **more,
    }


UNFINISHED = {
    "time": None,
    "num_ranks": None,
    "num_tensors": None,
    "metrics": {},
    "whole": False,
    "why": "it has no commit",
}


def cells(blocks):
    """All rows of the tables in a report."""
    return [row for one in blocks if isinstance(one, Table) for row in one.rows]


def test_a_listing_has_a_line_for_each():
    """What no commit tells is a dash; metrics are written with their names."""
    data = {"url": "file:///run", "checkpoints": [row(1), row(2, **UNFINISHED)]}
    blocks = tables.ls(data, 1e9 + 2 * HOUR)
    assert blocks[0] == "file:///run"
    assert cells(blocks) == [
        (
            *("step-1", "1", "2 h ago", "5.00 kB", "2", "7"),
            *("loss=0.25 acc=0.333333", "whole"),
        ),
        ("step-2", "2", "-", "5.00 kB", "-", "-", "-", "it has no commit"),
    ]


def test_a_long_reason_is_shortened_in_a_listing():
    """One line a checkpoint; --json has all of it."""
    one = row(1, whole=False, why=f"it is odd: {'very ' * 50}odd")
    state = cells(tables.ls({"url": "x", "checkpoints": [one]}, 1e9))[0][-1]
    assert state.startswith("it is odd: very")
    assert state.endswith("...")
    assert len(state) == tables.SHORT


@pytest.mark.parametrize(
    ("gone", "done", "dry_run", "head"),
    [
        ([row(1)], True, False, "removed 1 of 2 checkpoints, 5.00 kB"),
        ([row(1)], False, True, "would remove 1 of 2 checkpoints, 5.00 kB"),
        ([row(1)], False, False, "nothing was removed"),
        ([], True, False, "nothing is to be removed"),
    ],
)
def test_prune_says_what_it_did(gone, done, dry_run, head):
    """What went, would go, or was spared by the answer is told apart."""
    data = {"removed": gone, "kept": [row(2)], "done": done, "dry_run": dry_run}
    blocks = tables.prune(data, 1e9)
    assert blocks[0] == head
    assert [r[0] for r in cells(blocks)] == [*(r["name"] for r in gone), "step-2"]


def test_damage_is_told_with_its_bytes():
    """Each line has the file, the tensor, the range, and what was found there."""
    message = (
        "file:///run/step-1/r.json wants to have 5 bytes, got 4 bytes; take another"
    )
    whole = {"file": "r.json", "tensor": None, "start": None, "stop": None}
    part = {"file": "r.data", "tensor": "w", "start": 8, "stop": 16}
    damage = [{**whole, "message": message}, {**part, "message": "odd"}]
    one = {"name": "step-1", "step": 1, "size": 10, "state": "damaged"}
    data = {"checkpoints": [{**one, "damage": damage, "foreign": ["notes.txt"]}]}
    blocks = tables.verify(data)
    assert cells(blocks) == [
        ("step-1", "1", "10 B", "damaged"),
        ("step-1", "r.json", "-", "-", "-", "got 4 bytes"),
        ("step-1", "r.data", "w", "8", "16", "odd"),
    ]
    assert blocks[-1] == "not of step-1: notes.txt"


def test_show_tells_all_that_there_is():
    """Parts, groups, tensors, tied names and fingerprints each have their table."""
    tensor = {"name": "model.w", "dtype": "float32", "shape": [2, 3], "size": 24}
    part = {"file": "r.data", "size": 32, "index": "r.json", "index_size": 9}
    data = {
        "checkpoint": row(4, whole=False, why="it is odd"),
        "passed_over": [{"name": "step-5", "why": "it has no commit"}],
        "about": {"skipped": 1, "torch": "2.9"},
        "parts": [{**part, "num_slices": 3}],
        "foreign": ["notes.txt"],
        "groups": [
            {"name": "model", "num_tensors": 3, "size": 24, "dtypes": {"bool": 1}}
        ],
        "tensors": [{**tensor, "num_slices": 2, "parts": [0, 1]}],
        "aliases": {"model.v": "model.w"},
        "base": [{"name": "u", "dtype": "int8", "shape": [], "fingerprint": "ab"}],
    }
    blocks = tables.show(data, 1e9 + 60)
    assert cells(blocks) == [
        ("0", "r.data", "32 B", "3", "r.json", "9 B"),
        ("model", "3", "24 B", "1 bool"),
        ("model.w", "float32", "[2, 3]", "24 B", "2", "0-1"),
        ("model.v", "model.w"),
        ("u", "int8", "[]", "ab"),
    ]
    text = "\n".join(one for one in blocks if isinstance(one, str))
    for said in (
        "4 (1 skipped)",
        "2001-09-09 01:46:40 UTC, 1 min ago",
        "torch 2.9",
        "it is odd",
        "passed over: step-5: it has no commit",
        "not of this checkpoint: notes.txt",
    ):
        assert said in text
