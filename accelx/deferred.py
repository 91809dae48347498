"""How a model is built without ever holding all its weights, to the bit.

The factory runs for real, while each operation on tensors is written down together with
the random state that it started from. When more than `budget` bytes are held, the
oldest weights let go of their data; it is made again, from its own operations, when it
is needed. So a weight can be had alone, in any order, with the numbers of calling the
factory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import attrs
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from accelx import _torch

Key = int  # identity of a storage
BUDGET = 256 << 20  # bytes held while building: a few weights of a large model


@attrs.frozen
class _Ref:
    """A tensor as a view of a recorded storage."""

    key: Key
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@attrs.frozen
class _Op:
    """One recorded operation on data."""

    func: Any
    args: Any  # tensors stand as _Ref
    kwargs: Any
    outs: tuple[_Ref, ...]
    random: Tensor | None  # state of the generator before it
    fills: Key | None  # the storage that it covers whole without reading it


class Recorder(_torch.DispatchMode):
    """Runs what is called inside it, writes it down, holds at most `budget` bytes."""

    def __init__(self, budget: int = BUDGET) -> None:
        super().__init__()
        self.budget = budget
        self._ops: list[_Op] = []
        self._writes: dict[Key, list[int]] = {}  # operations that wrote each storage
        self._storages: dict[Key, torch.UntypedStorage] = {}
        self._sizes: dict[Key, int] = {}  # bytes
        self._kept: set[Key] = (
            set()
        )  # made from data from outside: cannot be made again
        self._held: dict[Key, None] = {}  # may be let go, oldest use first
        self._seen: dict[int, ref[Tensor]] = {}  # what operations returned

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((args, kwargs)))
        for tensor in inputs:
            self._restore(_key(tensor))
        random = _random_state(func, kwargs)
        out = func(*args, **kwargs)
        outs = list(_tensors(out))
        self._seen.update((id(t), ref(t)) for t in outs)
        before = {_key(t) for t in inputs}
        if _torch.mutates(func) or any(_key(t) not in before for t in outs):
            self._record(func, args, kwargs, inputs, outs, random)
        self._let_go()
        return out

    def _record(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        inputs: list[Tensor],
        outs: list[Tensor],
        random: Tensor | None,
    ) -> None:
        unknown = any(
            _key(t) not in self._storages or _key(t) in self._kept for t in inputs
        )
        written = {_key(t): t for t in (*_torch.written(func, args, kwargs), *outs)}
        if unknown or (random is None and _seeded(func)):
            self._kept |= written.keys()
        for key, tensor in written.items():
            self._storages.setdefault(key, tensor.untyped_storage())
            self._sizes[key] = tensor.untyped_storage().nbytes()
            self._writes.setdefault(key, []).append(len(self._ops))
        refs = tuple(_ref(t) for t in outs)
        fills = _filled(func, outs)
        self._ops.append(
            _Op(
                func,
                _map(_described, args),
                _map(_described, kwargs),
                refs,
                random,
                fills,
            )
        )
        for key in (*map(_key, inputs), *written):
            self._held.pop(key, None)
            if key in self._storages and key not in self._kept:
                self._held[key] = None

    def _let_go(self) -> None:
        """Empty the oldest storages until the budget holds; the newest always stays."""
        while len(self._held) > 1 and sum(map(self._sizes.__getitem__, self._held)) > (
            self.budget
        ):
            oldest = next(iter(self._held))
            del self._held[oldest]
            self._storages[oldest].resize_(0)

    def _restore(self, key: Key) -> None:
        storage = self._storages.get(key)
        if storage is None or storage.nbytes() == self._sizes[key]:
            return
        data = self._made(key)
        storage.resize_(self._sizes[key])
        storage.copy_(data)
        self._held[key] = None

    def keep(self, tensor: Tensor) -> None:
        """Let `tensor` have its data for good: it may be read or written unseen."""
        key = _key(tensor.detach())  # an operation, so the data is there after it
        self._held.pop(key, None)
        self._kept.add(key)

    def settle(self, model: nn.Module) -> None:
        """Give data back to tensors outside the model's weights, as in attributes."""
        weights = {id(t) for t in (*model.parameters(), *model.buffers())}
        for weak in self._seen.values():
            tensor = weak()
            if tensor is not None and id(tensor) not in weights:
                self._restore(_key(tensor))
        self._seen.clear()

    def full(self, tensor: Tensor) -> Tensor:
        """`tensor` with its data: itself, or made again into new memory."""
        key = _key(tensor)
        storage = self._storages.get(key)
        if storage is None or storage.nbytes() == self._sizes[key]:
            return tensor.detach()
        return _view(_ref(tensor), self._made(key))

    def _made(self, key: Key) -> torch.UntypedStorage:
        """The data of a storage, from the operations that it takes and no others."""
        live: dict[Key, torch.UntypedStorage] = {}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for i in sorted(self._needed(key)):
                self._redo(self._ops[i], live)
        return live[key]

    def _needed(self, key: Key) -> set[int]:
        found: set[int] = set()
        ask = [(key, len(self._ops))]
        while ask:
            key, end = ask.pop()
            for i in reversed(self._writes.get(key, [])):
                if i >= end:
                    continue
                if i not in found:
                    found.add(i)
                    op = self._ops[i]
                    ask += [(r.key, i) for r in _refs((op.args, op.kwargs))]
                if self._ops[i].fills == key:
                    break
        return found

    def _redo(self, op: _Op, live: dict[Key, torch.UntypedStorage]) -> None:
        def real(leaf: Any) -> Any:
            if not isinstance(leaf, _Ref):
                return leaf
            if leaf.key not in live:  # about to be filled whole
                live[leaf.key] = torch.UntypedStorage(self._sizes[leaf.key])
            return _view(leaf, live[leaf.key])

        if op.random is not None:
            torch.set_rng_state(op.random)
        out = op.func(*_map(real, op.args), **_map(real, op.kwargs))
        for made, tensor in zip(op.outs, _tensors(out), strict=True):
            live.setdefault(made.key, tensor.untyped_storage())


