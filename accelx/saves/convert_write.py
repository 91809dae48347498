"""How tensors that are read one by one become the parts of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from accelx import storage
from accelx.saves.boxes import whole
from accelx.saves.commit import folder_name
from accelx.saves.convert_source import Lazy
from accelx.saves.dtypes import KINDS
from accelx.saves.manifest import Entry, Layout, Manifest, Piece
from accelx.saves.memory import flat
from accelx.saves.save import about, commit
from accelx.saves.write import Slab, write_part
from accelx.storage import Store

PART = 512 << 20  # bytes that are in memory at once, and lie in one file


def write(
    out: Store,
    tensors: Mapping[str, Lazy],
    values: Mapping[str, Any],
    aliases: Mapping[str, str],
) -> str:
    """Write a checkpoint of this process alone under `out`; its URL."""
    entries: dict[str, Entry] = {}
    layouts: dict[Layout, int] = {}
    packs = list(_packs(tensors))
    for part, pack in enumerate(packs):
        for name in pack:
            one = tensors[name]
            layout = () if 0 in one.shape else (Piece(whole(one.shape), part),)
            index = layouts.setdefault(layout, len(layouts))
            entries[name] = Entry(one.dtype, one.shape, index, len(entries))
    store = storage.inside(out, folder_name(values["step"]))
    parts = tuple(
        write_part(store, part, list(_slabs(pack, entries, tensors)))
        for part, pack in enumerate(packs)
    )
    said = about(values["step"], values["skipped"], 1)
    manifest = Manifest(said, parts, tuple(layouts), entries, aliases, values, {})
    commit(store, manifest, {})
    return store.url


def _packs(tensors: Mapping[str, Lazy]) -> Iterator[list[str]]:
    """Names in their order, by parts of at most PART bytes or of one tensor."""
    pack, size = list[str](), 0
    for name, one in tensors.items():
        more = whole(one.shape).volume * KINDS[one.dtype].width
        if pack and size + more > PART:
            yield pack
            pack, size = [], 0
        pack.append(name)
        size += more
    yield pack


def _slabs(
    pack: list[str], entries: Mapping[str, Entry], tensors: Mapping[str, Lazy]
) -> Iterator[Slab]:
    for name in pack:
        entry = entries[name]
        if 0 not in entry.shape:
            data = flat(tensors[name].read())
            yield Slab(name, entry.number, 0, entry.dtype, entry.shape, data)
