"""What a plan says of each module of a model: read, found by names, or as written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from accelx.engines.tensor_styles import MODULES
from accelx.engines.tensor_words import TRANSFORMERS, words
from accelx.errors import PlacementError
from accelx.match import globs, select

# (modules cut by outputs, the one cut by inputs after them), below one module
MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("fc1",), "fc2"),
    (("up_proj",), "down_proj"),
    (("up",), "down"),
    (("intermediate.dense",), "output.dense"),
)
ATTENTIONS = (  # of transformers, which count the heads that are there
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("self.query", "self.key", "self.value"), "output.dense"),
    (("attention.query", "attention.key", "attention.value"), "output.dense"),
)
BETWEEN = (  # what may stand between two Linears that are cut: it acts on each number
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Mish, nn.ELU, nn.LeakyReLU),
    *(nn.Identity, nn.Hardswish, nn.Softplus, nn.ReLU6, nn.CELU, nn.SELU),
)


def styles(
    model: nn.Module, plan: Any, size: int, dealt: Collection[nn.Module] = ()
) -> dict[str, Any]:
    """The style of each module by name, checked against `size` ranks.

    Modules that are `dealt` out have none, or "partial", if each rank gives them
    positions of its own.
    """
    named = dict(model.named_modules())
    if plan == "auto":
        found = _read(model, dealt) or _found(model)
        _heads(model, size)
    else:
        found = _written(model, plan)
    for name, style in found.items():
        if named[name] in dealt and style != "partial":
            raise PlacementError(
                f"the plan of shard_tensors says {style!r} of {name}, whose experts "
                'shard_experts deals out; leave it out of the plan, or write "partial" '
                "where each rank has positions of its own"
            )
        for word in words(style):
            _fits(name, named[name], word, size)
    return found


def _written(model: nn.Module, plan: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for glob, style in plan:
        try:
            taken = select(model, glob)
        except ValueError as error:
            raise PlacementError(
                str(error).replace("blocks=", "shard_tensors, ")
            ) from None
        for name, _ in taken:
            if name in found and found[name] != style:
                raise PlacementError(
                    f"the plan of shard_tensors says {found[name]!r} and {style!r} of "
                    f"{name}; write globs that take each module once, or join the two:"
                    f' "{found[name]}+{style}"'
                )
            found[name] = style
    return found


def _read(model: nn.Module, dealt: Collection[nn.Module]) -> dict[str, Any]:
    """The plan that a transformers model brings, in our words."""
    told: Mapping[str, str] = getattr(model, "_tp_plan", None) or {}
    own = [n for n, m in model.named_modules() if m not in dealt]
    found: dict[str, Any] = {}
    for glob, word in told.items():
        taken = [n for n in own if globs(glob, n)]
        if word not in TRANSFORMERS and taken:
            raise PlacementError(
                f'shard_tensors(env, "auto") wants styles that it knows, but the plan '
                f"of {type(model).__name__} says {word!r} of {glob}; write a plan of "
                "globs and styles, or ax.shard_experts(env) for experts"
            )
        style = TRANSFORMERS.get(word)
        found |= {n: style for n in taken if style is not None}
    return found | _between(model, found)


def _between(model: nn.Module, found: Mapping[str, Any]) -> dict[str, str]:
    """Activations that learn something, which act on features that were cut."""
    each = [
        n
        for n, m in model.named_modules()
        if next(m.parameters(False), None) is not None
    ]
    acts = [n for n in each if n.endswith(".act_fn")]
    cut = [n for n in acts if found.get(n.replace(".act_fn", ".up_proj")) == "column"]
    return dict.fromkeys(cut, "partial")


def _found(model: nn.Module) -> dict[str, Any]:
    """Pairs of Linears by their usual names; refuses blocks with others in them."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        ours = type(module).__module__.startswith("transformers.")
        for columns, row in (*MLPS, *(ATTENTIONS if ours else ())):
            pair = _pair(name, module, columns, row)
            if pair and not set(pair) & set(found):
                found |= pair
        if isinstance(module, nn.Sequential):
            found |= _in_a_row(name, module)
    left = [
        name
        for name, module in model.named_modules()
        if name not in found and _is_linear(module) and _repeated(name)
    ]
    if left or not found:
        shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if left[8:] else "")
        what = f"does not know {shown}" if left else "knows no pair of Linears"
        raise PlacementError(
            f'shard_tensors(env, "auto") {what} of {type(model).__name__}; write a '
            'plan: {"layers.*.up": "column", "layers.*.down": "row"}, where a Linear '
            "that feeds another's inputs is the column"
        )
    return found


def _pair(
    name: str, module: nn.Module, columns: tuple[str, ...], row: str
) -> dict[str, str]:
    """The styles of one family below `module`, where all of it is there and fits."""
    inside = dict(module.named_modules())
    linears = [inside.get(part) for part in (*columns, row)]
    if not all(isinstance(linear, nn.Linear) for linear in linears):
        return {}
    *first, last = linears
    if first[0].out_features != last.in_features:  # type: ignore[union-attr]
        return {}
    at = f"{name}." if name else ""
    return {at + part: "column" for part in columns} | {at + row: "row"}


def _in_a_row(name: str, module: nn.Sequential) -> dict[str, str]:
    """Two Linears of a Sequential with nothing but activations between them."""
    kinds = list(module.named_children())
    linears = [i for i, (_, m) in enumerate(kinds) if isinstance(m, nn.Linear)]
    if len(linears) != 2:
        return {}
    low, high = linears
    if not all(isinstance(m, BETWEEN) for _, m in kinds[low + 1 : high]):
        return {}
    at = f"{name}." if name else ""
    return {at + kinds[low][0]: "column", at + kinds[high][0]: "row"}


def _is_linear(module: nn.Module) -> bool:
    # Conv1D of transformers is a Linear whose weight lies the other way
    return isinstance(module, nn.Linear | nn.MultiheadAttention) or (
        type(module).__name__ == "Conv1D"
    )


def _repeated(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _fits(name: str, module: nn.Module, style: Any, size: int) -> None:
    """Refuse a style that the module is not made for, or that does not divide."""
    wanted = MODULES.get(style) if isinstance(style, str) else None
    if wanted is None:
        return
    if not isinstance(module, wanted):
        raise PlacementError(
            f"the style {style!r} of shard_tensors is for a {wanted[0].__name__}, but "
            f"{name} is a {type(module).__name__}; name another module, or leave it "
            "whole"
        )
    weight: Any = module.weight
    dim = 1 if style in ("row", "row_scatter", "row_whole") else 0
    if weight.shape[dim] % size:
        raise PlacementError(
            f"shard_tensors cuts {name} along dim {dim} of its weight "
            f"{tuple(weight.shape)} over {size} ranks, which do not divide "
            f"{weight.shape[dim]}; take a number of ranks that does, or leave it whole"
        )


def _heads(model: nn.Module, size: int) -> None:
    """Refuse heads that cannot be dealt out whole."""
    config = getattr(model, "config", None)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            raise PlacementError(
                f"shard_tensors deals out heads to {size} ranks, but {name} of this "
                f"{type(model).__name__} is {heads}; take a number of ranks that "
                f'divides it: connect(axes="...,tensor=2")'
            )
