"""The source of accelx as syntax trees, and what the ratchets ask of them."""

import ast
from pathlib import Path

# A file imports from its own floor or a lower one. A folder stands for its files, and
# `env` for `env_axes` and the other parts that it is cut into.
FLOORS = {
    0: "errors records tree match transform order state rows schedules"
    " permutation dtypes cut text",
    1: "_torch _torch_attention _torch_backward _torch_ddp _torch_elastic _torch_remat"
    " _torch_simulate _torch_stages _xla env loader accept fetch prefetch comm"
    " rng storage deferred data explain nonfinite cgroup",
    2: "engines saves",
    3: "passes",
    4: "run gradients optimizers fit report",
    5: "spawn launch testing doors doctor doctors checkpoint checkpoints equivalence"
    " equivalences test pytest memory simulate",
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names.split()}

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "accelx"
FILES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}


def module_of(file):
    """`passes/clip.py` -> `passes.clip`; a folder's `__init__` is the folder."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def floor_of(module):
    """The floor that a file, by its dotted name, stands on; None if it has none."""
    first = module.partition(".")[0]
    return FLOOR_OF.get(first, FLOOR_OF.get(first.partition("_")[0]))


MODULES = {module_of(file) for file in FILES}


def inside(module):
    """The deepest file of accelx that a dotted name lies in, without `accelx.`."""
    parts = module.split(".")[1:]
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in MODULES:
            return ".".join(parts[:end])
    return None


def imported(node, file):
    """Dotted names that one import statement of `file` binds or loads."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = ["accelx", *file.split("/")[:-1]]
        package = package[: len(package) - node.level + 1]
        base = ".".join([*package, base] if base else package)
    return [f"{base}.{alias.name}" for alias in node.names]


def imports(tree, file):
    """Every dotted name that the file imports, at its top or within a function."""
    return [
        (node, name)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported(node, file)
    ]


def is_type_checking(node):
    """Whether this is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def at_top(tree):
    """Nodes that run when the module is imported."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if is_type_checking(node) or isinstance(node, ast.Lambda):
            continue
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo.extend(ast.iter_child_nodes(node))


def functions(tree):
    """Every function of a file, nested ones and methods included."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def dotted(node):
    """`torch.nn.Module` of an attribute chain that starts at a name, else None."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return ".".join([node.id, *reversed(names)])
