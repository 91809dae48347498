"""What differs between two checkpoints: tensors, names, and all that is no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from accelx.checkpoints import same
from accelx.checkpoints.listing import Reading, row
from accelx.checkpoints.same import Pair, Side
from accelx.checkpoints.show import size_of
from accelx.saves.commit import resolve
from accelx.saves.manifest import Entry


def diff(a: str, b: str, reading: Reading) -> dict[str, Any]:
    """What differs between the checkpoints that two URLs mean.

    A tensor that is cut alike in both is compared by the digests in their indices,
    others by reading them; `reading` is opened if there are such.
    """
    ours, theirs = resolve(a), resolve(b)
    left, right = same.opened(ours), same.opened(theirs)
    found = {
        **_tensors(left, right, reading),
        "aliases": changes(left.manifest.aliases, right.manifest.aliases),
        "base": changes(left.manifest.base, right.manifest.base),
        "about": changes(left.manifest.about, right.manifest.about),
        "values": changes(leaves(left.manifest.values), leaves(right.manifest.values)),
    }
    counts = found.pop("num_same")
    return {
        "a": row(ours),
        "b": row(theirs),
        "same": not any(v for k, v in found.items() if k != "about"),
        "num_same": counts,
        **found,
    }


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each name whose value differs, with those that there are as "a" and "b"."""
    return [
        {
            "name": name,
            **({"a": a[name]} if name in a else {}),
            **({"b": b[name]} if name in b else {}),
        }
        for name in dict.fromkeys((*a, *b))
        if name not in a or name not in b or a[name] != b[name]
    ]


def leaves(raw: Any, path: str = "") -> dict[str, Any]:
    """Typed JSON as path -> plain value; tensors are left out."""
    kind = raw.get("$") if isinstance(raw, Mapping) else None
    if kind == "tensor":
        return {}
    if kind is not None:
        raw = raw.get("v")
    if kind == "dict" and isinstance(raw, list) and all(map(_is_item, raw)):
        raw = {_key(key): value for key, value in raw}
    if not raw or not isinstance(raw, Mapping | list):
        return {path: raw}
    found: dict[str, Any] = {}
    for key, value in raw.items() if isinstance(raw, Mapping) else enumerate(raw):
        found |= leaves(value, f"{path}.{key}" if path else str(key))
    return found


def _is_item(raw: Any) -> bool:
    return isinstance(raw, list) and len(raw) == 2  # type: ignore[reportUnknownArgumentType]


def _key(raw: Any) -> str:
    """A key of a dict whose keys are not all text: a number, None, an infinity."""
    return str(raw["v"] if isinstance(raw, Mapping) and "v" in raw else raw)


def _tensors(left: Side, right: Side, reading: Reading) -> dict[str, Any]:
    ours, theirs = _stored(left), _stored(right)
    both = {n: (ours[n], theirs[n]) for n in ours if n in theirs}
    each = {n: (_entry(left, a), _entry(right, b)) for n, (a, b) in both.items()}
    reshaped = {n: p for n, p in each.items() if p[0].shape != p[1].shape}
    retyped = {n: p for n, p in each.items() if p[0].dtype != p[1].dtype}
    alike = {n: both[n] for n in both if n not in reshaped and n not in retyped}
    how, other = _compared(left, right, list(dict.fromkeys(alike.values())), reading)
    said = [how[pair] for pair in how if pair not in other]
    return {
        "added": [n for n in theirs if n not in ours],
        "removed": [n for n in ours if n not in theirs],
        "reshaped": [
            {"name": n, "a": list(a.shape), "b": list(b.shape)}
            for n, (a, b) in reshaped.items()
        ],
        "retyped": [
            {"name": n, "a": a.dtype, "b": b.dtype} for n, (a, b) in retyped.items()
        ],
        "changed": [{"name": n, "by": how[p]} for n, p in alike.items() if p in other],
        "num_same": {by: said.count(by) for by in ("digests", "bytes")},
    }


def _stored(side: Side) -> dict[str, str]:
    """Every name, tied ones too -> the name that it is stored under."""
    names = {name: name for name in side.manifest.tensors}
    return {**names, **side.manifest.aliases}


def _entry(side: Side, name: str) -> Entry:
    return side.manifest.tensors[name]


def _compared(
    left: Side, right: Side, pairs: list[Pair], reading: Reading
) -> tuple[dict[Pair, str], set[Pair]]:
    """How each pair was compared, and those that differ."""
    how, other, read = dict[Pair, str](), set[Pair](), list[Pair]()
    alike = cache(
        lambda layouts: same.cut_alike(left.manifest, right.manifest, layouts)
    )
    for pair in pairs:
        a, b = _entry(left, pair[0]), _entry(right, pair[1])
        if alike((a.layout, b.layout)):
            how[pair] = "digests"
            if same.digests(left, a) != same.digests(right, b):
                other.add(pair)
        else:
            how[pair] = "bytes"
            read.append(pair)
    if read:
        total = sum(size_of(_entry(left, a)) for a, _ in read)
        with reading(total) as told:
            other |= same.other_bytes(left, right, read, told)
    return how, other
