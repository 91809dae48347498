"""What of a model would be lost, or go wrong unseen, on several ranks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from accelx import _torch
from accelx.errors import PlacementError

_LAZY = nn.UninitializedParameter | nn.UninitializedBuffer


def is_placed(module: nn.Module) -> bool:
    """Whether this object, and not one that it was copied from, has been placed."""
    return module.__dict__.get("_accelx_placed") == id(module)


def over_ranks(model: nn.Module) -> None:
    """Refuse what no kind can do on several ranks, by name, before a tensor moves."""
    if isinstance(model, torch.jit.ScriptModule):
        raise PlacementError(
            "several ranks want a module that takes hooks, got a ScriptModule, which "
            "takes none; give the module that torch.jit.script was given, and add "
            "ax.compile() to the chain"
        )
    named = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in named if isinstance(tensor, _LAZY)]
    if lazy:
        raise PlacementError(
            f"several ranks want weights that have a shape, but {_some(lazy)} of this "
            f"{type(model).__name__} gets one in its first forward; call the model "
            "once on a sample before ax.init, or write the sizes: nn.Linear(8, 64)"
        )
    cut = [n for n, p in model.named_parameters() if _torch.is_dtensor(p)]
    if cut:
        raise PlacementError(
            f"placing wants weights that are whole, but {_some(cut)} of this "
            f"{type(model).__name__} are in slices already, by another model or "
            "another library; place models that share weights by "
            '"ddp", or one that holds both'
        )
    for name, table in _tables(model):
        if table.max_norm is not None:
            raise PlacementError(
                f"{name or 'the model'} has max_norm={table.max_norm}, by which forward"
                " rewrites the rows that this rank looks up, so ranks would train "
                "apart; leave max_norm out, and divide rows by their norm in forward"
            )


def in_slices(model: nn.Module) -> None:
    """Refuse what is lost where slices take the place of weights, by name."""
    unhooked(model.named_parameters(), _torch.has_hooks)
    unshared(model)
    dense(model)
    for name, weight in model.named_parameters():
        # bitsandbytes keeps the scales of these as attributes of the Parameter
        if type(weight).__name__ == "Int8Params":
            raise PlacementError(
                "slices take the place of weights, and the scales that Int8Params of "
                f"bitsandbytes carry would be lost, as those of {name}; place the "
                'model by "ddp", or give it plain Linears and add ax.quantize("int8")'
            )


def unhooked(
    named: Iterable[tuple[str, nn.Parameter]],
    hooked: Callable[[nn.Parameter], bool] = _torch.has_grad_hooks,
) -> None:
    """Refuse hooks on weights that are to be slices, or are, by name."""
    names = [n for n, p in named if hooked(p)]
    if names:
        raise PlacementError(
            f"others take the place of weights here, and the hooks of {_some(names)} "
            "would never be called; change gradients in a pass, "
            'ax.transform("name", before=...), or place the model by "ddp" alone'
        )


def unshared(model: nn.Module) -> None:
    """Refuse a module of another model that was placed: that would lose its weights."""
    for name, module in model.named_modules():
        if module is not model and is_placed(module):
            raise PlacementError(
                f"slices take the place of weights, but {name} of this "
                f"{type(model).__name__} is of another model that was placed, which "
                'would find them; place both by "ddp", or one model that holds both'
            )


def dense(model: nn.Module) -> None:
    """Refuse tables whose gradients have some rows, by name."""
    for name, table in _tables(model):
        if table.sparse:
            raise PlacementError(
                f"slices want gradients of all rows, but {name or 'the model'} has "
                'sparse=True; write sparse=False, or place the model by "ddp" alone'
            )


def unheld(model: nn.Module, kind: str) -> None:
    """Refuse an optimizer that was made before slices take the place of its weights.

    It would go on without an error, and move nothing that the model still has.
    """
    ours = {id(p) for p in model.parameters()}
    made = [one for one in gc.get_objects() if issubclass(type(one), Optimizer)]
    for one in made:
        groups = getattr(one, "param_groups", ())
        held = (p for group in groups for p in group["params"])
        if any(id(p) in ours for p in held):
            name, here = type(one).__name__, type(model).__name__
            raise PlacementError(
                f"{kind} puts slices in place of weights, and this {here} has a "
                f"{name} already, which would go on moving the old ones; write model = "
                f'ax.shard_model(env, "{kind}")(model) first, then '
                f"{name}(model.parameters(), ...)"
            )


def _tables(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """Embeddings that are trained."""
    for name, module in model.named_modules():
        kinds = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if kinds and module.weight.requires_grad:
            yield name, module


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if names[4:] else ""
    return ", ".join(names[:4]) + more
