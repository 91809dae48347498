"""Whether a model has the weights that it had at `init`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelx.errors import PlacementError

if TYPE_CHECKING:
    from accelx.state import State


def as_at_init(state: State, every: bool = True) -> None:
    """Refuse weights that came into a model since: no optimizer would move them.

    Nor would ranks reduce their gradients, or a norm count them. Walks the model;
    unless `every`, only where one of the trained weights is gone.
    """
    if "shard_model" in state.slots:
        state.slots["shard_model"].rest()  # weights are slices again, not gathered
    now = {id(p): (n, p) for n, p in state.model.named_parameters()}
    if not every and all(id(p) in now for _, p in state.trained):
        return
    known = {*(id(p) for _, p in state.trained), *map(id, state.still)}
    new = [n for i, (n, p) in now.items() if i not in known and p.requires_grad]
    gone = [n for n, p in state.trained if id(p) not in now]
    if new or gone:
        came = f"{_some(new)} came into the model" if new else ""
        went = f"{_some(gone)} went out of it" if gone else ""
        raise PlacementError(
            f"{' and '.join(filter(None, (came, went)))} since ax.init, so no "
            "optimizer moves what is there now; add adapters, resize, tie and replace "
            "weights in the function that makes the model, and write into those that "
            "are there: load_state_dict without assign=True"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
