"""Ratchets over what the source may touch: torch, packages, variables, paths."""

import ast
import re
import sys

import pytest

from tests.unit.source import (
    FILES,
    PACKAGE,
    ROOT,
    at_top,
    dotted,
    floor_of,
    imported,
    imports,
    module_of,
)

# Where a package's private and version-dependent names stand: torch's, torch_xla's.
SEAMS = {
    "_torch.py",
    "_torch_attention.py",
    "_torch_backward.py",
    "_torch_ddp.py",
    "_torch_elastic.py",
    "_torch_remat.py",
    "_torch_simulate.py",
    "_torch_stages.py",
    "_xla.py",
}
LAUNCHER = re.compile(r"(spawn|launch)\w*(/|\.py$)")
REQUIRED = {"torch", "attrs", "typing_extensions", "safetensors", "fsspec"}
REQUIRED |= {"xxhash", "tenacity"}
OPTIONAL = {"deepspeed", "torch_xla", "torch_tpu", "s3fs", "gcsfs", "torchao"}
OPTIONAL |= {"tensorboard", "wandb", "rich", "pyarrow", "datasets", "torchdata"}
OPTIONAL |= {"pytest", "cloudpickle"}
# Documented by Python, despite the underscore.
DOCUMENTED = {"_asdict", "_fields", "_replace", "_make", "_exit", "_getframe"}

each_file = pytest.mark.parametrize("file", FILES)


def mentions_environ(tree):
    """Whether the file reads the process's environment variables."""
    wanted = {"os.environ", "os.environb", "os.getenv", "os.putenv"}
    used = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return bool(wanted & (used | {name for _, name in imports(tree, "")}))


@each_file
def test_no_global_statement(file):
    """accelx keeps no state of its own beside torch's process group."""
    found = [n.lineno for n in ast.walk(FILES[file]) if isinstance(n, ast.Global)]
    assert not found, f"accelx/{file}: {found}"


def test_the_environment_is_read_in_two_files():
    """Only `detect`'s file and one of the launcher know of environment variables."""
    readers = {file for file, tree in FILES.items() if mentions_environ(tree)}
    others = readers - {"env.py"}
    assert len(others) <= 1, f"{sorted(others)} read os.environ; take a mapping instead"
    assert all(LAUNCHER.match(file) for file in others), others


@each_file
def test_private_names_of_torch_stand_in_one_file(file):
    """What torch may rename at any time is named in `_torch.py` alone."""
    if file in SEAMS:
        return
    private = re.compile(r"^torch\b.*\._[A-Za-z]")
    chains = [
        (node, dotted(node) or "")
        for node in ast.walk(FILES[file])
        if isinstance(node, ast.Attribute)
    ]
    found = [
        f"accelx/{file}:{node.lineno} {name}"
        for node, name in [*imports(FILES[file], file), *chains]
        if private.match(name)
    ]
    assert not found, "give it one small function in accelx/_torch.py"


def own_names():
    """Every name that accelx itself defines, or keeps on objects of its own."""
    names = set(DOCUMENTED)
    for tree in FILES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if dotted(node.value) == "self" else set()
    return names


OWN_NAMES = own_names()


@each_file
def test_private_attributes_of_others_stand_in_one_file(file):
    """`x._name` is a name that accelx defined, or it stands in a seam."""
    if file in SEAMS:
        return
    found = [
        f"accelx/{file}:{node.lineno} .{node.attr}"
        for node in ast.walk(FILES[file])
        if isinstance(node, ast.Attribute)
        and re.match(r"_(?!accelx)[A-Za-z]", node.attr)
        and node.attr not in OWN_NAMES
    ]
    assert not found, "give it one small function in accelx/_torch.py"


def swallows(handler):
    """Whether a handler of every exception neither raises nor looks at what it got."""
    broad = {"Exception", "BaseException"}
    caught = handler.type
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    if caught is not None and not {dotted(name) for name in names} & broad:
        return False
    inner = [node for part in handler.body for node in ast.walk(part)]
    raises = any(isinstance(node, ast.Raise) for node in inner)
    used = {node.id for node in inner if isinstance(node, ast.Name)}
    return not raises and not used & {handler.name, "traceback"} - {None}


@each_file
def test_no_error_is_swallowed(file):
    """Whoever catches every exception raises it again or reports it."""
    handlers = [n for n in ast.walk(FILES[file]) if isinstance(n, ast.ExceptHandler)]
    found = [f"accelx/{file}:{node.lineno}" for node in handlers if swallows(node)]
    text = (PACKAGE / file).read_text()
    assert not found
    assert not re.search(r"suppress\([^)]*\b(Base)?Exception\b", text)


def test_the_control_sees_a_swallowed_error():
    """A handler that passes is found; one that raises again is not."""
    passes, raises = (
        ast.parse(f"try:\n    f()\nexcept Exception:\n    {body}").body[0].handlers[0]
        for body in ("pass", "raise")
    )
    assert swallows(passes)
    assert not swallows(raises)


@each_file
def test_nothing_of_torch_distributed_at_import(file):
    """torch.distributed and its tensors cost seconds: functions import them."""
    slow = [
        f"accelx/{file}:{node.lineno} {name}"
        for node in at_top(FILES[file])
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported(node, file)
        if re.match(r"torch\.distributed\.\w+\.|torch\.distributed\.[a-z_]+$", name)
        if name.partition(".")[0] == "torch"
    ]
    assert not slow


@each_file
def test_a_low_floor_knows_no_process_group(file):
    """The algebra imports no torch.distributed, not even for types."""
    if floor_of(module_of(file)) == 0:
        names = [name for _, name in imports(FILES[file], file)]
        assert not [n for n in names if n.startswith("torch.distributed")]


def test_an_optional_package_is_imported_in_one_file_only():
    """An extra is imported where it is used, within a function, in one file."""
    where = {}
    for file, tree in FILES.items():
        top = set(at_top(tree))
        for node, name in imports(tree, file):
            package = name.partition(".")[0]
            if package in OPTIONAL:
                where.setdefault(package, set()).add(file)
                assert node not in top, f"accelx/{file}:{node.lineno} {package}"
    assert all(len(files) == 1 for files in where.values()), where


@each_file
def test_no_other_package_is_imported(file):
    """accelx imports the standard library, its dependencies and its extras."""
    known = {*sys.stdlib_module_names, *REQUIRED, *OPTIONAL, "accelx"}
    packages = {name.partition(".")[0] for _, name in imports(FILES[file], file)}
    assert packages <= known, f"accelx/{file} imports {sorted(packages - known)}"


def texts():
    """Every text of the repository that is written by hand, with its path."""
    kinds = {".py", ".md", ".toml", ".txt", ".cfg", ".yml", ""}
    folders = ["accelx", "tests", "examples", "docs", "benchmarks", "scripts", ".ci"]
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*")]
    for path in [*paths, *ROOT.glob("*.md"), *ROOT.glob("*.t*")]:
        made = {"__pycache__", "golden"} & set(path.parts)  # not written by hand
        if path.is_file() and path.suffix in kinds and not made:
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def test_no_path_of_one_machine():
    """Nothing names a folder that only one machine has."""
    absolute = re.compile(r"(?<![\w./~}])/(root|home(?!/user\b)|work|farm)/")
    found = [path for path, text in texts() if absolute.search(text)]
    assert not found


def test_no_unfinished_mark():
    """What is to be done is done, or is not in the source."""
    mark = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    own = "tests/unit/test_seams.py"  # which has to name them
    assert not [path for path, text in texts() if path != own and mark.search(text)]
