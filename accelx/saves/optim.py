"""Optimizers by the names of their parameters, in words of ours, not of torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from torch import Tensor, nn

from accelx.errors import CheckpointError
from accelx.saves import check
from accelx.saves.flat import Flat, Held
from accelx.saves.typed import Keep, Made, decode, encode, settle
from accelx.state import State

# torch's word for a moment -> ours. A file keeps ours, so that another release of
# torch reads it; words not listed are kept.
MARK = "_"
WORDS = {
    "exp_avg": "first_moment",
    "exp_avg_sq": "second_moment",
    "max_exp_avg_sq": "max_second_moment",
    "momentum_buffer": "momentum",
    "square_avg": "mean_square",
    "grad_avg": "mean_gradient",
    "acc_delta": "mean_square_update",
    "exp_inf": "max_gradient",
    "sum": "sum_of_squares",
    "ax": "average_weight",
}
TORCH = {ours: theirs for theirs, ours in WORDS.items()}


def word(key: Any) -> Any:
    """Our word for a key of an optimizer's state.

    One that is called as one of ours, and is another thing, gets a mark.
    """
    marked = isinstance(key, str) and key.lstrip(MARK) in TORCH
    return MARK + key if marked else WORDS.get(key, key)


def key_of(word: Any) -> Any:
    """The key that `word` was made of."""
    marked = isinstance(word, str) and word.startswith(MARK)
    if marked and word.lstrip(MARK) in TORCH:
        return word[len(MARK) :]
    return TORCH.get(word, word)


@attrs.define(eq=False)
class Seen:
    """An optimizer over flat slices, as it would be over the model's parameters."""

    kind: str  # name of its class
    param_groups: list[dict[str, Any]]  # copies, with the model's parameters
    state: dict[Any, dict[str, Any]]  # of each parameter: Flat, or what slices share
    likes: Mapping[int, Flat]  # by id of a parameter: how what belongs to it lies
    put: Callable[[Mapping[Any, Any]], None]  # write such a state into the optimizer
    real: list[dict[str, Any]]  # the optimizer's own groups


def seen(state: State) -> tuple[Any, ...]:
    """A state's optimizers as they are over parameters that have names."""
    placed = state.slots.get("shard_model")
    return state.optimizers if placed is None else placed.seen(state)


def kind_of(optimizer: Any) -> str:
    """The name of an optimizer's class."""
    return optimizer.kind if isinstance(optimizer, Seen) else type(optimizer).__name__


def names_of(model: nn.Module) -> dict[int, str]:
    """id of a parameter -> its first name."""
    return {id(p): name for name, p in model.named_parameters()}


def describe(i: int, optimizer: Any, names: dict[int, str], keep: Keep) -> Any:
    """Groups and state of optimizer `i` as typed JSON: two values, by name."""
    at = f"optim.{i}"
    groups, state = list[Any](), dict[str, Any]()
    for number, group in enumerate(optimizer.param_groups):
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        groups.append(
            {
                "params": [names[id(p)] for p in group["params"]],
                "options": encode(options, f"{at}.groups.{number}", keep),
            }
        )
        for p in group["params"]:
            held = optimizer.state.get(p)
            if held:
                name = names[id(p)]
                words = {word(k): v for k, v in held.items()}
                state[name] = encode(words, f"{at}.state.{name}", keep)
    rest = {k: v for k, v in optimizer.state.items() if not isinstance(k, Tensor)}
    kind = kind_of(optimizer)
    other = encode(rest, f"{at}.other", keep)
    return {
        f"{at}.groups": {"class": kind, "groups": groups},
        f"{at}.state": {"class": kind, "state": state, "other": other},
    }


@attrs.frozen
class Sides:
    """How parameters are found in a file, and tensors made for what it has of them."""

    own: Mapping[int, str]  # id of a parameter -> its name here
    saved: Mapping[str, str]  # name here -> name in the file, where it is another
    make: Made

    def name_of(self, param: Any) -> str:
        """The parameter's name in the file."""
        name = self.own[id(param)]
        return self.saved.get(name, name)


