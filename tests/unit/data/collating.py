"""What a program can see of a batch, or of how making it failed: to compare."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def facts(value):
    """Everything about a batch that a program can see, to compare."""
    if isinstance(value, Tensor):
        odd = value.layout is not torch.strided or value.is_nested
        memory = () if odd else (value.stride(), value.storage_offset())
        bits = str(value) if odd else value.detach().resolve_conj().contiguous()
        if not odd:
            bits = bits.view(-1).view(torch.uint8).tolist() if bits.numel() else []
        flags = value.requires_grad, value.device.type, value.is_conj()
        return type(value), value.dtype, tuple(value.shape), memory, flags, bits
    if isinstance(value, dict):
        return type(value), [(key, facts(inner)) for key, inner in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [facts(inner) for inner in value]
    return type(value), repr(value)


def outcome(collate, batch):
    """What collating gives, or how it fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # arrays that torch may not write to
            return facts(collate(batch))
    except Exception as error:
        return type(error), str(error)
