"""What other passes make of the shapes that stages hand on."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from accelx.engines.experts import chosen, known
from accelx.engines.placed import Plan
from accelx.engines.stage_route import Sketch
from accelx.engines.tensor_plans import styles
from accelx.engines.tensor_styles import POSITIONS, first_input
from accelx.engines.tensor_words import POSITIONAL, words
from accelx.errors import DataError, PlacementError


def shape(sketch: Sketch, plan: Plan) -> None:
    """Have the sketch go as the placed model will: ranks' own positions and experts.

    Effect: hooks on the sketch. Raises PlacementError for a plan that cuts positions at
    a module which runs in several stages.
    """
    if plan.tensors is not None:
        _positions(sketch, plan.tensors.plan, plan.tensors.over.world)
    if plan.experts is None:
        found = known(sketch.model)
    else:
        found = chosen(sketch.model, plan.experts.experts, plan.experts.over.world)
    for module in found.values():  # which tokens go where is asked of numbers
        vars(module)["forward"] = _as_given


def costed(model: nn.Module) -> None:
    """Have experts of `model`, a sketch, cost what they do: shapes choose none.

    Nor do all kernels for them know of shapes. Effect: their `forward` is another.
    """
    for module in known(model).values():
        sizes = [p.shape[1:] for p in module.parameters(False) if p.dim() > 2]
        vars(module)["forward"] = functools.partial(_worked, sizes)


def _worked(
    sizes: list[torch.Size], tokens: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """The products of each token and its experts' weights, of `sizes` each."""
    for rows, columns in sizes:
        _ = tokens.new_empty(index.numel(), rows) @ tokens.new_empty(rows, columns)
    return torch.empty_like(tokens)


def _as_given(tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return torch.empty_like(tokens)


def _positions(sketch: Sketch, plan: Any, ranks: int) -> None:
    """Cut and join positions as `plan` does over `ranks` in the model."""
    for name, style in styles(sketch.model, plan, ranks).items():
        for word in (word for word in words(style) if word in POSITIONAL):
            if sketch.homes.of(name) is None:
                raise PlacementError(
                    f"the plan of shard_tensors wants {name} to cut or join positions "
                    f"by {word!r}, but it is of no stage, and what it is given is not "
                    "on all of them; name a module with weights in one of them"
                )
            _hook(sketch.model.get_submodule(name), name, word, ranks)


def _hook(module: nn.Module, name: str, word: str, ranks: int) -> None:
    def part(x: Tensor) -> Tensor:
        length = x.size(POSITIONS)
        if length % ranks:
            raise DataError(
                f"the plan of shard_tensors cuts the positions of {name} over {ranks} "
                f"ranks, which do not divide {length}; pad rows to a length of "
                f"{length + -length % ranks}"
            )
        return x.narrow(POSITIONS, 0, length // ranks)

    def whole(x: Tensor) -> Tensor:
        return torch.cat([x] * ranks, POSITIONS)

    if word == "scatter":
        first_input(module, part)
    elif word == "gather":
        first_input(module, whole)
    elif word in ("sequence_gather", "row_scatter", "embedding_scatter"):
        change = whole if word == "sequence_gather" else part

        def behind(m: nn.Module, args: Any, out: Any) -> Tensor:
            return change(out)

        module.register_forward_hook(behind)
