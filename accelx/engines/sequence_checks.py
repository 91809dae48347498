"""What would mix tokens of one rank as if they were the whole sequence: refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accelx.engines.sequence import Site
from accelx.errors import LossError, PlacementError
from accelx.match import Selector, fits

MIXERS = (
    *(nn.Conv1d, nn.ConvTranspose1d, nn.RNNBase, nn.MultiheadAttention, nn.Flatten),
    *(nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    *(nn.GroupNorm, nn.InstanceNorm1d),
)
Check = Callable[[Site, Any, Any, Any], str | None]  # site, first, args, kwargs


def vouched(model: nn.Module, allow: Iterable[Selector]) -> set[nn.Module]:
    """The modules that `allow` takes, the model itself too, and all that is in them.

    Raises PlacementError for a selector that takes none.
    """
    found: set[nn.Module] = set()
    for selector in allow:
        mine = [m for n, m in model.named_modules() if fits(selector, n, m)]
        if not mine:
            raise PlacementError(
                f"shard_sequence(allow={selector!r}) matches no module of "
                f"{type(model).__name__}; write a name or a glob such as 'layers.*', a "
                "class, or a function (name, module) -> bool"
            )
        found |= {inner for m in mine for inner in m.modules()}
    return found


def check_modules(model: nn.Module, known: set[nn.Module]) -> None:
    """Refuse modules that mix tokens in another way than by attention."""
    for name, module in model.named_modules():
        if module in known or not isinstance(module, MIXERS):
            continue
        kind = type(module).__name__
        instead = (
            "write torch.nn.functional.scaled_dot_product_attention"
            if isinstance(module, nn.MultiheadAttention)
            else "leave it out"
        )
        raise PlacementError(
            f"shard_sequence exchanges tokens between ranks in "
            f"scaled_dot_product_attention alone, but {name or 'the model'} is a "
            f"{kind}, which would see one rank's tokens; {instead}, or, if it does not "
            f"mix tokens here, vouch for it: allow={name or kind!r}"
        )


def _by_dim(index: Any, ndim: int) -> list[Any]:
    """What `tensor[index]` asks of each dimension; empty where numbers choose rows."""
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]  # type: ignore[reportUnknownArgumentType]
    if any(isinstance(p, Tensor | list) for p in parts):
        return []
    taken = sum(p is not None and p is not Ellipsis for p in parts)
    spread: list[Any] = []
    for part in parts:
        if part is Ellipsis:
            spread += [slice(None)] * (ndim - taken)
        elif part is not None:
            spread.append(part)
    return spread


def _index(site: Site, tensor: Tensor, args: Any, kwargs: Any) -> str | None:
    wanted = _by_dim(args[0], tensor.dim())
    if tensor.grad_fn is None and any(
        _first(site, part, tensor, dim) for dim, part in enumerate(wanted)
    ):
        return _POSITIONS.format("cuts a table to", site.here)
    dim = 2 if _by_head(site, tensor) else site.dim
    if (dim == site.dim and not _of_tokens(site, tensor)) or len(wanted) <= dim:
        return None
    return None if wanted[dim] in (slice(None), slice(0, None)) else _CUT


def _first(site: Site, part: Any, tensor: Tensor, dim: int) -> bool:
    """Whether a longer table is cut to the tokens here, as if they were the first."""
    if not isinstance(part, slice) or part.stop != site.here or part.start:
        return False
    features = dim == tensor.dim() - 1 and dim > 0 and tensor.is_floating_point()
    return tensor.size(dim) > (site.here or 0) and not features


def _of_tokens(site: Site, tensor: Tensor, features: bool = False) -> bool:
    """Whether a tensor looks like (rows, tokens) or, with `features`, more, alone."""
    dims = (site.dim + 2,) if features else (site.dim + 1, site.dim + 2)
    return tensor.dim() in dims and tensor.size(site.dim) == site.here


def _along(site: Site, tensor: Any, args: Any, kwargs: Any) -> str | None:
    """Whether rows of features are worked on along their tokens."""
    if not isinstance(tensor, Tensor) or not _of_tokens(site, tensor, features=True):
        return None
    return _CUT if site.dim in _dims(tensor, args, kwargs) else None


def _along_second(site: Site, tensor: Any, args: Any, kwargs: Any) -> str | None:
    """The same, where something else comes ahead of the dimension."""
    return _along(site, tensor, args[1:], kwargs)


def _normalized(site: Site, tensor: Tensor, args: Any, kwargs: Any) -> str | None:
    """The same of normalize(x, p=2, dim=1)."""
    by = kwargs if "dim" in kwargs else {"dim": args[1] if len(args) > 1 else 1}
    return _along(site, tensor, (), by)


def _narrowed(site: Site, tensor: Tensor, args: Any, kwargs: Any) -> str | None:
    """Whether narrow(x, dim, start, length) leaves out tokens."""
    told = dict(zip(("dim", "start", "length"), args, strict=False)) | kwargs
    whole = told.get("length") == tensor.size(told["dim"])
    mixed = _of_tokens(site, tensor) and told["dim"] % tensor.dim() == site.dim
    return _CUT if mixed and not whole else None


def _padded(site: Site, tensor: Tensor, args: Any, kwargs: Any) -> str | None:
    """Whether tokens, or those of each head, are shifted by pad(x, (..., n, -n))."""
    pad = args[0] if args else kwargs["pad"]
    dims = {tensor.dim() - 1 - i // 2 for i, n in enumerate(pad) if n}
    mixed = _of_tokens(site, tensor) and site.dim in dims
    return _CUT if mixed or (_by_head(site, tensor) and 2 in dims) else None


def _by_head(site: Site, tensor: Tensor) -> bool:
    """Whether a tensor looks like (rows, heads, tokens, size), alone."""
    heads = tensor.dim() == 4 and tensor.size(1) != site.here
    return heads and tensor.size(2) == site.here


def _einsum(site: Site, equation: Any, args: Any, kwargs: Any) -> str | None:
    """Whether a sum over the letter of tokens is made: of rows of features."""
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return None
    given, made = equation.replace(" ", "").split("->")
    every: Any = args[0] if args and isinstance(args[0], tuple | list) else args
    for letters, tensor in zip(given.split(","), every, strict=False):
        if _of_tokens(site, tensor, features=True) and letters[site.dim] not in made:
            return _CUT
    return None


def _product(site: Site, left: Any, args: Any, kwargs: Any) -> str | None:
    """Whether heads' features are summed over tokens, as attention by hand does."""
    right: Any = args[0] if args else kwargs.get("other", kwargs.get("mat2"))
    over = isinstance(right, Tensor) and left.dim() == right.dim() == 4
    summed = over and left.size(-1) == site.here and _by_head(site, right)
    return _by_hand(site) if summed else None


