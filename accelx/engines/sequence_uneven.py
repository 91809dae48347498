"""Means over tokens of which ranks have more or fewer: no loss of a sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from accelx import _torch_stages, tree
from accelx.engines.sequence import Site
from accelx.errors import LossError
from accelx.records import Mean

COUNT = "_accelx_count"  # on a number of tokens, or a sum of their weights
SUMS = (Tensor.sum, torch.sum, Tensor.count_nonzero, torch.count_nonzero)
SAME = (  # what leaves a number a number of tokens
    *(Tensor.clamp, Tensor.clamp_min, Tensor.to, Tensor.float, Tensor.double),
    *(torch.clamp, torch.clamp_min),
)
QUOTIENTS = (Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide)
CHOICES = (Tensor.__getitem__, torch.masked_select, Tensor.masked_select)
CRITERIA = (F.cross_entropy, F.nll_loss)
WATCHED = frozenset((*SUMS, *SAME, *QUOTIENTS, *CHOICES, *CRITERIA))


def note(site: Site, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """See whether `func` gave a mean, or a part of one, over some of the tokens."""
    if func not in WATCHED or site.here is None or not args:
        return
    first, rest = args[0], args[1:]
    if func in SUMS:
        counted = not out.requires_grad and not out.dim() and _tokens(site, first)
    else:
        counted = func in SAME and hasattr(first, COUNT)
    if counted:
        setattr(out, COUNT, True)
    elif func in CRITERIA:
        _criterion(site, func, args, kwargs)
    elif func in QUOTIENTS or func in CHOICES:
        by = rest[0] if rest else kwargs.get("other", kwargs.get("mask"))
        _part(site, func, out, by)


def _part(site: Site, func: Any, out: Tensor, by: Any) -> None:
    """A quotient or a choice that a loss, or what an evaluation tells, may be made of.

    Of a step's numbers without a gradient, a part of aux, nothing is said.
    """
    if not isinstance(by, Tensor) or (torch.is_grad_enabled() and not _matters(out)):
        return
    if hasattr(by, COUNT):
        site.uneven = f"it divides by a sum over {site.here} tokens of each row"
    elif by.dtype == torch.bool and func in CHOICES and _tokens(site, by):
        site.uneven = f"it chooses among {site.here} tokens of each row"


def _matters(out: Tensor) -> bool:
    return out.requires_grad or (out.dim() > 0 and out.is_floating_point())


def _tokens(site: Site, tensor: Tensor) -> bool:
    return tensor.dim() > site.dim and tensor.size(site.dim) == site.here


def _criterion(site: Site, func: Any, args: Any, kwargs: Any) -> None:
    """A mean of cross_entropy leaves out labels, or weighs them by classes."""
    if _torch_stages.is_fake(args[0]):
        return
    names = ("input", "target", "weight", "size_average", "ignore_index")
    told = dict(zip(names, args, strict=False)) | kwargs
    if told.get("reduction", "mean") != "mean":
        return
    ignored = told.get("ignore_index", -100)
    if told.get("weight") is not None:
        site.uneven = f"{func.__name__} has weights of classes"
    elif not told["target"].is_floating_point() and (told["target"] == ignored).any():
        site.uneven = f"{func.__name__} leaves out the labels {ignored}"


def refuse(site: Site, result: Any) -> None:
    """Raise LossError where `result`, of a loss, is a mean that counts tokens unevenly.

    In an `ax.Mean` it may be a total: which number it is divided by is said there.
    """
    if site.uneven is None or _means(result):
        return
    raise LossError(
        f"shard_sequence wants each token to count once, but the loss is a mean over "
        f"those of one rank, of which others have more or fewer: {site.uneven}; write "
        "ax.Mean(total, number of tokens), as of cross_entropy(..., reduction='sum') "
        "and (labels != -100).sum()"
    )


def _means(result: Any) -> bool:
    """Whether a loss is a Mean; or all that an evaluation tells."""
    if torch.is_grad_enabled():
        loss = result[0] if isinstance(result, tuple) and result else result  # type: ignore[reportUnknownVariableType]
        return isinstance(loss, Mean)
    each = tree.leaves(result, lambda node: isinstance(node, Mean))
    return all(isinstance(one, Mean) for one in each)
