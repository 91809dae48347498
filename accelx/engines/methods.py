"""Methods of a model that a loss may call in place of the model itself."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from accelx.errors import PlacementError

Around = Callable[[MethodType, Any, Any], Any]  # (method, args, kwargs) -> its result


def owners(model: nn.Module, methods: tuple[str, ...]) -> list[tuple[nn.Module, str]]:
    """The module and the name of each of "generate", "encoder.encode".

    Raises PlacementError for what is no method.
    """
    return [_owner(model, name) for name in methods]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    modules = dict(model.named_modules())
    module = modules.get(path)
    if module is None or not isinstance(getattr(module, leaf, None), MethodType):
        at = type(model).__name__
        common = {*dir(nn.Module), "forward"}
        own = [n for n in dir(type(model)) if n not in common and n[0] != "_"]
        own = [n for n in own if callable(getattr(type(model), n, None))]
        shown = ", ".join(own[:8]) or "none but forward"
        raise PlacementError(
            f"methods={name!r} wants a method of {at}, got none of that name; its own "
            f"are {shown}: write one of them, or leave methods out"
        )
    if leaf == "forward":
        raise PlacementError(
            f"methods={name!r} wants methods beside forward, which is one already; "
            "leave it out"
        )
    return module, leaf


def gathered(
    model: nn.Module, methods: tuple[str, ...], blocks: list[nn.Module]
) -> None:
    """Refuse a method of a module that fsdp does not gather by itself."""
    for name, (module, _) in zip(methods, owners(model, methods), strict=True):
        if module is not model and all(module is not block for block in blocks):
            raise PlacementError(
                f"methods={name!r} wants a module that is gathered by itself, but the "
                f"{type(module).__name__} is gathered with what is around it; name it "
                "in blocks, too, or share none of its weights with the outside"
            )


def gathering(model: nn.Module, methods: tuple[str, ...]) -> None:
    """Have fsdp gather weights for these methods, as it does for forward."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    for module, leaf in owners(model, methods):
        register_fsdp_forward_method(module, leaf)


def wrap(model: nn.Module, methods: tuple[str, ...], around: Around) -> None:
    """Run `around` in place of these methods; a copy of the model is left alone."""
    for module, leaf in owners(model, methods):
        _wrap(module, leaf, around)


def _wrap(module: nn.Module, leaf: str, around: Around) -> None:
    plain: Any = getattr(module, leaf).__func__

    @functools.wraps(plain)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = MethodType(plain, self)
        if self is not module:  # a deep copy, as users make for an average
            return method(*args, **kwargs)
        return around(method, args, kwargs)

    setattr(module, leaf, MethodType(wrapped, module))


_MIXED = (  # of slices and whole tensors, or of slices in place of their numbers
    "mixed torch.Tensor and DTensor",
    "got <class 'torch.distributed.tensor.DTensor'>",
)
# What torch says of an empty tensor in place of a weight.
_NOTHING = re.compile(r"got \[0\] but expected|of tensor [ab] \(0\)|vec \(0\)")


def say_sliced(error: BaseException) -> None:
    """Add to torch's errors of weights that are slices, or gone, what to write."""
    if any(words in str(error) for words in _MIXED):
        error.add_note(
            "a module was called, or a weight used, outside of the model's forward, "
            "which gathers its weights, and found slices; call the model itself, or "
            'name the method that does: shard_model(env, "fsdp2", methods="generate"). '
            "A penalty on weights is the optimizer's weight_decay, or a pass: "
            'ax.transform("name", before=...). Logits that stay cut ("loss" in a plan) '
            "are for cross_entropy without label_smoothing: for others write "
            '"column_gather"'
        )
    if "mixed dtype (CPU)" in str(error):
        error.add_note(
            "a norm of torch on a CPU takes float32 with float32 weights alone, and "
            "fsdp2 gathers weights in the compute dtype; leave those of norms whole: "
            'shard_model(env, "fsdp2", ignored="**.norm"), or cast what goes into them'
        )
    if _NOTHING.search(str(error)):
        error.add_note(
            "under ZeRO stage 3 a weight has elements only while its own module runs, "
            "so none for a penalty on weights, nor for a gradient of gradients "
            "(create_graph=True); a penalty is the optimizer's weight_decay, and for "
            'the rest write stage=2, or shard_model(env, "fsdp2")'
        )
    if "has already been lazily initialized" in str(error):
        error.add_note(
            "a block was called by itself before the model was; call the model first, "
            'or name the method that calls blocks: shard_model(env, "fsdp2", '
            'methods="encode")'
        )
    if "setStorage" in str(error) and "storage of size 0" in str(error):
        error.add_note(
            "a backward pass wanted weights that were let go of. If a block's result, "
            "which may be a view, was written to (x += y), write x = x + y, or "
            "reshard_after_forward=False; for a gradient of gradients "
            "(create_graph=True), or two backward passes over one forward, "
            'write shard_model(env, "ddp")'
        )
