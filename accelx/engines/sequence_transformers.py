"""Positions and masks of models of transformers, which make their own by default."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor, nn

from accelx.engines.forwards import wrap
from accelx.engines.sequence import Site
from accelx.engines.sequence_attention import LOOKING_BACK, NO_MASK, repeated
from accelx.errors import LossError, PlacementError


def prepare(model: nn.Module, site: Site) -> None:
    """Complete each call of a model of transformers in `model`, while a step runs.

    Raises PlacementError for those whose numbers would depend on the cut.
    """
    library = sys.modules.get("transformers")
    if library is None:
        return
    inner: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, library.PreTrainedModel) and module not in inner:
            inner |= set(module.modules())
            _supported(module)
            around = _completing(site, _looks_back(module), _groups(module))
            only = None if module is model else lambda _, m, own=module: m is own
            wrap(model, only, "shard_sequence of transformers", around)


def _completing(site: Site, causal: bool, groups: int) -> Any:
    def around(inner: Any) -> Any:
        names = inspect.signature(inner)

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if site.here is None:
                return inner(self, *args, **kwargs)
            bound = names.bind_partial(self, *args, **kwargs)
            given, kind = bound.arguments, type(self).__name__
            tokens = _tokens(kind, site.here, given)
            _place(kind, site, tokens, given)
            _mask(causal, groups, tokens, given)
            return inner(*bound.args, **bound.kwargs)

        return forward

    return around


def _tokens(kind: str, here: int, given: dict[str, Any]) -> Tensor:
    """What the model is called with; refuses what is not this rank's tokens."""
    if given.get("labels") is not None:
        raise LossError(
            f"{kind}(labels=...) shifts labels and takes their mean within one rank's "
            "tokens; take its logits, and write ax.Mean over cross_entropy(..., "
            "reduction='sum') with labels that were shifted where batches are made"
        )
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor) or tokens.size(1) != here:
        got = None if tokens is None else tuple(tokens.shape)
        raise LossError(
            f"{kind} wants this rank's {here} tokens of each row, got {got}; give it "
            "the tokens of the batch as they come"
        )
    return tokens


def _place(kind: str, site: Site, tokens: Tensor, given: dict[str, Any]) -> None:
    """Positions in the whole sequence, where the call has none of its own."""
    own, length = given.get("position_ids"), tokens.size(1) * site.layout.world
    places = site.layout.positions(length, tokens.device)[None]
    if own is None:
        given["position_ids"] = places
    elif given.get("attention_mask") is None and not bool((own == places).all()):
        raise LossError(
            f"{kind} would take position_ids that do not count from 0 on for packed "
            "texts, which it tells apart within one rank's tokens; give it a mask, "
            "such as attention_mask=ax.block_mask(document_ids), made where batches are"
        )


def _mask(causal: bool, groups: int, tokens: Tensor, given: dict[str, Any]) -> None:
    """A mask of keys, which the model hands on, in place of one that it would make."""
    mask = given.get("attention_mask")
    if mask is None and causal:
        # without it, positions with a gap are taken for several packed texts
        mask = tokens.new_zeros((1, 1, 1, 1), dtype=NO_MASK)
    elif mask is not None and mask.dim() == 2:
        mask = mask.bool()[:, None, None]
        mask = mask.to(LOOKING_BACK) if causal else mask
    if mask is not None:
        given["attention_mask"] = repeated(mask, groups)


def _groups(module: nn.Module) -> int:
    """How often each head of keys is repeated for those of queries, under a mask."""
    told = {getattr(m, "num_key_value_groups", 0) for m in module.modules()} - {0}
    return told.pop() if len(told) == 1 else 1


def _looks_back(module: Any) -> bool:
    """Whether tokens attend to earlier ones alone, in every layer."""
    told = {m.is_causal for m in module.modules() if hasattr(m, "is_causal")}
    if len(told) != 1:
        raise PlacementError(
            f"shard_sequence wants to know whether {type(module).__name__} looks back "
            f"alone, but its layers say is_causal={sorted(told) or 'nothing'}; give it "
            "a mask (rows, length, length) from a model of your own"
        )
    return bool(told.pop())


def _supported(module: Any) -> None:
    for found, why in _reasons(module, module.config.get_text_config()):
        if found:
            raise PlacementError(
                f"shard_sequence wants {type(module).__name__} to compute the same on "
                f"one rank and on several, but {why}"
            )


def _reasons(module: Any, config: Any) -> list[tuple[bool, str]]:
    """What each rank would compute from its own tokens alone, and what to do."""
    chosen = getattr(config, "_attn_implementation", None)
    layers = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    rope: Any = getattr(config, "rope_parameters", None) or {}
    each = [v for v in rope.values() if isinstance(v, dict)] or [rope]
    ropes = {one.get("rope_type", "default") for one in each}
    places = [m for n, m in module.named_modules() if n.endswith("position_embeddings")]
    offset = any(getattr(m, "padding_idx", None) is not None for m in places)
    text = module.config.get_text_config() is module.config
    return [
        (
            "position_ids" not in inspect.signature(module.forward).parameters,
            "its forward takes no position_ids; use a model that does",
        ),
        (
            chosen != "sdpa",
            f"its attention is {chosen!r}; write attn_implementation='sdpa'",
        ),
        (
            bool(layers - {"full_attention"}) or (not layers and window is not None),
            f"its layers {sorted(layers)} look through a window ({window}); set "
            "sliding_window=None in its config, or give ranks rows: axes='data=-1'",
        ),
        (
            bool(ropes & {"dynamic", "longrope"}),
            f"its rotary positions ({', '.join(sorted(ropes))}) follow the longest "
            "position that a rank sees; use another rope_type",
        ),
        (
            offset,
            "its positions begin behind padding_idx, counted from its own tokens; "
            "use a model with plain positions",
        ),
        (
            bool(getattr(config, "is_encoder_decoder", False)) or not text,
            "its inputs are of several kinds; give ranks rows: axes='data=-1'",
        ),
    ]
