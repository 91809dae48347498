"""What a rank tells of a step: to its own record, and to ranks in lockstep."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from accelx import tree
from accelx.comm_ring import ring
from accelx.comm_wire import shown, spec_of
from accelx.cut import Args
from accelx.gradients import env_of
from accelx.rows import leading
from accelx.state import State

_ALONE = nullcontext()  # one rank waits for nobody


def under_way(
    name: str, state: State, loss: Any = None, args: Args = ()
) -> AbstractContextManager[None]:
    """`with under_way("step", state, loss, args):` is an operation of this rank."""
    env = env_of(state)
    if env.world == 1:
        return _ALONE
    return ring().begin(env, name, state.step, lambda: told(state, loss, args))


def told(state: State, loss: Any, args: Args) -> dict[str, tuple[str, str]]:
    """What must be the same on all ranks, and how it is shown.

    Rows and padding may differ over ranks, and so the sizes of dims and the lengths of
    lists with an entry a row; keys, dtypes and the number of dims may not.
    """
    number, here = str(state.step), leading(*args)
    found = {"number of the step": (number, number)}
    if loss is not None:
        name = _named(loss)
        found["loss function"] = (name, name)
    for path, leaf in tree.flatten(args, lambda node: _of_rows(node, here)):
        if isinstance(leaf, Tensor):
            spec = spec_of(leaf)
            found[f"batch, at args{path},"] = (
                f"{spec.dtype} {len(spec.shape)}",
                shown(spec),
            )
    return found


def _of_rows(node: Any, here: int | None) -> bool:
    """Whether this is a list with an entry a row, and no list of columns."""
    if not isinstance(node, list):
        return False
    inside = tree.leaves(node)
    return not all(isinstance(x, Tensor) and x.shape[:1] == (here,) for x in inside)


def _named(function: Any) -> str:
    inner = getattr(function, "func", function)  # of a functools.partial
    name = getattr(inner, "__qualname__", type(inner).__name__)
    return f"{getattr(inner, '__module__', '')}.{name}"
