"""How weights leave for other programs: safetensors files that transformers reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

import torch

from accelx import storage
from accelx.errors import CheckpointError
from accelx.match import Selector
from accelx.records import Env, check_env
from accelx.saves import shards
from accelx.saves.boxes import rows, strides, whole
from accelx.saves.commit import COMMIT, step_of
from accelx.saves.load import takes
from accelx.saves.memory import flat, host, view
from accelx.saves.read import BLOCK, Read, Want
from accelx.saves.shards import Item, Shard
from accelx.saves.source import SHARDS, Source, opened, reading
from accelx.saves.stream import held_weights, packed_in, packed_of, streamed
from accelx.saves.together import alike
from accelx.saves.weights import FLOATS
from accelx.state import State, check_state
from accelx.storage import Store

Only = Selector | tuple[Selector, ...] | None
Blocks = Callable[[Item], Iterable[torch.Tensor]]  # an item's elements, in order


def export(
    source: str | os.PathLike[str] | tuple[Env, State],
    out: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    only: Only = None,
) -> str:
    """Write weights as safetensors files that transformers' `from_pretrained` reads.

    `source` is a URL, as `load_weights` takes: of a checkpoint, say, of any number of
    ranks; it is read by the one process that calls, without a process group, in memory
    of about 32 MiB and the largest row. Or it is (env, state), a run under way: a
    collective, in which rank 0 writes and one weight is whole at a time; the state is
    not spent.

    `out` is the URL of a folder without weights. It gets model.safetensors, or
    model-00001-of-00003.safetensors and its like with model.safetensors.index.json, of
    at most `max_shard_size`: bytes, or a text such as "5GB". Of tied weights the first
    name is stored. dtype: what floating-point weights become, such as "bf16". only:
    globs over names, or a function (name, None) -> bool. Returns `out`'s URL; what else
    a model needs, such as config.json, is the caller's to write.

    Raises CheckpointError before anything is written if weights are in the way, or
    are not in the checkpoint; nothing is left of an export that failed.
    """
    wanted, limit = _dtype(dtype), shards.size_of(max_shard_size)
    folder = storage.at(out)
    if isinstance(source, tuple):
        _from_state(*source, folder, wanted, limit, only)
    else:
        _from_store(opened(source), folder, wanted, limit, only)
    return folder.url


def _dtype(wanted: str | torch.dtype | None) -> str | None:
    """torch's name for what floats become."""
    from accelx.dtypes import NAMES

    known = {**{n: n for n in FLOATS}, **{k: _named(d) for k, d in NAMES.items()}}
    name = _named(wanted)
    if wanted is None or name in known:
        return None if wanted is None else known[name]
    raise ValueError(
        f"export(dtype=...) wants one of {', '.join(map(repr, NAMES))}, got "
        f'{wanted!r}; write dtype="bf16"'
    )


