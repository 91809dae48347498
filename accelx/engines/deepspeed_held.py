"""What DeepSpeed holds in memory of a model, beside what torch's own objects show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from accelx import tree
from accelx.engines.deepspeed_step import Seat, masters

Named = Iterator[tuple[str, str, Tensor]]  # part, name, tensor

# Attributes of its optimizers; each stage has some of them.
_OF = {
    "gradients": (
        "averaged_gradients",
        "grad_partitions_flat_buffer",
        "accumulated_grads_in_cpu",
        "offload_gradient_dict",
    ),
    "buckets": (
        "ipg_buckets",
        "temp_grad_buffer_for_cpu_offload",
        "temp_grad_buffer_for_gpu_offload",
        "param_buffer_of_bit16_for_cpu_offload_groups",
    ),
}


def held(seat: Seat, model: Any) -> Named:
    """Slices of weights, masters that are updated, gradients, and what is sent from."""
    if seat.cut:
        for name, p in model.named_parameters():
            yield "parameters", f"slices, from {name} on", p.ds_tensor
    if seat.engine is None or not seat.stage:
        return
    for i, master in enumerate(masters(seat)):
        yield "master weights", f"slice {i}", master
    for i, master in enumerate(masters(seat)):
        if master.grad is not None:
            yield "gradients", f"slice {i}.grad", master.grad
    for part, names in _OF.items():
        for name in names:
            for path, leaf in tree.flatten(getattr(seat.zero, name, None)):
                if isinstance(leaf, Tensor):
                    yield part, f"{name}{path}", leaf
