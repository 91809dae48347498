"""What a comparison may be asked for, refused before a process starts."""

from __future__ import annotations

from collections.abc import Iterable

import torch

AXES = {  # kind: how its ranks are laid out
    "ddp": None,
    "fsdp2": None,
    "hsdp": "replicate=2,shard=-1",
    "tensor": "tensor=-1",  # shard_tensors
    "sequence": "sequence=-1",  # shard_sequence
}
KINDS = tuple(AXES)


def checked(
    ranks: Iterable[int], kinds: Iterable[str], micro: Iterable[int], steps: int
) -> tuple[tuple[int, ...], tuple[str, ...], tuple[int, ...]]:
    """The same as tuples. Raises ValueError for what is no layout."""
    made = tuple(ranks), tuple(kinds), tuple(micro)
    for name, values in (("ranks", made[0]), ("micro", made[2]), ("steps", (steps,))):
        if not values or any(type(v) is not int or v < 1 for v in values):
            shown = values[0] if name == "steps" else values
            raise ValueError(
                f"check_equivalence wants whole numbers of at least 1 for {name}, got "
                f"{shown!r}; write {name}={'3' if name == 'steps' else '(1, 2)'}"
            )
    wrong = [kind for kind in made[1] if kind not in KINDS]
    if wrong or not made[1]:
        raise ValueError(
            f"check_equivalence wants kinds out of {', '.join(map(repr, KINDS))}, got "
            f"{made[1]!r}; write kinds={KINDS[:2]!r}"
        )
    odd = [n for n in made[0] if n > 1 and n % 2]
    if odd and "hsdp" in made[1]:
        raise ValueError(
            "check_equivalence wants an even number of ranks for hsdp, which has two "
            f"copies of the slices, got ranks={made[0]!r}; write ranks=(1, 4)"
        )
    return made


def dtype_of(given: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its name, `float64`. Raises ValueError for none of torch's."""
    if given is None:
        return None
    found: object = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            "check_equivalence wants a floating-point dtype of torch, or None for the "
            f"model's own, got {given!r}; write dtype='float64'"
        )
    return found
