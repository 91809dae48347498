"""Which stage of a pipeline each module belongs to, by names or by cost."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from accelx.errors import PlacementError
from accelx.match import globs


@attrs.frozen(eq=False)
class Homes:
    """The parts that a model is cut into: the largest modules that are of one stage."""

    starts: tuple[str, ...]  # the first module of each stage after the first
    units: Mapping[str, int]  # name of a part -> its stage

    @property
    def count(self) -> int:
        """How many stages there are."""
        return len(self.starts) + 1

    def of(self, module: str) -> int | None:
        """The stage of a module by name; None for what all stages have."""
        while module not in self.units:
            if not module:
                return None
            module = module.rpartition(".")[0]
        return self.units[module]


def homes(
    model: nn.Module, starts: Sequence[str], ran: Sequence[str] | None = None
) -> Homes:
    """The stage of each part: that of the last of `starts` at or before it.

    In the order in which modules are registered, or, of parts that `ran` names, in
    that. What has no weights, and what holds modules of several stages, is of all, as
    are lists, which are not called themselves.
    """
    spread = {""} | {".".join(s.split(".")[:i]) for s in starts for i in _up(s)}
    for name, module in model.named_modules():
        if name.rpartition(".")[0] in spread and name not in starts:
            spread |= {name} if _is_list(module) else set()
    names = [name for name, _ in model.named_modules()]
    parts = [n for n in names if n not in spread and n.rpartition(".")[0] in spread]
    kept = [n for n in parts if n in starts or _remembers(model.get_submodule(n))]
    order = {name: i for i, name in enumerate(names)}
    at = order if ran is None else {name: i for i, name in enumerate(ran)}

    def stage(name: str) -> int:
        by = at if name in at else order
        return sum(by.get(s, order[s]) <= by[name] for s in starts)

    return Homes(tuple(starts), {name: stage(name) for name in kept})


def _is_list(module: nn.Module) -> bool:
    """Whether a module has no forward, as a ModuleList."""
    return type(module).forward is nn.Module.forward and "forward" not in vars(module)


def _up(name: str) -> range:
    return range(1, name.count(".") + 1)


def _remembers(module: nn.Module) -> bool:
    """Whether a module has weights, or buffers that are saved."""
    return bool(module.state_dict(keep_vars=True))


def named(model: nn.Module, split: Iterable[str]) -> list[str]:
    """The modules that `split` means, in the order of stages."""
    names = [name for name, _ in model.named_modules() if name]
    found: list[str] = []
    for pattern in split:
        fits = [name for name in names if globs(pattern, name)]
        if len(fits) != 1:
            came = f"takes {len(fits)} modules" if fits else "takes no module"
            near = fits or difflib.get_close_matches(pattern, names, 6, 0.4) or names
            shown = ", ".join(map(repr, near[:6]))
            raise PlacementError(
                f"split={pattern!r} wants to name one module, the first of a stage, "
                f"but it {came} of {type(model).__name__}; write one of {shown}"
            )
        found += fits
    order = [names.index(name) for name in found]
    if sorted(set(order)) != order:
        raise PlacementError(
            f"split wants the first modules of stages in their order, got "
            f"{', '.join(found)}; write {sorted(set(found), key=names.index)!r}"
        )
    inside = [(a, b) for a in found for b in found if b.startswith(f"{a}.")]
    if inside:
        outer, inner = inside[0]
        raise PlacementError(
            f"split wants modules beside each other, but {inner} lies in {outer}; name "
            "blocks of one list, such as 'layers.2'"
        )
    return found


def weights_in(model: nn.Module) -> Callable[[str], float]:
    """How many numbers the weights of a part have, each counted where it comes first"""
    seen: set[int] = set()
    sizes: dict[str, float] = {}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in own}
        sizes[name] = sum(p.numel() for p in own)

    def cost(part: str) -> float:
        inside = (n for n in sizes if n == part or n.startswith(f"{part}."))
        return sum(sizes[n] for n in inside)

    return cost


def balanced(model: nn.Module, count: int, cost: Callable[[str], float]) -> list[str]:
    """The first modules of `count` stages whose greatest cost is as small as may be.

    Cut is the list of blocks (ModuleList or Sequential) with the most weights; what
    is registered before it is of the first stage, what comes after of the last.
    """
    chain = _chain(model, count)
    blocks = [f"{chain}.{n}".lstrip(".") for n, _ in _at(model, chain).named_children()]
    names = [name for name, _ in homes(model, blocks[1:]).units.items()]
    first = next((i for i, n in enumerate(names) if n in blocks), 0)
    last = max((i for i, n in enumerate(names) if n in blocks), default=0)
    each = [cost(block) for block in blocks]
    each[0] += sum(map(cost, names[:first]))
    each[-1] += sum(map(cost, names[last + 1 :]))
    return [blocks[i] for i in _cuts(tuple(each), count)]


def _at(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def _chain(model: nn.Module, count: int) -> str:
    lists = [
        (sum(p.numel() for p in m.parameters()), name)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) >= count
    ]
    if not lists:
        raise PlacementError(
            f'split="balanced" wants a ModuleList or Sequential of at least {count} '
            f"blocks, which {type(model).__name__} has not; name the first module of "
            "each later stage: split=['middle', 'head']"
        )
    return max(lists, key=lambda one: one[0])[1]


def _cuts(each: tuple[float, ...], count: int) -> list[int]:
    """Where stages begin, but the first, so that the costliest costs least."""
    sums = [0.0]
    for one in each:
        sums.append(sums[-1] + one)

    @functools.cache
    def best(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        if left == 1:
            return sums[-1] - sums[start], ()
        found: list[tuple[float, tuple[int, ...]]] = []
        for cut in range(start + 1, len(each) - left + 2):
            rest, cuts = best(cut, left - 1)
            found.append((max(sums[cut] - sums[start], rest), (cut, *cuts)))
        return min(found)

    return list(best(0, count)[1])


def owner(stage: int, ranks: int, schedule: str) -> int:
    """The rank along the axis that a stage is on: in turn, or for zbv to and fro."""
    if schedule == "zbv" and stage >= ranks:
        return 2 * ranks - 1 - stage
    return stage % ranks


def holders(model: nn.Module, homes: Homes, on: Callable[[int], int]) -> dict[Any, Any]:
    """id of each weight and buffer -> ranks along the axis that hold it; () for all."""
    found: dict[int, set[int] | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        stage = homes.of(name)
        for tensor in (*module.parameters(False), *module.buffers(False)):
            ranks = found.setdefault(id(tensor), set())
            if stage is None:
                found[id(tensor)] = None
            elif ranks is not None:
                ranks.add(on(stage))
    return {i: () if r is None else tuple(sorted(r)) for i, r in found.items()}