_READS = (
    Tensor.numpy,
    Tensor.__array__,
    Tensor.tolist,
    Tensor.data_ptr,
    Tensor.__dlpack__,
)


class _Unseen(TorchFunctionMode):
    """Keeps the data of tensors that are read past the dispatcher, as NumPy does."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _READS:
            self.recorder.keep(args[0])
        return func(*args, **(kwargs or {}))


def build(
    factory: Callable[[], nn.Module], budget: int = BUDGET
) -> tuple[nn.Module, Recorder]:
    """Call `factory` holding at most about `budget` bytes: the module, and its maker.

    The module's weights may be empty: `recorder.full(weight)` has the data.
    """
    recorder = Recorder(budget)
    with _Unseen(recorder), recorder:
        model = factory()
    recorder.settle(model)
    return model, recorder


_FILLS = ("normal_", "uniform_", "fill_", "zero_", "bernoulli_", "copy_")


def _filled(func: Any, outs: list[Tensor]) -> Key | None:
    """The storage that an in-place fill covers whole, so older data is not needed."""
    if len(outs) != 1 or _torch.name_of(func) not in _FILLS:
        return None
    whole = outs[0].numel() * outs[0].element_size()
    return _key(outs[0]) if whole == outs[0].untyped_storage().nbytes() else None


def _seeded(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _random_state(func: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """State of the CPU's own generator before a random operation that draws from it."""
    if not _seeded(func) or kwargs.get("generator") is not None:
        return None
    return torch.get_rng_state()


def _key(tensor: Tensor) -> Key:
    return _torch.storage_id(tensor)


def _ref(tensor: Tensor) -> _Ref:
    size, stride = tuple(tensor.shape), tensor.stride()
    return _Ref(_key(tensor), size, stride, int(tensor.storage_offset()), tensor.dtype)


def _described(leaf: Any) -> Any:
    return _ref(leaf) if isinstance(leaf, Tensor) else leaf


def _view(ref: _Ref, storage: torch.UntypedStorage) -> Tensor:
    empty = torch.empty(0, dtype=ref.dtype, device=storage.device)
    return empty.set_(storage, ref.offset, ref.size, ref.stride)  # type: ignore[reportArgumentType]


def _map(fn: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return type(tree)(_map(fn, x) for x in tree)  # type: ignore[reportUnknownVariableType]
    if isinstance(tree, dict):
        return {k: _map(fn, x) for k, x in tree.items()}  # type: ignore[reportUnknownVariableType]
    return fn(tree)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, list | tuple):
        for x in tree:  # type: ignore[reportUnknownVariableType]
            yield from _leaves(x)
    elif isinstance(tree, dict):
        yield from _leaves(list(tree.values()))  # type: ignore[reportUnknownArgumentType]
    else:
        yield tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in _leaves(tree) if isinstance(x, Tensor))


def _refs(tree: Any) -> Iterator[_Ref]:
    return (x for x in _leaves(tree) if isinstance(x, _Ref))
