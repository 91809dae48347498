"""Whether a model rounds more coarsely inside than the dtype that it is run in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from accelx import tree
from accelx._torch import DispatchMode
from accelx.equivalences.case import Build, built, cast, whole
from accelx.records import Env


class _Casts(DispatchMode):
    """Notes each dtype that numbers of a wider one are cast to."""

    def __init__(self, wide: torch.dtype) -> None:
        super().__init__()
        self.wide = wide
        self.found = set[torch.dtype]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(t.dtype == self.wide for t in _floats((args, kwargs))):
            size = self.wide.itemsize
            made = {t.dtype for t in _floats(result)}
            self.found |= {dtype for dtype in made if dtype.itemsize < size}
        return result


def _floats(node: Any) -> Iterator[Tensor]:
    for leaf in tree.leaves(node):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf


def narrowed(env: Env, build: Build, dtype: torch.dtype) -> str:
    """The dtype, by name, that numbers of the first batch are cast down to.

    Many models take a norm or a softmax in float32 whatever they are given. Empty where
    nothing is. A mask that is made in float32 is exact, and none.
    """
    case = built(env, build, dtype)
    model, batch = case.made(), cast(whole(case, 0), dtype)
    with torch.no_grad(), _Casts(dtype) as casts:
        case.loss(model, batch)
    least = min(casts.found, key=lambda one: one.itemsize, default=None)
    return "" if least is None else str(least).removeprefix("torch.")
