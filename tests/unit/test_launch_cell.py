"""What a cell takes from its notebook, and how calls become bytes."""

import builtins
import sys

import pytest

from accelx.errors import MissingExtraError, SpawnError
from accelx.launch import carry
from accelx.launch.cell import bearer, used
from accelx.launch.magic import options

HERE = {"a": 1, "b": 2, "f": len, "items": [3, 4]}
# A cell -> the names of HERE that it cannot do without.
NEEDS = {
    "a + b": {"a", "b"},
    "a = 5\na": set(),
    "a = a + 1": {"a"},
    "a += 1": {"a"},
    "c, (a, d) = 1, (2, 3)\na": set(),
    "if b:\n    a = 1\nelse:\n    pass\na": {"b", "a"},
    "for a in []:\n    pass\na": {"a"},
    "def g():\n    return f(items)\ng()": {"f", "items"},
    "import os as a\na.sep": set(),
    "def a():\n    return 1\na()": set(),
    "class a:\n    z = b\na()": {"b"},
    "[f(x) for x in (items, items)]": {"f", "items"},
    "del a": {"a"},
    "f'{a}'": {"a"},
    "with open('/dev/null') as file:\n    b": {"b"},
    "lambda x=a: x": {"a"},
    "f\nf = 1\nf": {"f"},
}


@pytest.mark.parametrize("cell", NEEDS)
def test_a_cell_gets_all_that_it_reads(cell):
    """It runs with the names that were found, and, the control, with none less."""
    found = [name for name in used(cell) if name in HERE]
    exec(cell, {name: HERE[name] for name in found})
    assert NEEDS[cell] <= set(found)
    for missing in NEEDS[cell] - {"a"} if "if b" in cell else NEEDS[cell]:
        rest = {name: HERE[name] for name in found if name != missing}
        with pytest.raises(NameError, match=f"'{missing}'"):
            exec(cell, rest)


@pytest.mark.parametrize("cell", ["a = 5\na", "import os as a\na.sep", "def a(): ..."])
def test_a_cell_does_not_get_what_it_makes_itself(cell):
    """A large object of the same name need not travel."""
    assert "a" not in used(cell)


def test_the_bearer_takes_the_session_along():
    """Functions of one session share their globals with the cell, as they did there."""
    session = {"__name__": "__main__", "a": 1}
    exec("def g():\n    return a", session)
    made = carry.load(carry.whole(bearer(["a", "g"], session)))
    made.__globals__["a"] = 7
    assert made.__globals__["g"]() == 7
    assert session["g"]() == 1, "the notebook's own is another"


class PickyError(Exception):
    """Takes two, tells one."""

    def __init__(self, left, right):
        super().__init__(f"{left} and {right}")
        self.right = right


def test_an_exception_of_any_signature_is_made_again():
    """Type, text and attributes; the control: pickle alone cannot."""
    with pytest.raises(TypeError, match="missing 1 required"):
        carry.load(carry.whole(PickyError(1, 2)))
    error = carry.load(carry.whole(carry.Again(PickyError(1, 2))))
    assert (type(error), str(error), error.right) == (PickyError, "1 and 2", 2)


def test_without_cloudpickle_the_extra_is_named(monkeypatch):
    """And what works without it."""
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(MissingExtraError, match=r"accelx\[notebook\].*top of a module"):
        carry.whole(lambda: 0)


def test_modules_travel_by_name():
    """A function's globals hold them; some have classes of their own."""
    import torch

    import accelx

    for module in (accelx, torch.backends.cudnn, builtins):
        assert carry.load(carry.whole(module)) is module


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """No settings but those of the line."""
    monkeypatch.chdir(tmp_path)
    for name in ("ACCELX_NUM_RANKS", "ACCELX_TIMEOUT", "ACCELX_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_cells_settings_are_the_launchers(quiet, tmp_path):
    """Line, environment, file; prefix is on by default, and grace is a call's."""
    assert options("-n 2") == ["-n", "2", "--grace", "5.0", "--prefix"]
    (tmp_path / "accelx.toml").write_text("num_ranks = 3\nprefix = false\ngrace = 9")
    quiet.setenv("ACCELX_TIMEOUT", "60")
    words = options("")
    assert words == ["-n", "3", "--grace", "9.0", "--timeout", "60.0"]
    assert options("-n auto --prefix")[:2] == ["-n", "auto"]
    assert "--prefix" in options("-n auto --prefix")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--print", "leave --print out"),
        ("-m pack.job", "leave -m out"),
        ("-n 0", "1 or more, got '0'"),
        ("--ranks 2", "did you mean"),
    ],
)
def test_a_line_that_is_no_setting_is_refused(line, words, quiet):
    """With the launcher's own words, or with what to leave out."""
    with pytest.raises(SpawnError, match=words):
        options(line)
