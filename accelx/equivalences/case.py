"""What `build` returned, made ready: model, optimizer, loss, and batches in rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from accelx import tree
from accelx.cut import pieces
from accelx.errors import DataError
from accelx.loader import Loader
from accelx.passes.shard_loader import shard_loader
from accelx.records import Env, Transform
from accelx.rng import seed
from accelx.rows import Rows, leading, rows_of, stamp
from accelx.run import feed
from accelx.transform import identity

Build = Callable[[], tuple[Any, Any, Any, Any]]
WANTED = "build wants to return (model, optim, loss, data)"


@attrs.frozen(eq=False)
class Case:
    """A user's own training, as `build` gives it."""

    model: Any  # a module, or a function that makes one
    optim: Any
    loss: Any
    data: Any
    dtype: torch.dtype | None  # None leaves the model's own

    @property
    def loads(self) -> bool:
        """Whether the data comes from a loader."""
        from torch.utils.data import DataLoader

        return isinstance(self.data, DataLoader | Loader)

    def made(self) -> nn.Module:
        """The model in the dtype of the comparison."""
        model = self.model if isinstance(self.model, nn.Module) else self.model()
        return model if self.dtype is None else model.to(self.dtype)

    @property
    def source(self) -> Any:
        """What `init` is given: a module, or a function as the user's own is one."""
        return self.made() if isinstance(self.model, nn.Module) else self.made


def built(env: Env, build: Build, dtype: torch.dtype | None) -> Case:
    """Call `build` with the same random numbers each time. Raises TypeError."""
    seed(env, 0)
    result: Any = build()
    if not isinstance(result, tuple) or len(result) != 4:  # type: ignore[reportUnknownArgumentType]
        raise TypeError(
            f"{WANTED}, got {type(result).__name__}; write for example return Net, "  # type: ignore[reportUnknownArgumentType]
            "lambda m: AdamW(m.parameters()), loss, batch"
        )
    model, optim, loss, data = result  # type: ignore[reportUnknownVariableType]
    for name, value in (("model", model), ("optim", optim), ("loss", loss)):
        if not callable(value):  # type: ignore[reportUnknownArgumentType]
            raise TypeError(
                f"{WANTED} with a function for {name}, got {type(value).__name__}; "  # type: ignore[reportUnknownArgumentType]
                "optim is a function of the model, loss one of model and batch"
            )
    return Case(model, optim, loss, data, dtype)


def feeding(env: Env, case: Case) -> Transform:
    """The pass that cuts the batches of a loader; none for those that are given."""
    return shard_loader(env) if case.loads else identity


def batches(
    env: Env, case: Case, steps: int, tx: Transform | None = None
) -> Iterator[Any]:
    """This rank's rows of the first `steps` batches.

    `env` is of the ranks that have rows of their own; `tx` cuts those of a loader.
    """
    if case.loads:
        for batch in feed(tx or feeding(env, case), case.data, 0, steps):
            yield cast(batch, case.dtype)
        return
    for step in range(steps):
        yield share(env, cast(whole(case, step), case.dtype))


def whole(case: Case, step: int) -> Any:
    """The batch of one step, all rows of it."""
    if case.loads:
        return next(iter(feed(feeding(Env(), case), case.data, step, step + 1)))
    return case.data(step) if callable(case.data) else case.data


def cast(batch: Any, dtype: torch.dtype | None) -> Any:
    """The batch with its floating-point tensors in `dtype`, marks kept."""
    if dtype is None:
        return batch
    marked = rows_of(batch)

    def one(leaf: Any) -> Any:
        floats = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if floats else leaf

    new = tree.map_leaves(one, batch)
    return new if marked is None else stamp(new, marked)


def share(env: Env, batch: Any) -> Any:
    """This rank's rows of a whole batch, marked as a loader marks them."""
    total = leading(batch)
    if total is None:
        raise DataError(
            f"{WANTED} whose data has rows, got {type(batch).__name__} without a "
            "tensor that has a dimension; return tensors, or a DataLoader"
        )
    edges = [total * rank // env.world for rank in range(env.world + 1)]
    sizes = [high - low for low, high in pairwise(edges)]
    here = sizes[env.rank]
    if not here:  # a row that takes part and counts for nothing
        return stamp(pieces(batch, "", [1] * total)[0], Rows(0, total))
    return stamp(pieces(batch, "", sizes)[env.rank], Rows(here, total))
