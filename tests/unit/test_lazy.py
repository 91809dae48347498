"""`import accelx` costs nothing, and every public name is there when it is used."""

import ast
import importlib
import json
import subprocess
import sys

import pytest

import accelx

# Loaded by no import of accelx alone, nor of the launcher.
HEAVY = {"torch", "attrs", "attr", "numpy", "fsspec", "safetensors"}


def modules_after(statement):
    """Names of the modules that `statement` adds to a bare interpreter."""
    program = (
        "import sys; before = set(sys.modules)\n"
        f"{statement}\n"
        "import json; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_importing_accelx_loads_nothing_heavy():
    """A bare `import accelx` adds a handful of modules, none of them torch."""
    added = modules_after("import accelx")
    assert "accelx" in added
    assert len(added) < 30, added
    assert not {name.partition(".")[0] for name in added} & HEAVY


def test_the_control_sees_a_heavy_import():
    """Using a name does load its file, so the test above can fail."""
    assert "attrs" in modules_after("import accelx; accelx.Env")


def test_the_launcher_starts_without_torch():
    """`accelx.spawn` is importable without torch: the ranks' server imports it."""
    added = modules_after("import accelx.spawn")
    assert "torch" not in added
    assert "numpy" not in added


@pytest.mark.parametrize("name", accelx.__all__)
def test_every_public_name_resolves(name):
    """Each name of `__all__` is an object, and dir() shows it."""
    assert getattr(accelx, name) is not None
    assert name in dir(accelx)


@pytest.mark.parametrize("name", ["transform", "explain"])
def test_a_public_name_wins_over_the_file_of_that_name(name):
    """Importing accelx/transform.py leaves `accelx.transform` the function."""
    program = (
        f"import importlib; file = importlib.import_module('accelx.{name}')\n"
        f"import accelx; assert accelx.{name} is file.{name}, accelx.{name}\n"
        f"from accelx import {name}; assert callable({name})"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_spawn_is_callable_and_a_file():
    """`accelx.spawn` is called from a program; `python -m accelx.spawn` is the door."""
    importlib.import_module("accelx.spawn")
    assert callable(accelx.spawn)


def test_type_checkers_see_the_same_names(repository):
    """The imports under TYPE_CHECKING are those that are made on first use."""
    tree = ast.parse((repository / "accelx/__init__.py").read_text())
    seen = {
        alias.asname: (node.module or alias.name)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == accelx._HOMES


def test_an_unknown_name_is_an_attribute_error():
    """A misspelt name fails as it does on any module."""
    with pytest.raises(AttributeError, match="'accelx' has no attribute 'chian'"):
        accelx.chian  # noqa: B018 the look-up is the act
