"""When a batch is copied to its device: on CUDA one ahead, beside the computing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from accelx import _xla, tree


def on_device(batches: Iterator[Any], device: str) -> Iterator[Any]:
    """`batches` with every tensor on `device`, in containers of the same types.

    CPU: as they are. CUDA: from pinned memory on a stream of its own, the next batch
    under way before one is handed out. XLA: rows divided over the devices. Elsewhere:
    copied when asked for. Anything with
    a `.to` of its own (a PackedSequence, a graph) is moved by that.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return batches
    if kind == "cuda":
        return ahead(batches, *_cuda(device))
    put = _xla.put if kind == "xla" else lambda leaf: leaf.to(device)
    return (_moved(batch, put) for batch in batches)


def ahead(
    batches: Iterator[Any],
    load: Callable[[Any], Any],
    ready: Callable[[Any], None],
) -> Iterator[Any]:
    """Each batch after `load`; the next is loaded before one is made `ready` and given.

    What fetching the next batch raises is raised in its turn, after this one.
    """
    end = object()
    batch = _loaded(batches, load, end)
    while batch is not end:
        ready(batch)
        failed: Exception | None = None
        following = end
        try:
            following = _loaded(batches, load, end)
        except Exception as error:  # raised when its turn comes, after this batch
            failed = error
        yield batch
        if failed is not None:
            raise failed
        batch = following


def _loaded(batches: Iterator[Any], load: Callable[[Any], Any], end: object) -> Any:
    batch = next(batches, end)
    return batch if batch is end else load(batch)


def _cuda(device: str) -> tuple[Callable[[Any], Any], Callable[[Any], None]]:
    side = torch.cuda.Stream(device)

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):  # whose memory record_stream cannot reach
            return leaf.to(device)
        if leaf.device.type == "cpu" and not leaf.is_pinned():
            leaf = leaf.pin_memory()
        with torch.cuda.stream(side):
            return leaf.to(device, non_blocking=True)

    def load(batch: Any) -> Any:
        return _moved(batch, copy)

    def ready(batch: Any) -> None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for leaf in tree.leaves(batch):  # not to be overwritten before it is read
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(current)

    return load, ready


def _moved(batch: Any, move: Callable[[Any], Any]) -> Any:
    def leaf(value: Any) -> Any:
        return move(value) if _moves(value) else value

    return tree.map_leaves(leaf, batch, is_leaf=_moves)


def _moves(value: Any) -> bool:
    return callable(getattr(value, "to", None))
