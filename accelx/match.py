"""Which modules a selector means: a glob over names, a class, a predicate."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

Selector = str | type | Callable[[str, Any], bool]


def globs(pattern: str, name: str) -> bool:
    """Whether `name` fits: `*` is within one part, `**` any number of parts."""
    return _parts(pattern.split("."), name.split("."))


def _parts(pattern: list[str], name: list[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_parts(pattern[1:], name[i:]) for i in range(len(name) + 1))
    return (
        bool(name)
        and fnmatchcase(name[0], pattern[0])
        and _parts(pattern[1:], name[1:])
    )


def fits(selector: Selector, name: str, module: object) -> bool:
    """Whether one selector takes the module called `name`."""
    if isinstance(selector, str):
        return globs(selector, name)
    if isinstance(selector, type):
        return isinstance(module, selector)
    return bool(selector(name, module))


def select(
    model: nn.Module, blocks: Selector | Iterable[Selector] | None
) -> list[tuple[str, nn.Module]]:
    """Modules of `model` (the root left out) that `blocks` takes, outermost first.

    Raises ValueError if a selector takes none, with the nearest names.
    """
    if blocks is None:
        return []
    one = isinstance(blocks, str | type) or callable(blocks)
    selectors: list[Any] = [blocks] if one else list(blocks)  # type: ignore[arg-type]
    modules = [(n, m) for n, m in model.named_modules() if n]
    taken: dict[str, nn.Module] = {}
    for selector in selectors:
        found = {n: m for n, m in modules if fits(selector, n, m)}
        if not found:
            raise ValueError(_nothing(selector, model, [n for n, _ in modules]))
        taken |= found
    return [(n, m) for n, m in modules if n in taken]


def _nothing(selector: Selector, model: nn.Module, names: list[str]) -> str:
    near: list[str] = []
    if isinstance(selector, str):
        near = difflib.get_close_matches(selector.replace(".*", ".0"), names, 3, 0.4)
    shown = (
        ", ".join(repr(n) for n in (near or names[:6])) or "none (it has no submodule)"
    )
    return (
        f"blocks={selector!r} matches no module of {type(model).__name__}; "
        f"its modules are called {shown}: write a glob such as 'layers.*', "
        "a class, or a function (name, module) -> bool"
    )
