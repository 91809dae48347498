"""Whether a batch has the rows that were read for it: collate_fn is the user's own."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from accelx import tree
from accelx.errors import NeutralityWarning
from accelx.rows import Rows, leading


def odd(batch: Any, record: Rows, step: int) -> bool:
    """Whether a batch has other rows than were read for it; warns of that."""
    length = leading(batch)
    if length is None or length == record.rows or record.padded:
        return False
    expected = max(1, record.rows)

    def listed(node: Any) -> bool:
        return isinstance(node, list) and len(node) == expected  # type: ignore[reportUnknownArgumentType]

    for _, leaf in tree.flatten(batch, listed):
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.size(0) == expected:
            return False
        if listed(leaf):
            return False
    warnings.warn(
        f"{expected} items were read for the batch of step {step}, but its "
        f"first tensor has {length}. If collate_fn leaves items out, ranks weigh "
        "rows wrongly: leave them out by a Subset or a sampler. If rows are not the "
        "first dimension, or are joined into one, return an ax.Mean from the loss",
        NeutralityWarning,
        stacklevel=3,
    )
    return True
