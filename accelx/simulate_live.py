"""How much memory a pass has in use at a time, storage by storage."""

from __future__ import annotations

import weakref
from typing import Any

from accelx import _torch_simulate


class Live:
    """Bytes in storages that were made and are not gone, and the most at a time.

    `mode` is that of the tensors without numbers: those of others are torch's own.
    """

    def __init__(self, mode: Any) -> None:
        self.mode = mode
        self.now = self.most = 0
        self.sizes = dict[int, tuple[Any, int]]()  # identity -> reference, bytes

    def made(self, func: Any, args: Any, result: Any) -> None:
        """Count what an operation has made."""
        for storage in _torch_simulate.moved(func, args):
            self._gone(_torch_simulate.identity(storage))
        for storage in _torch_simulate.made(func, result, self.mode):
            self.held(storage)

    def held(self, storage: Any) -> None:
        """Count a storage from now on, for as long as it is there."""
        key = _torch_simulate.identity(storage)
        if key not in self.sizes:
            self.sizes[key] = weakref.ref(storage, self._forget(key)), 0
            self.resized(storage)

    def resized(self, storage: Any) -> None:
        """Count a storage that was made here with the size that it has now."""
        key = _torch_simulate.identity(storage)
        if key in self.sizes:
            reference, before = self.sizes[key]
            self.sizes[key] = reference, storage.nbytes()
            self.now += storage.nbytes() - before
            self.most = max(self.most, self.now)

    def _forget(self, key: int) -> Any:
        return lambda _: self._gone(key)

    def _gone(self, key: int) -> None:
        _, size = self.sizes.pop(key, (None, 0))
        self.now -= size
