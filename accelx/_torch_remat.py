"""What torch has of its own for blocks that keep some results and compute the rest."""

# Private names are what this file is for.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


def keeping_contexts(keeps: Callable[[Any], bool]) -> tuple[Any, Any]:
    """Contexts of a forward pass, and of the same again, that keep some results.

    torch's own, which want each operator as often again (2.13); but where slices are
    gathered inside of a block, the second pass has others.
    """
    from torch.utils.checkpoint import (
        CheckpointPolicy,
        create_selective_checkpoint_contexts as contexts,
    )

    def chosen(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept, again = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
        return kept if keeps(op) else again

    first, again = contexts(chosen)
    if torch.compiler.is_compiling():
        return first, again
    mutable = again.allow_cache_entry_mutation  # which torch 2.9 wants said
    return first, _passing()(keeps, chosen, again.storage, mutable)


@cache
def _passing() -> Any:
    """The second of torch's contexts, which is asked for what is kept alone."""
    from torch.utils.checkpoint import _CachedTorchDispatchMode

    class Passing(_CachedTorchDispatchMode):
        def __init__(self, keeps: Callable[[Any], bool], *args: Any) -> None:
            super().__init__(*args)
            self.keeps = keeps

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if not self.keeps(func):
                return func(*args, **(kwargs or {}))
            try:
                return super().__torch_dispatch__(func, types, args, kwargs)
            except RuntimeError as error:
                if "has been mutated" in str(error):
                    error.add_note(
                        f"remat keeps the results of {func}, and this block writes to "
                        'one in place, as nn.LSTM does; write remat(blocks, "full")'
                    )
                raise

    return Passing