def restored_state(
    i: int, raw: Any, optimizer: Any, sides: Sides
) -> Callable[[], None]:
    """The state of optimizer `i`, to be filled; what installs it.

    Raises CheckpointError for another
    kind of optimizer, and for a parameter that the file knows nothing of.
    """
    fields = {"class": str, "state": dict, "other": dict}
    check.record(raw, f"optim.{i}.state", fields)
    _same_kind(i, raw, optimizer)
    held = raw["state"]
    made = _dict(raw["other"], f"optim.{i}.other", optimizer.state, sides.make)
    for group in optimizer.param_groups:
        for p in group["params"]:
            saved = sides.name_of(p)
            if saved in held:
                at = f"optim.{i}.state.{saved}"
                flat = isinstance(optimizer, Seen)
                like = optimizer.likes.get(id(p), p) if flat else p
                make = _refilling(at, optimizer, p, sides.make)
                words = _dict(held[saved], at, like, make)
                made[p] = {key_of(k): v for k, v in words.items()}

    def install() -> None:
        optimizer.state.clear()
        optimizer.state.update(settle(made))
        if isinstance(optimizer, Seen):
            optimizer.put(optimizer.state)

    return install


def _refilling(at: str, optimizer: Any, p: Any, make: Made) -> Made:
    """`make`, but what the optimizer has of `p` already is filled where it lies."""
    now = optimizer.state.get(p, {})
    kinds = Tensor | Flat
    there = {f"{at}.{word(k)}": v for k, v in now.items() if isinstance(v, kinds)}

    def made(path: str, like: Any, cpu: bool, reuse: bool = False) -> Held:
        return make(path, there.get(path, like), cpu, reuse or path in there)

    return made if there else make


def groups_in(i: int, raw: Any) -> list[dict[str, Any]]:
    """The groups that `describe` wrote: names of parameters, and options."""
    what = f"optim.{i}.groups"
    check.record(raw, what, {"class": str, "groups": list})
    for one in raw["groups"]:
        check.record(one, what, {"params": list, "options": dict})
        for name in one["params"]:
            check.tensor_name(name, what)
    return raw["groups"]  # type: ignore[no-any-return]


def restored_groups(
    i: int, raw: Any, optimizer: Any, sides: Sides
) -> Callable[[], None]:
    """The options of optimizer `i`'s groups; what sets them.

    A group here takes the options of the group in the file that held its parameters.
    Options that are not here any more are left out, new ones keep what they are.
    """
    groups = groups_in(i, raw)
    _same_kind(i, raw, optimizer)
    of = {name: g for g in groups for name in g["params"]}
    made = list[tuple[dict[str, Any], dict[str, Any]]]()
    flat = isinstance(optimizer, Seen)
    real = optimizer.real if flat else optimizer.param_groups
    for number, group in enumerate(optimizer.param_groups):
        saved = [sides.name_of(p) for p in group["params"]]
        theirs = [of[name] for name in saved if name in of]
        if any(one is not theirs[0] for one in theirs):
            raise CheckpointError(
                f"group {number} of optimizer {i} wants options from one group, but "
                f"its parameters were in several ({saved[:4]} ...); make the groups "
                "that were saved, or leave options out: only=... without "
                f'"optim.{i}.groups"'
            )
        if theirs:
            at = f"optim.{i}.groups.{groups.index(theirs[0])}"
            options = _dict(theirs[0]["options"], at, group, sides.make)
            made.append((real[number], options))

    def install() -> None:
        for group, options in made:
            group.update({k: settle(v) for k, v in options.items() if k in group})

    return install


def _dict(raw: Any, path: str, like: Any, make: Made) -> dict[Any, Any]:
    """A value that `encode` made of a dict."""
    made = decode(raw, path, like, make)
    if not isinstance(made, dict):
        raise check.damaged(path, f"a {type(made).__name__} in place of a dict")
    return made  # type: ignore[reportUnknownVariableType]


def _same_kind(i: int, raw: Any, optimizer: Any) -> None:
    kind = kind_of(optimizer)
    if raw["class"] != kind:
        raise CheckpointError(
            f"optimizer {i} was a {raw['class']} when it was saved, and here it is a "
            f"{kind}; make that one, or leave it out: "
            'only=("model.**", "step", "skipped")'
        )