def _named(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _items(
    held: Iterable[tuple[str, str, tuple[int, ...]]], wanted: str | None, only: Only
) -> list[Item]:
    """What is written of (name, dtype, shape), in order. Raises if it is nothing."""
    items = [
        Item(name, wanted if wanted and dtype in FLOATS else dtype, shape)
        for name, dtype, shape in held
        if takes(only, name)
    ]
    if not items:
        raise CheckpointError(
            f"export wants at least one weight, but only={only!r} takes none; write a "
            "glob over names, such as only='layers.**'"
        )
    return shards.ordered(items)


def _floats(packed: Iterable[str], only: Only) -> None:
    """Refuse weights in a form that no other program reads."""
    taken = [name for name in packed if takes(only, name)]
    if taken:
        raise CheckpointError(
            f"export wants weights that other programs read, but {len(taken)} are "
            f"packed by quantize: {', '.join(taken[:5])}; leave them out, by only=... "
            "with the names of what was trained"
        )


def _from_store(
    source: Source, out: Store, wanted: str | None, limit: int, only: Only
) -> None:
    _floats(packed_in(source.manifest.values), only)
    absent = [name for name in source.manifest.base if takes(only, name)]
    if absent:
        raise CheckpointError(
            f"export wants all weights, but {source.store.url} was saved on top of "
            f"{len(absent)} that it does not hold: {', '.join(absent[:5])}; load both "
            "and write export((env, state), out), or leave them out: only=..."
        )
    firsts: dict[str, str] = {}
    for name, key in source.names.items():
        firsts.setdefault(key, name)
    entries = ((n, source.entry(n)) for n in firsts.values())
    items = _items(((n, e.dtype, e.shape) for n, e in entries), wanted, only)
    cut = shards.cut(items, limit)
    _free(out)
    with reading(source) as read:
        _write(out, cut, lambda item: _stored(source, read, item))


def _stored(source: Source, read: Read, item: Item) -> Iterator[torch.Tensor]:
    """A tensor's rows as they are stored, about BLOCK bytes at a time."""
    if not item.size:
        return
    entry = source.entry(item.name)
    row = strides(entry.shape)[0] * entry.width if entry.shape else BLOCK
    for box in rows(whole(entry.shape), BLOCK // row):
        block = torch.empty(box.shape, dtype=getattr(torch, entry.dtype), device="cpu")
        read([Want(source.names[item.name], box, block)])
        yield block


def _from_state(
    env: Env, state: State, out: Store, wanted: str | None, limit: int, only: Only
) -> None:
    check_env("export", env)
    check_state("export", state)
    held = held_weights("export", env, state)
    _floats(packed_of(state), only)
    named = ((n, _named(t.dtype), tuple(t.shape)) for n, t in held.items())
    items = _items(named, wanted, only)
    cut = shards.cut(items, limit)
    alike(env, lambda: _free(out) if env.main else None)
    # closed where rank 0 fails: then the others raise too
    with closing(streamed(env, {i.name: held[i.name] for i in items}, None)) as stream:
        if env.main:
            _write(out, cut, lambda item: _taken(stream, item))
        for _ in stream:
            pass


def _taken(stream: Iterator[tuple[str, Any]], item: Item) -> Iterator[torch.Tensor]:
    """The next tensor of a stream, about BLOCK bytes at a time."""
    name, tensor = next(stream)
    assert name == item.name
    elements = host(tensor).reshape(-1)
    count = max(1, BLOCK // elements.element_size())
    for at in range(0, elements.numel(), count):
        yield elements[at : at + count].cpu()


def _free(out: Store) -> None:
    """Refuse a folder in which a reader would find other weights than these."""
    there = [
        name
        for name in storage.sizes(out)
        if name in (COMMIT, SHARDS)
        or step_of(name) is not None
        or (name.startswith("model") and name.endswith(".safetensors"))
    ]
    if there:
        raise CheckpointError(
            f"export wants a folder without weights, but {out.url} has "
            f"{', '.join(sorted(there)[:5])}; write another URL, or remove them"
        )


def _write(out: Store, cut: list[Shard], blocks: Blocks) -> None:
    """Write each file, then the index of several; all are removed if one fails."""
    written: list[str] = []
    try:
        for shard in cut:
            head = shards.header(shard)
            storage.write(
                out, shard.file, _parts(head, shard, blocks), len(head) + shard.size
            )
            written.append(shard.file)
        if len(cut) > 1:
            data = shards.index(cut)
            storage.write(out, SHARDS, [data], len(data))
    except BaseException as error:
        for name in written:
            _drop(out, name, error)
        raise


def _drop(out: Store, name: str, why: BaseException) -> None:
    try:
        storage.remove(out, name)
    except OSError as error:
        why.add_note(f"{out.url}/{name} of it is still there: {error}")


def _parts(head: bytes, shard: Shard, blocks: Blocks) -> Iterator[memoryview]:
    yield memoryview(head)
    for item in shard.items:
        dtype = getattr(torch, item.dtype)
        for block in blocks(item):
            yield view(flat(block.to(dtype)))
