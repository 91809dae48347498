"""What a state holds in memory on this rank, and what its device has in use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from accelx.state import State

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 5  # tensors that are named


@attrs.frozen
class Held:
    """What one part of a state holds on this rank, on one kind of device."""

    # parameters, buffers, gradients, optimizer state, or a slot's name; of DeepSpeed
    # master weights and buckets, too
    what: str
    device: str
    num_tensors: int
    bytes: int  # of storages, each counted once, where it is first met


def held_by(
    state: State,
) -> tuple[tuple[Held, ...], tuple[tuple[str, str, int], ...]]:
    """What each part of a state holds, and the largest tensors: name, device, bytes."""
    return _counted(list(_named(state)))


def _named(state: State) -> Iterator[tuple[str, str, Tensor]]:
    """(part, name, tensor) of all that a state holds, each part after another."""
    from accelx import tree

    model = state.model
    for name, p in model.named_parameters():
        yield "parameters", name, p
    for name, b in model.named_buffers():
        yield "buffers", name, b
    placed = state.slots.get("shard_model")
    more = () if placed is None else tuple(placed.inside())
    yield from more
    names = {id(t): name for _, name, t in more}
    names |= {id(p): name for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if p.grad is not None:
            yield "gradients", f"{name}.grad", p.grad
    for optimizer in state.optimizers:
        for p, kept in optimizer.state.items():
            for path, leaf in tree.flatten(kept):
                if _is_tensor(leaf):
                    yield "optimizer state", f"{names.get(id(p), '?')}{path}", leaf
    for slot, value in state.slots.items():
        for path, leaf in tree.flatten(value):
            if _is_tensor(leaf):
                yield f"slot {slot}", f"{slot}{path}", leaf


def _is_tensor(leaf: object) -> bool:
    """Whether a leaf has numbers: what stages know of one another has shapes alone."""
    from torch import Tensor

    from accelx._torch_stages import is_fake

    return isinstance(leaf, Tensor) and not is_fake(leaf)


def _counted(
    named: list[tuple[str, str, Tensor]],
) -> tuple[tuple[Held, ...], tuple[tuple[str, str, int], ...]]:
    from accelx._torch import is_dtensor, local_of, storage_id

    seen, parts = set[int](), dict[tuple[str, str], list[int]]()
    each = list[tuple[str, str, int]]()
    for part, name, tensor in named:
        here = local_of(tensor) if is_dtensor(tensor) else tensor
        if storage_id(here) in seen:
            continue
        seen.add(storage_id(here))
        device = str(here.device)
        count = 0 if here.is_meta else here.untyped_storage().nbytes()
        parts.setdefault((part, device), []).append(count)
        each.append((name, device, count))
    held = [Held(p, d, len(counts), sum(counts)) for (p, d), counts in parts.items()]
    each.sort(key=lambda one: -one[2])
    return tuple(held), tuple(each[:LARGEST])


def device_use(device: str) -> tuple[int | None, int | None, int | None, int | None]:
    """Allocated, its peak, reserved, capacity; None for a device without counts."""
    import torch

    kind = device.partition(":")[0]
    if kind not in ("cuda", "xpu"):
        return None, None, None, None
    module: Any = torch.get_device_module(kind)
    return (
        module.memory_allocated(device),
        module.max_memory_allocated(device),
        module.memory_reserved(device),
        module.get_device_properties(device).total_memory,
    )


def resident() -> int | None:
    """Bytes of this process in host memory now."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:  # not Linux
        return None
    import resource

    return int(pages) * resource.getpagesize()
