"""What a loss function may return, and what is said where it returns another thing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from accelx import tree
from accelx.errors import LossError, NeutralityWarning
from accelx.records import Mean


def check_loss(name: str, loss: Any) -> None:
    """Refuse what is no function of the model and the batch, before a step is made."""
    kind: type = type(loss)
    if kind.__module__ == "torch.nn.modules.loss":  # of an output and a target
        raise TypeError(
            f"ax.{name} wants loss(model, *batch), got the criterion {kind.__name__}; "
            f"write `def loss(model, batch): return criterion(model(batch[0]), "
            "batch[1])`"
        )
    if not callable(loss):
        raise TypeError(
            f"ax.{name} wants a function loss(model, *batch), got {kind.__name__}; "
            "write `def loss(model, batch): ...`"
        )


def read(result: Any) -> tuple[Tensor | Mean, Any]:
    """What a loss function returned, as (loss, aux). Raises LossError for no scalar."""
    aux = None
    if isinstance(result, tuple) and len(result) == 2:  # type: ignore[reportUnknownArgumentType]
        result, aux = result  # type: ignore[reportUnknownVariableType]
    if isinstance(result, Mean):
        return result, _aux(aux)
    if not isinstance(result, Tensor):
        raise LossError(
            "the loss function wants to return a scalar tensor, ax.Mean(total, "
            f"weight), or (either, aux), got {type(result).__name__}; write "  # type: ignore[reportUnknownArgumentType]
            f"`{_instead(result)}`"
        )
    if result.dim():
        raise LossError(
            "the loss wants to be a scalar, got a tensor of shape "
            f"{tuple(result.shape)}; write loss.mean() for a mean over rows, or "
            "ax.Mean(loss.sum(), loss.numel())"
        )
    return _real(result), _aux(aux)


def _instead(result: Any) -> str:
    """The line that returns the loss in `result`, as far as that can be seen."""
    if isinstance(result, Mapping) and "loss" in result:
        short = hasattr(cast(Any, result), "loss")  # an output of transformers
        return "return out.loss" if short else 'return out["loss"]'
    if isinstance(result, tuple):
        return "return loss, (first, second)"
    return "return loss"


def _real(loss: Tensor) -> Tensor:
    if loss.is_complex():
        raise LossError(
            f"the loss wants to be a real number, got {loss.dtype}; write loss.real, "
            "or loss.abs()"
        )
    return loss


def say_own(aux: Any) -> None:
    """Warn of numbers in aux that each of several ranks has of its own rows."""
    flat = tree.flatten(aux, lambda node: isinstance(node, Mean))
    own = [p for p, x in flat if isinstance(x, Tensor) and not x.dim()]
    if own:
        warnings.warn(
            f"aux{own[0]} of the loss is a number of this rank's rows, which is added "
            "to no other rank's; return ax.Mean(total, weight) for the mean over all, "
            "or a tensor with one row a sample",
            NeutralityWarning,
            stacklevel=2,
        )


def check_scalar(leaf: Any) -> None:
    """Refuse what is no number where a mean over the rows is taken."""
    number = isinstance(leaf, int | float)
    if number or (isinstance(leaf, Tensor) and not leaf.dim()):
        return
    what = f"shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
    raise LossError(
        f"ax.measure wants scalars that are means over rows, or Means, got {what}; "
        "write ax.Mean(values.sum(0), len(values)), or ax.gather_rows for values "
        "themselves"
    )


def _aux(aux: Any) -> Any:
    if aux is None:
        return None
    return tree.map_leaves(detached, aux)


def detached(leaf: Any) -> Any:
    """`leaf` without its graph, where it is a tensor."""
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def trains(loss: Tensor) -> Tensor:
    """`loss`, which a gradient goes back from. Raises LossError where none does."""
    if not loss.requires_grad:
        raise LossError(
            "the loss wants to depend on a trainable parameter, got one without a "
            "gradient; compute it from the model that the loss function is given, "
            "outside torch.no_grad(), or use ax.measure to evaluate"
        )
    return loss


def as_total(mean: Mean) -> Tensor:
    """The total of `mean`. Raises LossError where it is no real scalar tensor."""
    total = mean.total
    if not isinstance(total, Tensor) or total.dim():
        shape = (
            tuple(total.shape) if isinstance(total, Tensor) else type(total).__name__
        )
        raise LossError(
            f"the total of a Mean wants to be a scalar tensor, got {shape}; "
            "write ax.Mean(losses.sum(), mask.sum())"
        )
    return _real(total)
