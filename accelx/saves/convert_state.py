"""Under which names of ours the parts of a foreign checkpoint go, and which do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from accelx.errors import CheckpointError
from accelx.saves.contents import model_tensors
from accelx.saves.convert_optim import install, updates
from accelx.saves.convert_source import Lazy, Source, held, value
from accelx.saves.flat import Held
from accelx.saves.load import Only, takes
from accelx.saves.optim import describe, names_of
from accelx.saves.typed import Kept, encode

SCHEDULE, SCALE = "slots.with_schedule", "slots.loss_scale"
WORDS = ("groups", "state")


@attrs.define(eq=False)
class Made:
    """The checkpoint that is being put together."""

    only: Only
    left_out: list[tuple[str, str]]
    tensors: dict[str, Lazy] = attrs.field(factory=dict)
    values: dict[str, Any] = attrs.field(factory=dict)
    aliases: dict[str, str] = attrs.field(factory=dict)
    stands: dict[int, tuple[Tensor, Lazy]] = attrs.field(factory=dict)

    def takes(self, name: str, where: str = "") -> bool:
        """Whether `only` takes it; notes it if not."""
        if takes(self.only, name):
            return True
        self.left_out.append((where or name, "only= does not take it"))
        return False

    def stand(self, lazy: Lazy) -> Tensor:
        """A tensor of one element that looks like one which is yet to be read."""
        one = torch.empty((), dtype=getattr(torch, lazy.dtype), device="cpu")
        made = one.expand(lazy.shape)
        self.stands[id(made)] = made, lazy
        return made

    def keep(self, path: str, tensor: Held) -> None:
        """Store a tensor, or what it stands for."""
        assert isinstance(tensor, Tensor)  # of one process, which holds it whole
        self.tensors[path] = self.stands.get(id(tensor), (None, held(tensor)))[1]


def put_together(
    source: Source,
    module: nn.Module | None,
    optimizers: Sequence[Any],
    only: Only,
    step: int | None,
) -> Made:
    """What is to be written. Reads the small things, and no weight but tied ones.

    Raises CheckpointError where model or optimizers are not those of the source.
    """
    made = Made(only, list(source.left_out))
    every = set(module.state_dict()) if module is not None else set[str]()
    bare = _bare(source.model, every)
    _model(made, {bare(name): leaf for name, leaf in source.model.items()}, module)
    moved = _optimizers(made, source, optimizers, module, bare)
    if step is None:
        step = updates(source.optims)
    if step is None and moved:
        raise CheckpointError(
            f"{source.optims[0].where} does not count its updates, and data and "
            "schedules go on from their number; write step=..."
        )
    made.values |= {"step": step or 0, "skipped": 0}
    _schedules(made, source, step or 0)
    _scaler(made, source)
    return made


def _bare(names: Iterable[str], every: set[str]) -> Callable[[str], str]:
    """A weight's name without what DistributedDataParallel and compile put before."""
    wrapped = all(name.startswith("module.") for name in names)

    def bare(name: str) -> str:
        if name in every:
            return name
        name = name.replace("_orig_mod.", "")
        return name.removeprefix("module.") if wrapped else name

    return bare


def _model(made: Made, theirs: dict[str, Any], module: nn.Module | None) -> None:
    if module is not None:
        theirs, made.aliases = _fitted(theirs, module)
    for name, leaf in theirs.items():
        path = f"model.{name}"
        if not made.takes(path):
            continue
        if name.rpartition(".")[2] == "_extra_state":
            made.values[path] = encode(value(leaf), path, made.keep)
        elif isinstance(leaf, Lazy):
            made.tensors[path] = leaf
        else:
            raise CheckpointError(
                f"{name} wants to be a tensor of a model, got {str(value(leaf))[:80]}; "
                'say where the weights are: keys={"model": ...}'
            )
    tied = {f"model.{a}": f"model.{b}" for a, b in made.aliases.items()}
    made.aliases = {a: b for a, b in tied.items() if b in made.tensors}


def _fitted(
    theirs: Mapping[str, Any], module: nn.Module
) -> tuple[dict[str, Any], dict[str, str]]:
    """Each weight once, under the module's first name for it, and the tied names."""
    held_, aliases, extra = model_tensors(module)
    made = {name: theirs[name] for name in extra if name in theirs}
    faults = [f"{n} is in it and not in model=" for n in theirs]
    faults = [f for f in faults if f.split(" ")[0] not in {*held_, *aliases, *extra}]
    for name, tensor in held_.items():
        group = [name, *(a for a, b in aliases.items() if b == name)]
        there = [n for n in group if n in theirs]
        if not there:
            faults.append(f"{name} is in model= and not in it")
            continue
        made[name] = theirs[there[0]]
        shapes = [list(theirs[n].shape) for n in there if isinstance(theirs[n], Lazy)]
        if any(shape != list(tensor.shape) for shape in shapes) or not shapes:
            came = " and ".join(map(str, shapes)) or "no tensor"
            faults.append(f"{name} is {came} in it and {list(tensor.shape)} in model=")
        elif any(not _equal(made[name], theirs[n]) for n in there[1:]):
            faults.append(f"{' and '.join(there)} are one in model= and differ in it")
    if faults:
        raise CheckpointError(
            "import_state wants the model that was saved, but:\n  "
            + "\n  ".join(faults[:20])
            + "\nWrite the function that made it; or, if that is not the model, where "
            'it is: keys={"model": ...}'
        )
    return made, aliases


