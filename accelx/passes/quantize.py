"""Frozen weights that are kept in 8 or 4 bits while others are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from accelx.errors import PlacementError
from accelx.match import Selector
from accelx.records import Pass, Rules, Transform, code

if TYPE_CHECKING:
    from torch import nn

    from accelx.engines.packed import Packed

KINDS = ("int8", "int4", "nf4")
PLACED = ("ddp", "fsdp2", "hsdp")  # kinds of shard_model that take packed weights


@attrs.frozen(repr=False)
class Quantize:
    """Spec of quantize."""

    kind: str
    blocks: Any = None

    def __repr__(self) -> str:
        return code("quantize", self)


def quantize(
    kind: str, blocks: Selector | Iterable[Selector] | None = None
) -> Transform:
    """Keep frozen weights of Linears in fewer bits: "int8", "int4" or "nf4".

    Others are trained beside them, low-rank adapters of peft say (QLoRA). "int8" has a
    scale for each row; "int4" (equal steps) and "nf4" (steps for normally distributed
    weights) one for each 64 weights, 4.5 bits in all. A Linear makes the weights that
    it multiplies by, in their dtype of before, in forward and again in backward.

    blocks: a glob over names of modules, a class, or a function (name, module) -> bool;
    the frozen Linears that it takes, and those inside modules that it takes. None: of
    the whole model. Weights that are trained, shared with another module, or of a
    subclass of Linear are left as they are inside a module, and refused where blocks
    takes the Linear itself. `state.slots["quantize"]` says which were packed.

    A packed weight is an int8 Parameter under its old name; object and class stay (L8).
    Under fsdp2 and hsdp it is cut along rows. Every rank makes the model whole, in host
    memory, and packs it, before rank 0's goes to all. Alone, `quantize("nf4")(model)`
    does so for a loop of your own. Not neutral, as weights are rounded; what is trained
    over them is the run of one process over the same (L4). Raises ValueError,
    PlacementError. Dettmers et al. 2023 (arXiv:2305.14314).
    """
    if kind not in KINDS:
        raise ValueError(
            f"quantize wants one of {', '.join(map(repr, KINDS))}, got {kind!r}; write "
            'quantize("nf4")'
        )
    one = blocks is None or isinstance(blocks, str | type) or callable(blocks)
    spec = Quantize(kind, blocks if one else tuple(blocks))  # type: ignore[reportArgumentType]
    return Transform(
        (
            Pass(
                "quantize",
                spec,
                place=lambda state, tx: _placed(spec, state, tx),
                start=_started,
                alone=lambda model: _alone(spec, model),
                rules=RULES,
            ),
        )
    )


RULES = (
    Rules(once=True, why="what is packed cannot be packed again; give all blocks once"),
    Rules(
        excludes=("load_weights",),
        why="weights are read before they are packed: give ax.init a function that "
        "returns load_weights(url)(Net())",
    ),
    Rules(
        excludes=("shard_tensors", "shard_experts", "shard_stages"),
        why="these cut a weight, or know a layer, by its floats",
    ),
)


def _placed(spec: Quantize, state: Any, tx: Transform) -> Any:
    from torch import nn

    from accelx.state import with_slot

    shard = tx.find("shard_model")
    if shard is not None and shard.kind not in PLACED:
        raise PlacementError(
            f"quantize wants shard_model of {', '.join(map(repr, PLACED))}, got "
            f'"{shard.kind}", which keeps weights in a form of its own; write '
            'shard_model(env, "fsdp2")'
        )
    model = state.model if isinstance(state.model, nn.Module) else state.model()
    state = attrs.evolve(state, model=model)
    return with_slot(state, "quantize", _packed(spec, model))


def _started(state: Any, tx: Transform) -> Any:
    from accelx.engines.forwards import carried

    return carried(state)


def _alone(spec: Quantize, model: Any) -> Any:
    _packed(spec, model)
    return model


def _packed(spec: Quantize, model: Any) -> Packed:
    """Pack in place; what was done."""
    from torch import nn

    from accelx.engines.packed import packing

    if not isinstance(model, nn.Module):
        raise TypeError(
            f"quantize(kind)(module) wants a torch.nn.Module, got "
            f"{type(model).__name__}; put it into a chain for ax.init, or write "
            f"{spec!r}(Net(...))"
        )
    return packing(model, _names(spec, model), spec.kind)


def _names(spec: Quantize, model: nn.Module) -> list[str]:
    """The Linears that are packed. Raises PlacementError where one cannot be."""
    from torch import nn

    from accelx.match import select

    modules = dict(model.named_modules())
    given = [("", model)] if spec.blocks is None else select(model, spec.blocks)
    shared = _shared(model)
    inside: dict[str, str | None] = {}  # name of a Linear, why it stays as it is
    for at, _ in given:
        for name, module in modules.items():
            within = not at or name == at or name.startswith(f"{at}.")
            if within and name and isinstance(module, nn.Linear):
                inside[name] = _why_not(module, shared)
    named = {name for name, _ in given}
    refused = {n: why for n, why in inside.items() if why and n in named}
    taken = [name for name in modules if inside.get(name, "") is None]
    if refused or not taken:
        raise _refusal(spec, refused or inside, type(model).__name__)
    return taken


def _shared(model: nn.Module) -> set[int]:
    """ids of weights that have more than one name."""
    seen: set[int] = set()
    named = model.named_parameters(remove_duplicate=False)
    return {id(p) for _, p in named if id(p) in seen or seen.add(id(p))}


def _why_not(module: Any, shared: set[int]) -> str | None:
    """Why the weight of a Linear stays as it is; None where it can be packed."""
    from torch import nn

    weight = module.weight
    if weight.requires_grad:
        return "is trained"
    if type(module) is not nn.Linear:
        return f"is of {type(module).__name__}, which may compute otherwise"
    if id(weight) in shared:
        return "is shared with another module"
    if weight.is_meta:
        return "is on the meta device, without numbers"
    return None if weight.is_floating_point() else f"is {weight.dtype} already"


def _refusal(
    spec: Quantize, left: Mapping[str, str | None], owner: str
) -> PlacementError:
    shown = [f"{name}.weight {why}" for name, why in left.items()]
    came = "; ".join(shown[:5]) + (f" and {len(shown) - 5} more" if shown[5:] else "")
    return PlacementError(
        f"quantize({spec.kind!r}) wants frozen weights of torch.nn.Linear, but in this "
        f"{owner} {came or 'is no Linear that blocks takes'}; freeze them "
        "(weight.requires_grad_(False), or by peft.get_peft_model), or leave them out: "
        'blocks="layers.*"'
    )
