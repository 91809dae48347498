"""A loss that reads weights in slices by itself, past the forward that gathers them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs
from torch import Tensor

from accelx import _torch
from accelx.errors import LossError

if TYPE_CHECKING:
    from accelx.state import State


@attrs.define(eq=False)
class Reads:
    """Whether a backward pass was looked at: the first one is."""

    looked: bool = False

    @contextmanager
    def refused(self, state: State) -> Generator[None]:
        """Raise LossError where a gradient comes to a slice by itself, inside.

        FSDP2 puts the reduced ones there; what autograd brings is of this rank's rows.
        """
        slices = {id(p) for p in _torch.fsdp_slices(state.model)}
        ours = [(n, p) for n, p in state.trained if id(p) in slices and p.requires_grad]
        handles = [p.register_hook(_refusing(n)) for n, p in ours]  # type: ignore[reportUnknownMemberType]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.looked = True


def _refusing(name: str) -> object:
    def came(grad: Tensor) -> None:
        raise LossError(
            f"the loss reads {name} past the model's forward, where it is a slice, and "
            "that gradient would be of this rank's rows and not reduced; write a "
            "penalty as the optimizer's weight_decay, or in a pass: "
            'ax.transform("name", before=...)'
        )

    return came
