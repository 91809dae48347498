"""Optimizers are made after the model is placed, by the user's own function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from shutil import which
from typing import Any

from torch import nn
from torch.optim import Optimizer

from accelx import _torch
from accelx.errors import MissingExtraError, PlacementError, UnusedParameterError
from accelx.match import globs
from accelx.saves.spread import elsewhere

TOOLS = ("c++", "ninja")  # of which torch's builder of extensions makes use
UNBUILT = ("failed to build/load", "Unable to JIT load")  # of DeepSpeed's errors


def make(optim: Callable[[Any], Any] | None, model: nn.Module) -> tuple[Any, ...]:
    """The optimizers that `optim(model)` makes, checked against the model."""
    if optim is None:
        return ()
    if isinstance(optim, Optimizer) or not callable(optim):
        raise PlacementError(
            "init wants a function that makes the optimizer once the model is placed, "
            f"got a {type(optim).__name__} object, which would go on updating weights "
            "that placing replaces; write `lambda m: "
            f"{type(optim).__name__}(m.parameters(), ...)`"
        )
    if isinstance(optim, type) and issubclass(optim, Optimizer):
        raise PlacementError(
            f"init wants a function of the placed model, got the class {optim.__name__}"
            f"; write `lambda m: {optim.__name__}(m.parameters(), lr=...)`"
        )
    made = _called(optim, model)
    optimizers = tuple(made) if isinstance(made, list | tuple) else (made,)  # type: ignore[reportUnknownArgumentType]
    for one in optimizers:
        _check(one)
    _covers(optimizers, model)
    return optimizers


def _called(optim: Callable[[Any], Any], model: nn.Module) -> Any:
    """What the user's function makes; says so if it wanted a compiler that is none.

    DeepSpeedCPUAdam and its like compile themselves, and their own error names no tool.
    """
    try:
        return optim(model)
    except ValueError as error:
        if "empty parameter list" not in str(error) or not elsewhere(model):
            raise
        raise PlacementError(
            "each stage of a model wants an optimizer, but nothing is trained in this "
            "one, and the function picks what is trained; give it frozen weights too, "
            "which stay as they are: `lambda m: AdamW(m.parameters(), ...)`"
        ) from error
    except RuntimeError as error:
        missing = [tool for tool in TOOLS if which(tool) is None]
        if not missing or not any(words in str(error) for words in UNBUILT):
            raise
        raise MissingExtraError(
            f"this optimizer compiles itself when it is made, and wants "
            f"{' and '.join(TOOLS)} on PATH, which has no {' and no '.join(missing)}; "
            "install g++ and ninja, or make torch.optim.AdamW, which compiles nothing"
        ) from error


def _check(one: Any) -> None:
    if not hasattr(one, "param_groups") or not hasattr(one, "step"):
        raise PlacementError(
            f"the optimizer function returned {type(one).__name__}, not an optimizer "
            "or a list of them; write `lambda m: AdamW(m.parameters(), lr=3e-4)`"
        )
    closure = inspect.signature(one.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PlacementError(
            f"{type(one).__name__} calls the loss again and again by a closure, so one "
            "step is not one gradient and cannot be accumulated, clipped or reduced "
            "once; use an optimizer whose step() takes no closure, such as AdamW"
        )
    for group in one.param_groups:
        at_once = [word for word in ("foreach", "fused") if group.get(word)]
        if at_once and _torch.mixed(group["params"]):
            raise PlacementError(
                f"{at_once[0]}=True updates weights of a group at once, and wants them "
                f"all in slices or all whole, but a group of {type(one).__name__} has "
                "both; give those that shard_model leaves whole a group of their own, "
                'ax.param_groups(m, {"head.**": {}, "**": {}}), or leave '
                f"{at_once[0]} out"
            )


def _covers(optimizers: tuple[Any, ...], model: nn.Module) -> None:
    """Every optimizer's parameters are the model's, every trainable one is in some."""
    names = {id(p): n for n, p in model.named_parameters()}
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    strangers = sum(i not in names for i in held)
    if strangers:
        raise PlacementError(
            f"{strangers} parameters of the optimizers are not of the placed model, so "
            "the model would not train; use the function's argument: "
            "`lambda m: AdamW(m.parameters())`"
        )
    twice = [names[i] for i in dict.fromkeys(held) if held.count(i) > 1]
    if twice:
        raise PlacementError(
            f"{', '.join(twice[:5])} would be moved by two optimizers or groups; give "
            "each parameter to one"
        )
    rest = [
        n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held
    ]
    if rest:
        raise UnusedParameterError(
            f"no optimizer moves {len(rest)} trainable parameters: "
            f"{', '.join(rest[:5])}{' and more' if rest[5:] else ''}; give them to "
            "one, or freeze them first: parameter.requires_grad_(False)"
        )


def param_groups(
    model: nn.Module, settings: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Parameter groups by name: `{"**.bias": {"weight_decay": 0.0}, "**": {}}`.

    Each trainable parameter goes to the first glob that takes its name; `*` is within
    one part of the dotted name, `**` any number of parts. A group carries its glob as
    "name". Raises ValueError where a glob takes nothing or a parameter is taken by
    none.
    """
    groups: dict[str, list[Any]] = {pattern: [] for pattern in settings}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        pattern = next((g for g in settings if globs(g, name)), None)
        if pattern is None:
            raise ValueError(
                f"no group takes parameter {name!r}, got {list(settings)}; "
                'add a last group "**": {}'
            )
        groups[pattern].append((name, p))
    others = elsewhere(model)  # on other stages of a pipeline
    empty = [g for g, taken in groups.items() if not taken]
    unused = [g for g in empty if not any(globs(g, name) for name in others)]
    if unused:
        raise ValueError(
            f"groups {unused} take no parameter; names are such as "
            f"{[n for n, _ in model.named_parameters()][:4]}; mend or drop them"
        )
    return [
        {"params": taken, "name": pattern, **settings[pattern]}
        for pattern, taken in groups.items()
    ]