def _equal(one: Lazy, other: Lazy) -> bool:
    return torch.equal(one.read(), other.read())


def _optimizers(
    made: Made,
    source: Source,
    optimizers: Sequence[Any],
    module: nn.Module | None,
    bare: Callable[[str], str],
) -> bool:
    """Whether there is an optimizer that was carried over."""
    keys = [f"optim.{i}.{w}" for i in range(len(optimizers) or 1) for w in WORDS]
    if not source.optims or not any(takes(made.only, key) for key in keys):
        for one in source.optims:
            made.takes(keys[0], one.where)
        return False
    if module is None or not optimizers:
        raise CheckpointError(
            f"{source.optims[0].where} holds an optimizer, whose class no file names; "
            "write model= and the function that made it, as for ax.init: "
            "import_state(..., make_model, lambda m: AdamW(m.parameters())); or leave "
            'it out: only="model.**"'
        )
    names = names_of(module)
    tied = model_tensors(module)[1]
    install(
        optimizers,
        names,
        source.optims,
        lambda name: tied.get(bare(name), bare(name)),
        made.stand,
    )
    for i, optimizer in enumerate(optimizers):
        tensors = Made(made.only, [], stands=made.stands)
        each = describe(i, optimizer, names, tensors.keep)
        _on_device(i, optimizer, names, each)
        for key, one in each.items():
            if made.takes(key):
                made.values[key] = one
                inside = {n: t for n, t in tensors.tensors.items() if n.startswith(key)}
                made.tensors |= inside
    return True


def _on_device(
    i: int, optimizer: Any, names: Mapping[int, str], each: Mapping[str, Any]
) -> None:
    """Counters that torch keeps beside the weights; all others are on the CPU."""
    state = each[f"optim.{i}.state"]["state"]
    for group in optimizer.param_groups:
        if group.get("capturable") or group.get("fused"):
            for p in group["params"]:
                counter = state.get(names[id(p)], {}).get("step")
                if isinstance(counter, dict):
                    counter["cpu"] = False


@attrs.frozen
class _Schedule:
    """As with_schedule's slot is saved."""

    base: tuple[Any, ...] = ()
    schedulers: tuple[Any, ...] = ()


def _schedules(made: Made, source: Source, step: int) -> None:
    """Schedulers that moved once an update, as accelx's do; a slot has all or none."""
    moves = {where: _moves(state) for where, state in source.schedules.items()}
    odd = next((where for where, count in moves.items() if count != step), None)
    if odd is not None:
        made.left_out += [
            (
                where,
                f"{odd} was stepped {moves[odd]} times in {step} updates (Accelerate "
                "steps once a process), and with_schedule steps once an update; make "
                "it in updates: with_schedule(function of the step)",
            )
            for where in moves
        ]
        return
    if moves and made.takes(SCHEDULE, ", ".join(moves)):
        slot = _Schedule((), tuple(map(Kept, source.schedules.values())))
        made.values[SCHEDULE] = encode(slot, SCHEDULE, made.keep)


def _moves(state: Mapping[str, Any]) -> int | None:
    """How often a scheduler was stepped; one of several says it by its first."""
    count, inner = state.get("last_epoch"), state.get("_schedulers")
    if count is None and isinstance(inner, list) and isinstance(inner[0], dict):
        return _moves(inner[0])  # type: ignore[reportUnknownArgumentType]
    return count if isinstance(count, int) else None


_SCALER = {"scale", "growth_interval", "_growth_tracker"}


@attrs.frozen
class _LossScale:
    """As the loss scale's slot is saved."""

    scale: float
    good: int
    every: int


def _scaler(made: Made, source: Source) -> None:
    """torch's GradScaler, where it moves by the factor 2, as accelx's loss scale."""
    state = source.scaler
    if not state:
        return
    factors = [state.get(f"{way}_factor") for way in ("growth", "backoff")]
    if factors != [2.0, 0.5] or not state.keys() >= _SCALER:
        why = "accelx's loss scale doubles and halves, and moves by nothing else"
        made.left_out.append(("scaler.pt", why))
    elif made.takes(SCALE, "scaler.pt"):
        good, every = state["_growth_tracker"], state["growth_interval"]
        slot = _LossScale(float(state["scale"]), good, every)
        made.values[SCALE] = encode(slot, SCALE, made.keep)
