"""A sampler as it was given, for one walk: what it changes of itself, a copy changes.

A sampler that shuffles a list of its own in place would else begin its next epoch where
the last one ended, and a run that is gone on with where none did.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from typing import Any

import attrs
import torch
from torch.utils.data import Sampler

from accelx.errors import DataError

_PLAIN = {int, float, bool, str, bytes, type(None)}


def afresh(sampler: Any, start: int, epoch: int, dataset: Any = None) -> Any:
    """A copy of `sampler`, and of samplers inside it: the user's are not moved.

    So are lists, dicts, sets, arrays and tensors that it holds; generators, by whatever
    name, start from `start`; it is told `epoch`. What `dataset` holds as well is not
    copied, and neither are other objects. Raises DataError for an iterator.
    """
    shared = [dataset, *_fields(dataset).values()]
    return _Made(start, epoch, {id(one): one for one in shared}).sampler(sampler)


@attrs.define(eq=False)
class _Made:
    """Copies so far, by the id of what they are of: two names of one list stay so."""

    start: int
    epoch: int
    copies: dict[int, Any]

    def sampler(self, given: Any) -> Any:
        """A copy that is told the epoch."""
        try:
            own = self.copies[id(given)] = copy.copy(given)
        except TypeError as error:
            raise DataError(
                f"a sampler must be one that can be gone through again, got a "
                f"{type(given).__name__} ({error}); give a list, or an object whose "
                "__iter__ begins anew"
            ) from None
        for name, value in _fields(own).items():
            if name == "generator" and value is None:
                made: Any = torch.Generator().manual_seed(self.start)
            else:
                made = self.of(value)
            object.__setattr__(own, name, made)  # also where it is frozen
        listen = getattr(own, "set_epoch", None)
        if callable(listen):
            listen(self.epoch)
        elif isinstance(_fields(own).get("epoch"), int):
            object.__setattr__(own, "epoch", self.epoch)  # that it counts by itself
        return own

    def of(self, value: Any) -> Any:
        """What stands in the copy where a sampler holds `value`."""
        if id(value) not in self.copies:
            self.copies[id(value)] = self._copied(value)
        return self.copies[id(value)]

    def _copied(self, value: Any) -> Any:
        if isinstance(value, Sampler) or _iterates(value):
            return self.sampler(value)
        if isinstance(value, (list, dict, deque, set, bytearray)):
            return self._container(value)
        if type(value) is tuple:
            return tuple(map(self.of, value))  # type: ignore[reportUnknownArgumentType]
        if type(value) is torch.Tensor:
            return value.detach().clone()
        if isinstance(value, getattr(sys.modules.get("numpy"), "ndarray", ())):
            return value.copy()
        started = _started(value, self.start)
        return value if started is None else started

    def _container(self, value: Any) -> Any:
        own = self.copies[id(value)] = copy.copy(value)
        if isinstance(value, dict):
            own.update((name, self.of(one)) for name, one in value.items())  # type: ignore[reportUnknownVariableType]
        elif isinstance(value, (list, deque)) and not set(map(type, value)) <= _PLAIN:  # type: ignore[reportUnknownArgumentType]
            for i, one in enumerate(value):  # type: ignore[reportUnknownArgumentType]
                own[i] = self.of(one)
        return own


def _iterates(value: Any) -> bool:
    """Whether it is like a sampler: an object that begins anew, and no dataset."""
    kind = type(value)
    once = hasattr(kind, "__next__") or hasattr(kind, "__getitem__")
    return hasattr(value, "__dict__") and hasattr(kind, "__iter__") and not once


def _fields(one: Any) -> dict[str, Any]:
    """The attributes of an object, those in slots as well."""
    slots = (getattr(kind, "__slots__", ()) for kind in type(one).__mro__)
    each = ((s,) if isinstance(s, str) else s for s in slots)
    names = [name for some in each for name in some if not name.startswith("__")]
    held = {name: getattr(one, name) for name in names if hasattr(one, name)}
    return {**held, **getattr(one, "__dict__", {})}


def _started(value: Any, start: int) -> Any:
    """A generator of the same kind that starts from `start`; None for other values."""
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).manual_seed(start)
    if type(value) is random.Random:
        return random.Random(start)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return numpy.random.Generator(type(value.bit_generator)(start))
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return numpy.random.RandomState(start % 2**32)
    return None
