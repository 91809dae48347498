"""What a rank runs as its main program, and what a misspelt one was meant to be."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from accelx.errors import SpawnError
from accelx.launch.options import PROGRAM
from accelx.launch.plan import Asked


def check(asked: Asked) -> None:
    """Refuse a script or module that is not there, with the nearest that is."""
    if asked.kind == "script":
        _check_script(asked.target)
    elif asked.kind == "module":
        _check_module(asked.target)


def set_path(asked: Asked) -> None:
    """Make sys.path[0] what `python script` or `python -m module` has there."""
    if sys.flags.safe_path or asked.kind == "call":
        return
    here = Path(asked.target).resolve().parent if asked.kind == "script" else Path.cwd()
    sys.path[0] = str(here)


def compiled(asked: Asked) -> CodeType | None:
    """The script's code, read once for all ranks. Raises SyntaxError."""
    if asked.kind != "script":
        return None
    source = Path(asked.target).read_bytes()
    return compile(source, asked.target, "exec", dont_inherit=True)


def run(asked: Asked, code: CodeType | None) -> None:
    """Run the user's program in this process as `__main__`, as Python itself would.

    Not by runpy: that takes the main module away again when the program ends, before
    its threads and exit handlers have run.
    """
    if code is None:
        code, main = _module(asked.target)
    else:
        main = ModuleType("__main__")
        main.__dict__.update(
            __file__=asked.target,
            __builtins__=__builtins__,
            __loader__=SourceFileLoader("__main__", asked.target),
        )
    sys.argv = [str(main.__file__), *asked.args]
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def _module(name: str) -> tuple[CodeType, ModuleType]:
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    code = spec.loader.get_code(spec.name) if spec else None  # type: ignore[union-attr]
    if spec is None or code is None:
        raise ModuleNotFoundError(f"{name!r} is no module that can be run", name=name)
    main = ModuleType("__main__")
    main.__dict__.update(
        __file__=spec.origin,
        __builtins__=__builtins__,
        __loader__=spec.loader,
        __spec__=spec,
        __package__=spec.parent,
        __cached__=spec.cached,
    )
    return code, main


def _check_script(target: str) -> None:
    path = Path(target)
    if path.is_file():
        return
    if path.is_dir():
        raise SpawnError(
            f"a Python file is wanted, {target!r} is a folder; "
            f"write {PROGRAM} -n 2 {path / 'train.py'}"
        )
    near = _near(path)
    instead = (
        f"did you mean {near}?" if near else f"nothing like it is in {path.parent}/"
    )
    if not near and _found(target):
        instead = f"write -m {target} for the module of that name"
    raise SpawnError(f"a Python file is wanted, {target!r} is not there; {instead}")


def _near(path: Path) -> Path | None:
    if not path.parent.is_dir():
        return None
    files = [p.name for p in path.parent.iterdir() if p.suffix == ".py"]
    names = difflib.get_close_matches(path.name, files, n=1)
    names += [f"{path.name}.py"] * (f"{path.name}.py" in files)
    return path.with_name(names[-1]) if names else None


def _check_module(target: str) -> None:
    if target.endswith(".py") and Path(target).is_file():
        raise SpawnError(
            f"-m wants the dotted name of a module, {target!r} is a file; leave -m out"
        )
    if not all(part.isidentifier() for part in target.split(".")):
        raise SpawnError(
            f"-m wants the dotted name of a module, got {target!r}; "
            "write -m package.train"
        )
    if not _found(target):
        raise SpawnError(
            f"-m wants a module that can be imported, {target!r} is not found from "
            f"{Path.cwd()}; write it as `import` would, or give the file without -m"
        )


def _found(name: str) -> bool:
    """Whether a module can be found. Imports no parent package, as find_spec would."""
    first, *rest = name.split(".")
    if not name.isascii() or not all(part.isidentifier() for part in (first, *rest)):
        return False
    spec = importlib.util.find_spec(first)
    for index in range(len(rest)):
        if spec is None or spec.submodule_search_locations is None:
            return False
        full = ".".join([first, *rest[: index + 1]])
        spec = PathFinder.find_spec(full, list(spec.submodule_search_locations))
    return spec is not None
