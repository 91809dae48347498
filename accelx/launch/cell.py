"""Which names a cell takes from its notebook, and how a rank runs it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import FunctionType
from typing import Any

NAME = "<cell>"  # what a traceback calls it


def numbered(cell: str) -> str:
    """The cell with the lines where the notebook shows them: the magic is line 1."""
    return f"\n{cell}"


def used(cell: str) -> list[str]:
    """Names that the cell may read before it has bound them, in order; pure.

    Too many rather than too few: a name that only some branch binds is one of them, and
    so is a local variable of a function.
    """
    bound, found = set[str](), dict[str, None]()
    for statement in ast.parse(cell).body:
        found |= {name: None for name in _loads(statement) if name not in bound}
        bound |= set(_binds(statement))
    return list(found)


def bearer(names: list[str], session: dict[str, Any]) -> FunctionType:
    """A function of the session that uses these names, and so takes them along."""
    source = f"lambda: ({''.join(f'{name}, ' for name in names)})"
    return FunctionType(compile(source, NAME, "eval").co_consts[0], session)


def run(session: FunctionType, cell: str) -> Any:
    """In a rank: the cell among what its bearer brought; its last expression's value.

    `env` is the rank's connected Env. The value is rank 0's; other ranks give None.
    """
    from accelx.env import connect

    names = session.__globals__
    names["env"] = env = connect()
    body = ast.parse(cell, NAME).body
    last = body[-1] if body and isinstance(body[-1], ast.Expr) else None
    module = ast.Module(body if last is None else body[:-1], type_ignores=[])
    exec(compile(module, NAME, "exec", dont_inherit=True), names)
    if last is None:
        return None
    code = compile(ast.Expression(last.value), NAME, "eval", dont_inherit=True)
    value = eval(code, names)
    return value if env.main else None


def _loads(statement: ast.stmt) -> Iterator[str]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load | ast.Del):
            yield node.id
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def _binds(statement: ast.stmt) -> Iterator[str]:
    """What the statement binds whatever happens: not in a branch, not in a loop."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        for alias in statement.names:
            yield alias.asname or alias.name.partition(".")[0]
    elif isinstance(statement, ast.Assign):
        for target in statement.targets:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))
