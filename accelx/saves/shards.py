"""Which file of an export each tensor goes to, and what the files say of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence

import attrs

from accelx.errors import CheckpointError
from accelx.saves.boxes import Ints
from accelx.saves.dtypes import KINDS, NAMES
from accelx.saves.source import WHOLE
from accelx.saves.write import framed

SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B")
SCALES = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@attrs.frozen
class Item:
    """One tensor as it is to be written."""

    name: str
    dtype: str  # torch's name
    shape: Ints

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * KINDS[self.dtype].width


@attrs.frozen
class Shard:
    """One file."""

    file: str
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        """Bytes, header left out."""
        return sum(item.size for item in self.items)


def size_of(wanted: int | str) -> int:
    """Bytes, from a number or a text such as "5GB" (10**9) or "5GiB" (2**30)."""
    found = SIZE.fullmatch(wanted) if isinstance(wanted, str) else None
    if found is not None:
        size = float(found[1]) * (1024 if found[3] else 1000) ** SCALES[found[2]]
    else:
        size = wanted if type(wanted) is int else 0
    if size < 1:
        raise ValueError(
            f"export(max_shard_size=...) wants bytes, or a text such as '5GB', got "
            f"{wanted!r}; write max_shard_size='5GB'"
        )
    return int(size)


def ordered(items: Iterable[Item]) -> list[Item]:
    """Wide dtypes first, else as they come: so each lies at a multiple of its width."""
    return sorted(items, key=lambda item: -KINDS[item.dtype].width)


def cut(items: Sequence[Item], limit: int) -> list[Shard]:
    """`items` in files of at most `limit` bytes, named as transformers names them.

    A tensor that is larger has a file of its own. Raises CheckpointError for a dtype
    that safetensors has no code for.
    """
    odd = [i for i in items if NAMES.get(KINDS[i.dtype].code) != i.dtype]
    if odd:
        raise CheckpointError(
            f"export wants dtypes that safetensors has, but {odd[0].name} is "
            f"{odd[0].dtype}; leave it out with only=..., or save it as another"
        )
    files: list[list[Item]] = [[]]
    for item in items:
        if files[-1] and sum(one.size for one in files[-1]) + item.size > limit:
            files.append([])
        files[-1].append(item)
    if len(files) == 1:
        return [Shard(WHOLE, tuple(files[0]))]
    stem = WHOLE.removesuffix(".safetensors")
    return [
        Shard(f"{stem}-{k:05d}-of-{len(files):05d}.safetensors", tuple(file))
        for k, file in enumerate(files, 1)
    ]


def header(shard: Shard) -> bytes:
    """The safetensors header of a file, length included."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for item in shard.items:
        end = at + item.size
        code = KINDS[item.dtype].code
        fields[item.name] = {
            "dtype": code,
            "shape": list(item.shape),
            "data_offsets": [at, end],
        }
        at = end
    return framed(fields)


def index(shards: Sequence[Shard]) -> bytes:
    """model.safetensors.index.json: which file each tensor is in."""
    total = sum(shard.size for shard in shards)
    homes = {item.name: shard.file for shard in shards for item in shard.items}
    said = {"metadata": {"total_size": total}, "weight_map": homes}
    return json.dumps(said, indent=2, sort_keys=True).encode() + b"\n"