def _running(site: Site, tensor: Tensor, args: Any, kwargs: Any) -> str | None:
    """The same of tokens without features: positions are counted so."""
    mixed = _of_tokens(site, tensor) and site.dim in _dims(tensor, args, kwargs)
    return _POSITIONS.format("counts along", site.here) if mixed else None


def _dims(tensor: Tensor, args: Any, kwargs: Any) -> list[int]:
    """The dimensions that a call names, first of its arguments behind the tensor."""
    named = [kwargs[k] for k in ("dim", "dims", "axis") if k in kwargs]
    each: list[Any] = []
    for one in (*named, *args[:1]):
        each += list(one) if isinstance(one, tuple | list) else [one]  # type: ignore[reportUnknownArgumentType]
    return [d % tensor.dim() for d in each if type(d) is int]


def _shifted(site: Site, tensor: Tensor, args: Any, kwargs: Any) -> str | None:
    """Whether tokens are rolled: `roll(tensor, shifts, dims)`."""
    mixed = _of_tokens(site, tensor) and site.dim in _dims(tensor, args[1:], kwargs)
    return _CUT if mixed else None


def _arange(site: Site, tensor: Any, args: Any, kwargs: Any) -> str | None:
    every = (tensor, *args, *(kwargs[k] for k in ("start", "end") if k in kwargs))
    given = tuple(x for x in every if x is not None)
    counts = given in ((site.here,), (0, site.here), (0, site.here, 1))
    return _POSITIONS.format("counts positions up to", site.here) if counts else None


def _softmax(site: Site, tensor: Tensor, args: Any, kwargs: Any) -> str | None:
    square = tuple(tensor.shape[-2:]) == (site.here, site.here)
    by_hand = _by_hand(site) if tensor.dim() > 2 and square else None
    return by_hand or _along(site, tensor, args, kwargs)


def _by_hand(site: Site, *_: Any) -> str:
    return (
        f"is attention among the {site.here} tokens of one rank; write "
        "torch.nn.functional.scaled_dot_product_attention"
    )


def _convolved(site: Site, tensor: Tensor, args: Any, kwargs: Any) -> str | None:
    return _CUT if tensor.size(-1) == site.here else None


_POSITIONS = (
    "{} {}, which is one rank's part of the sequence; take positions from the batch, "
    "such as torch.arange(length) for each row, and give them to the model"
)
_CUT = (
    "takes a part of the tokens, shifts them or sums over them, which is another "
    "result where a sequence is cut; shift labels where batches are made, so that "
    "labels[:, i] belongs to tokens[:, i]"
)


def _all(check: Check, names: str) -> dict[Any, Check]:
    """`check` for functions of torch, and for methods of tensors, of these names."""
    both = ((torch, Tensor), names.split())
    found = [getattr(o, n) for o, n in itertools.product(*both) if hasattr(o, n)]
    return dict.fromkeys(found, check)


CHECKS: dict[Any, Check] = {
    Tensor.__getitem__: _index,
    torch.arange: _arange,
    torch.einsum: _einsum,
    F.conv1d: _convolved,
    F.multi_head_attention_forward: _by_hand,
    F.normalize: _normalized,
    F.pad: _padded,
    **_all(_narrowed, "narrow"),
    **_all(_product, "matmul __matmul__"),
    **_all(_softmax, "softmax log_softmax"),
    **dict.fromkeys((F.softmax, F.log_softmax), _softmax),
    **_all(_running, "cumsum"),
    **_all(_shifted, "roll"),
    **_all(_along, "mean sum nanmean nansum amax amin max min prod median select std"),
    **_all(_along, "var std_mean var_mean logsumexp logcumsumexp cummax cummin sort"),
    **_all(_along, "cumprod argmax argmin argsort flip"),
    **_all(_along_second, "norm topk kthvalue quantile diff"),
    **dict.fromkeys((torch.linalg.norm, torch.linalg.vector_norm), _along_second),
}


def check_call(site: Site, func: Any, args: Any, kwargs: Any) -> None:
    """Refuse a call of torch inside a loss that takes one rank's tokens for all."""
    check = CHECKS.get(func)
    if check is None or site.here is None:
        return
    first, rest = (args[0], args[1:]) if args else (kwargs.get("input"), ())
    said = check(site, first, rest, kwargs)
    if said is not None:
        name = getattr(func, "__name__", str(func))
        raise LossError(
            f"shard_sequence: each rank has {site.here} of "
            f"{site.here * site.layout.world} tokens, but {name} in the loss or the "
            f"model {said}. If no other rank's tokens are wanted there, vouch for the "
            "module: shard_sequence(env, allow=...)"
        )
