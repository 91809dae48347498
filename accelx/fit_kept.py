"""A state as it was: what a trial of its forward and backward pass leaves behind."""

from __future__ import annotations

import random
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from accelx.engines.placed import engine_of
from accelx.fit_memory import module_of
from accelx.records import Transform
from accelx.state import State


@contextmanager
def kept(state: State, tx: Transform, device: str) -> Generator[None]:
    """Whatever runs inside, `state` and random generators are afterwards as they were.

    Buffers are copied, and where a pass of the user's wraps the backward pass, which
    may move weights on its way, weights too (to the CPU). Gradients are dropped: there
    may be none before. Python's, NumPy's and torch's global generators go back, those
    of `device` included. What the state does not know of is not looked at: a generator
    of the user's own, an attribute of a module that is no tensor.
    """
    modules = list(state.model.modules())
    modes = [m.training for m in modules]
    buffers = [
        (m, name, b, b.detach().clone() if _writable(b) else None)
        for m in modules
        for name, b in m.named_buffers(recurse=False)
    ]
    wrapped = any(one.backward is not None for one in tx)
    weights = [(p, _local(p).cpu().clone()) for _, p in state.trained if wrapped]
    handle = getattr(state.slots.get("shard_model"), "handle", None)
    called = getattr(handle, "called", None)
    try:
        with _same_draws(device):
            yield
    finally:
        forget(state)
        if called is not None:
            handle.called = called  # type: ignore[reportOptionalMemberAccess]
        for module, training in zip(modules, modes, strict=True):
            module.training = training
        with torch.no_grad():
            for module, name, buffer, copy in buffers:
                if copy is not None:
                    buffer.copy_(copy)
                setattr(module, name, buffer)
            for p, copy in weights:
                _local(p).copy_(copy)


def forget(state: State) -> None:
    """Drop gradients, and what a backward pass that was broken off has left."""
    for p in state.model.parameters():
        p.grad = None
    placed = state.slots.get("shard_model")
    if placed is not None:
        placed.forget()
        placed.rest()
        if placed.stages is not None:  # memory for what crosses in a trial
            placed.stages.routes.clear()
    carry = engine_of(state).carry
    leaf = None if carry is None else carry(state)
    if leaf is not None:
        leaf.grad = None


def unmade(state: State, count: int) -> list[Tensor]:
    """`count` tensors like each weight that its optimizer has nothing for as yet."""
    return [
        torch.ones_like(_local(p))  # and not empty: a CPU gives pages when written
        for optimizer in state.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad and not optimizer.state.get(p)
        for _ in range(count)
    ]


def _writable(buffer: Tensor) -> bool:
    """Whether each element has memory of its own: others cannot be changed in place."""
    steps = zip(buffer.stride(), buffer.shape, strict=True)
    return all(step or size < 2 for step, size in steps)


def _local(p: Any) -> Tensor:
    """This rank's slice of a sharded weight; any other as it is."""
    p = p.detach()
    return p.to_local() if hasattr(p, "to_local") else p


@contextmanager
def _same_draws(device: str) -> Generator[None]:
    """The global generators go on afterwards from where they stand now."""
    numpy, found = sys.modules.get("numpy"), module_of(device)
    python, cpu = random.getstate(), torch.get_rng_state()
    drawn = numpy.random.get_state() if numpy else None
    there = found.get_rng_state() if hasattr(found, "get_rng_state") else None
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if numpy:
            numpy.random.set_state(drawn)
        if there is not None:
            found.set_rng_state(there)
