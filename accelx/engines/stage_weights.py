"""A loss that goes through the weights of a model in stages, of which it has a part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from accelx import _torch_stages
from accelx.engines.stage_route import Way
from accelx.errors import LossError
from accelx.records import Loss

WAY = "_accelx_way"  # on a model in stages


class Held(dict[str, Any]):
    """A module's weights on this rank, where others of it are in other stages."""

    def __init__(self, own: dict[str, Any], way: Way) -> None:
        super().__init__(own)
        self.way = way

    def items(self) -> Any:
        """As a dict's, which is how modules list weights; refused to a loss."""
        if self.way.in_loss:
            raise LossError(
                "the loss goes through the weights of a model in stages, of which this "
                "rank has a part, so that a sum over them would leave out the others; "
                "write a penalty as the optimizer's weight_decay, or in a pass: "
                'ax.transform("name", before=...)'
            )
        return super().items()


def guard(model: nn.Module, gone: Iterable[str], way: Way) -> None:
    """Have modules whose weights are `gone` refuse to list the rest to a loss."""
    setattr(model, WAY, way)
    for where in {name.rpartition(".")[0] for name in gone}:
        module = model.get_submodule(where)
        _torch_stages.keep_weights(module, lambda own: Held(own, way))


def in_loss(loss: Loss) -> Callable[..., Any]:
    """`loss`, during which a model in stages knows that it is one's."""

    def run(model: Any, *args: Any) -> Any:
        way: Way | None = vars(model).get(WAY)
        if way is None:  # one rank, or a run on shapes
            return loss(model, *args)
        way.in_loss = True
        try:
            return loss(model, *args)
        finally:
            way.in_loss = False

    return run
