"""What comes to weights in slices by itself, past the forward that gathers them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from torch import Tensor

from accelx import _torch
from accelx.engines import suited
from accelx.errors import LossError

if TYPE_CHECKING:
    from accelx.state import State


@attrs.define(eq=False)
class Reads:
    """Whether slices are watched: from the first backward pass on."""

    watched: bool = False

    def watch(self, state: State) -> None:
        """Have a gradient that comes to a slice by itself raise LossError.

        FSDP2 puts the reduced ones there; what autograd brings is of this rank's rows.
        The hooks cost nothing until then. Raises PlacementError for hooks of others.
        """
        if self.watched:
            return
        slices = {id(p) for p in _torch.fsdp_slices(state.model)}
        ours = [(n, p) for n, p in state.trained if id(p) in slices and p.requires_grad]
        suited.unhooked(ours)
        for name, weight in ours:
            weight.register_hook(_refusing(name))
        self.watched = True


def _refusing(name: str) -> object:
    def came(grad: Tensor) -> None:
        raise LossError(
            f"the loss reads {name} past the model's forward, where it is a slice, and "
            "that gradient would be of this rank's rows and not reduced; write a "
            "penalty as the optimizer's weight_decay, or in a pass: "
            'ax.transform("name", before=...)'
        )

    return came
