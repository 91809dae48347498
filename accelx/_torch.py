"""Every private or version-dependent name of torch that accelx uses, one function each."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def storage_id(tensor: Tensor) -> int:
    """An identity of the storage under `tensor`, also on the meta device."""
    return tensor.untyped_storage()._cdata


def default_store() -> Any:
    """The store of the open default group."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
