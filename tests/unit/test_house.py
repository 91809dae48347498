"""Ratchets over the source itself: floors, sizes, and what is documented."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

import accelx
from tests.unit.source import (
    FILES,
    PACKAGE,
    ROOT,
    floor_of,
    functions,
    imported,
    imports,
    inside,
    is_type_checking,
    module_of,
)

MAX_FILE = 400  # lines
MAX_FUNCTION = 50  # lines, docstring included

each_file = pytest.mark.parametrize("file", FILES)


@each_file
def test_a_file_stands_on_a_floor(file):
    """Every file is assigned a floor."""
    if file != "__init__.py":
        floor = floor_of(module_of(file))
        assert floor is not None, f"add accelx/{file} to FLOORS in tests/unit/source.py"


@each_file
def test_a_file_imports_from_its_own_floor_or_a_lower_one(file):
    """No file knows of a floor above it; only the package names them all."""
    if file == "__init__.py":
        return
    floor = floor_of(module_of(file))
    for node, name in imports(FILES[file], file):
        if name.partition(".")[0] != "accelx":
            continue
        target = inside(name)
        assert target, f"accelx/{file}:{node.lineno} imports {name}: name its file"
        above = floor_of(target)
        where = f"accelx/{file}:{node.lineno} on floor {floor}"
        assert above <= floor, f"{where} imports {target} of floor {above}"


def graph(files):
    """Which files of accelx each file imports; imports for type checkers are none."""
    edges = {}
    for file, tree in files.items():
        if file == "__init__.py":
            continue
        typing_only = {
            node
            for block in ast.walk(tree)
            if is_type_checking(block)
            for node in ast.walk(block)
        }
        own = module_of(file)
        edges[own] = {
            inside(name)
            for node, name in imports(tree, file)
            if node not in typing_only and inside(name) not in (None, own)
        }
    return edges


def test_no_import_cycle():
    """The files' imports, those within functions included, have an order."""
    TopologicalSorter(graph(FILES)).prepare()


def test_the_control_sees_a_cycle():
    """Two files that import each other are found."""
    files = {
        "state.py": ast.parse("from accelx.records import Env"),
        "records.py": ast.parse("def f():\n    from .state import State"),
    }
    with pytest.raises(CycleError):
        TopologicalSorter(graph(files)).prepare()


@each_file
def test_a_file_decides_one_thing(file):
    """No file passes 400 lines."""
    length = len((PACKAGE / file).read_text().splitlines())
    assert length <= MAX_FILE, f"accelx/{file}: {length} lines; split what it decides"


@each_file
def test_a_function_fits_a_screen(file):
    """No function passes 50 lines."""
    long = [
        f"accelx/{file}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1}"
        for node in functions(FILES[file])
        if node.end_lineno - node.lineno >= MAX_FUNCTION
    ]
    assert not long


def definitions(name, module):
    """The classes and functions of that name in a file, or in the one it comes from."""
    body = FILES[f"{module.replace('.', '/')}.py"].body
    kinds = (ast.ClassDef, ast.FunctionDef)
    own = [node for node in body if isinstance(node, kinds) and node.name == name]
    from_others = [
        full.removesuffix(f".{name}")
        for node in body
        if isinstance(node, ast.ImportFrom)
        for full in imported(node, f"{module.replace('.', '/')}.py")
        if full.endswith(f".{name}") and inside(full)
    ]
    return own or [d for full in from_others for d in definitions(name, inside(full))]


def test_every_error_is_public():
    """Whatever accelx raises or warns of on purpose can be caught by name."""
    classes = [n.name for n in FILES["errors.py"].body if isinstance(n, ast.ClassDef)]
    assert set(classes) <= set(accelx.__all__)


@pytest.mark.parametrize("name", accelx.__all__)
def test_a_public_name_is_documented_and_annotated(name):
    """A public function or class has a docstring, and types on all that it shows."""
    for node in definitions(name, accelx._HOMES[name]):
        assert ast.get_docstring(node), f"{name} has no docstring"
        for function in functions(node) if isinstance(node, ast.ClassDef) else [node]:
            if function.name.startswith("_") and function.name != "__init__":
                continue
            if function is not node and function.name != "__init__":
                where = f"{name}.{function.name}"
                assert ast.get_docstring(function), f"{where} has no docstring"
            assert function.returns, f"{name}: {function.name} has no return type"
            assert not bare_parameters(function), f"{name}: {function.name}"


def bare_parameters(function):
    """Names of the parameters without a type."""
    args = function.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    return [
        arg.arg
        for arg in every
        if arg is not None and not arg.annotation and arg.arg not in ("self", "cls")
    ]


def test_every_test_says_its_property():
    """Each test function has a docstring."""
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in functions(ast.parse(path.read_text()))
        if node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert not silent
