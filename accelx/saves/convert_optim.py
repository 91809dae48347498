"""Which parameter each entry of a foreign optimizer belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from accelx.errors import CheckpointError
from accelx.saves.convert_source import Lazy, Optim, value
from accelx.saves.optim import WORDS

Known = Callable[[str], str]  # a name in the file -> the model's first name for it


def install(
    optimizers: Sequence[Any],
    names: Mapping[int, str],
    found: Sequence[Optim],
    known: Known,
    stand: Callable[[Lazy], Tensor],
) -> None:
    """Put what was found into `optimizers`; what is unread, as `stand` has it.

    State that goes by position belongs to the parameters in the order in which the
    optimizer has them, which is not that of the model where there are groups. Raises
    CheckpointError with names where the optimizers are not those that were saved.
    """
    by_position = [any(type(p) is int for p in _params(one)) for one in found]
    if any(by_position):
        _same_number(found, optimizers, "optimizers", found[0].where)
        pairs = zip(found, optimizers, strict=True)
        found = [_by_name(one, optimizer, names) for one, optimizer in pairs]
        known = _itself
    where = ", ".join(one.where for one in found)
    options = {
        known(n): _options(g) for one in found for g in one.groups for n in g["params"]
    }
    state = {known(n): w for one in found for n, w in one.state.items()}
    groups = [(o, g) for o in optimizers for g in o.param_groups]
    ours = {names[id(p)] for _, g in groups for p in g["params"]}
    _same_names(where, ours, set(options), set(state))
    for optimizer, group in groups:
        each = [names[id(p)] for p in group["params"]]
        _same_options(where, each, [options[name] for name in each])
        for name, p in zip(each, group["params"], strict=True):
            _same_kind(where, optimizer, options[name])
            _same_shapes(where, name, p, state.get(name, {}))
            group.update(options[name])
            optimizer.state[p] = {
                k: stand(v) if isinstance(v, Lazy) else value(v)
                for k, v in state.get(name, {}).items()
            }


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    left = ("params", "param_names")
    return {k: value(v) for k, v in group.items() if k not in left}


def _itself(name: str) -> str:
    return name


def _params(one: Optim) -> list[Any]:
    return [p for group in one.groups for p in group["params"]]


def _same_number(theirs: Sequence[Any], ours: Sequence[Any], of: str, at: str) -> None:
    if len(theirs) != len(ours):
        raise CheckpointError(
            f"{at} wants the optimizer that was saved: it has {len(theirs)} {of}, and "
            f"optim= makes {len(ours)}; write the function that made it"
        )


def _by_name(one: Optim, optimizer: Any, names: Mapping[int, str]) -> Optim:
    """State by position as state by name."""
    _same_number(one.groups, optimizer.param_groups, "groups", one.where)
    name_of: dict[Any, str] = {}
    groups = list[Mapping[str, Any]]()
    for number, (theirs, ours) in enumerate(
        zip(one.groups, optimizer.param_groups, strict=True)
    ):
        of = f"parameters in group {number}"
        _same_number(theirs["params"], ours["params"], of, one.where)
        its = [names[id(p)] for p in ours["params"]]
        name_of |= dict(zip(theirs["params"], its, strict=True))
        groups.append({**theirs, "params": its})
    state = {name_of.get(p, str(p)): words for p, words in one.state.items()}
    return Optim(one.where, groups, state)


def _same_names(where: str, ours: set[str], groups: set[str], state: set[str]) -> None:
    faults = [f"{n} is in it and not moved here" for n in sorted(groups - ours)]
    faults += [f"{n} is moved here and not in it" for n in sorted(ours - groups)]
    faults += [f"{n} has state and is in no group" for n in sorted(state - groups)]
    if faults:
        raise CheckpointError(
            f"{where} wants the optimizer that was saved, but:\n  "
            + "\n  ".join(faults[:20])
            + "\nWrite the model and the function optim= that made it"
        )


def _same_options(where: str, names: list[str], options: list[dict[str, Any]]) -> None:
    if any(one != options[0] for one in options):
        raise CheckpointError(
            f"{where} wants the groups that were saved, but optim= puts "
            f"{', '.join(names[:4])} into one group, and there they have different "
            "options; write the function that made them"
        )


def _same_kind(where: str, optimizer: Any, theirs: Mapping[str, Any]) -> None:
    """Refuse another class of optimizer, as far as its options tell."""
    ours = optimizer.defaults
    mark = "decoupled_weight_decay"  # what AdamW has and Adam has not
    other = ours.get(mark) != theirs.get(mark, ours.get(mark))
    if other or (set(ours) - set(theirs) and set(theirs) - set(ours) - {"initial_lr"}):
        raise CheckpointError(
            f"{where} wants the class of optimizer that was saved, with the options "
            f"{', '.join(sorted(theirs))}, got {type(optimizer).__name__}; write the "
            "function optim= that made it"
        )


def _same_shapes(where: str, name: str, p: Tensor, words: Mapping[str, Any]) -> None:
    """Refuse moments of another shape: the parameters are in another order here."""
    for word, leaf in words.items():
        shape = tuple(leaf.shape) if hasattr(leaf, "shape") else ()
        if word in WORDS and shape and shape != tuple(p.shape):
            raise CheckpointError(
                f"{where} wants {word} of {name} to be {list(p.shape)}, got "
                f"{list(shape)}; the parameters are in another order here: write the "
                "function optim= that made the optimizer"
            )


def updates(found: Sequence[Optim]) -> int | None:
    """How many updates were made, if an optimizer counts them."""
    held = (w["step"] for one in found for w in one.state.values() if "step" in w)
    counts = [float(v) for v in map(value, held) if isinstance(v, int | float | Tensor)]
    if not all(count >= 0 and count.is_integer() for count in counts):
        return None
    return int(max(counts)) if counts else None
