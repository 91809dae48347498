"""How what a command found reads on a screen: pure, from what --json prints."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from accelx.text import size

Data = Mapping[str, Any]
SHORT = 60  # characters of a reason or a value in a table; --json has all of it


@attrs.frozen
class Column:
    """One column of a table."""

    name: str
    right: bool = False  # aligned there, as numbers are
    folds: bool = False  # over several lines, where the screen is narrow


@attrs.frozen
class Table:
    """Rows of text under columns."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


Blocks = Sequence[Table | str]


def plain(text: str) -> str:
    """`text` in one line, without what would drive a terminal: files name tensors."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def age(then: float | None, now: float) -> str:
    """How long ago, in one unit: 3 h ago."""
    if then is None:
        return "-"
    seconds = now - then
    if seconds < 0:  # the clocks of two machines
        return "just now" if seconds > -60 else "in the future"
    for unit, length, most in (("s", 1, 60), ("min", 60, 60), ("h", 3600, 48)):
        if seconds < length * most:
            return f"{int(seconds // length)} {unit} ago"
    return f"{int(seconds // 86400)} days ago"


def short(text: str) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= SHORT else f"{line[: SHORT - 3]}..."


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _table(columns: str, rows: Iterable[Sequence[str]]) -> list[Table]:
    """A table, or nothing if it has no row. `>name` is on the right, `~name` folds."""
    made = tuple(tuple(row) for row in rows)
    heads = tuple(
        Column(name.lstrip(">~"), name.startswith(">"), name.startswith("~"))
        for name in columns.split()
    )
    return [Table(heads, made)] if made else []


def _titled(title: str, tables: list[Table]) -> list[Table | str]:
    return ["", title, *tables] if tables else []


def _metrics(one: Data) -> str:
    return " ".join(f"{k}={v:.6g}" for k, v in one["metrics"].items()) or "-"


def _state(one: Data) -> str:
    return "whole" if one["whole"] else short(came(one["why"], one["url"]))


def came(why: str, url: str) -> str:
    """Which file of a checkpoint is not as it should be, and what came in its place."""
    parts = re.match(r"(\S+) wants .*?, (?:but )?((?<=but ).*?|got .*?)(; |$)", why)
    return f"{parts[1].removeprefix(f'{url}/')}: {parts[2]}" if parts else why


def ls(data: Data, now: float) -> Blocks:
    """One line a checkpoint."""
    return [data["url"], *_listing(data["checkpoints"], now)]


def _listing(rows: Sequence[Data], now: float) -> list[Table]:
    return _table(
        "checkpoint >step >age >size >ranks >tensors metrics ~state",
        (
            (
                one["name"],
                str(one["step"]),
                age(one["time"], now),
                size(one["size"]),
                _number(one["num_ranks"]),
                _number(one["num_tensors"]),
                _metrics(one),
                _state(one),
            )
            for one in rows
        ),
    )


def show(data: Data, now: float) -> Blocks:
    """What a checkpoint is, its files, its groups, and each tensor."""
    one, about = data["checkpoint"], data["about"]
    saved = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(one["time"]))
    versions = [f"{k} {about.get(k)}" for k in ("accelx", "torch", "python")]
    facts = {
        "step": f"{one['step']} ({about.get('skipped')} skipped)",
        "position": f"{one['position']} batches",
        "saved": f"{saved}, {age(one['time'], now)}",
        "ranks": str(one["num_ranks"]),
        "by": ", ".join(versions),
        "metrics": _metrics(one),
        "size": f"{size(one['size'])}, {one['num_tensors']} tensors",
        "state": "whole" if one["whole"] else one["why"],
    }
    passed = [f"passed over: {f['name']}: {f['why']}" for f in data["passed_over"]]
    others = [f"not of this checkpoint: {name}" for name in data["foreign"]]
    return [
        one["url"],
        *(f"  {name:<9} {value}" for name, value in facts.items()),
        *passed,
        *others,
        *_titled("parts", _parts(data["parts"])),
        *_titled("groups", _groups(data["groups"])),
        *_titled("tensors", _tensors(data["tensors"])),
        *_titled("tied names", _table("~name ~is", data["aliases"].items())),
        *_titled("not stored, told by fingerprint", _base(data["base"])),
    ]


def _parts(parts: Sequence[Data]) -> list[Table]:
    return _table(
        ">part file >size >slices index >index_size",
        (
            (
                str(number),
                one["file"],
                size(one["size"]),
                str(one["num_slices"]),
                one["index"],
                size(one["index_size"]),
            )
            for number, one in enumerate(parts)
        ),
    )


def _groups(groups: Sequence[Data]) -> list[Table]:
    return _table(
        "group >tensors >size ~dtypes",
        (
            (
                one["name"],
                str(one["num_tensors"]),
                size(one["size"]),
                ", ".join(f"{count} {dtype}" for dtype, count in one["dtypes"].items()),
            )
            for one in groups
        ),
    )


def _tensors(tensors: Sequence[Data]) -> list[Table]:
    return _table(
        "~name dtype shape >size >slices ~parts",
        (
            (
                one["name"],
                one["dtype"],
                _shape(one["shape"]),
                size(one["size"]),
                str(one["num_slices"]),
                spans(one["parts"]),
            )
            for one in tensors
        ),
    )


def spans(numbers: Sequence[int]) -> str:
    """Sorted numbers in runs: 0-3, 7."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return ", ".join("-".join(map(str, run)) for run in runs) or "-"


def _base(base: Sequence[Data]) -> list[Table]:
    rows = ((b["name"], b["dtype"], _shape(b["shape"]), b["fingerprint"]) for b in base)
    return _table("~name dtype shape fingerprint", rows)


def diff(data: Data) -> Blocks:
    """What differs, one line each, and how it was found."""
    rows = [
        *((n, "added", "") for n in data["added"]),
        *((n, "removed", "") for n in data["removed"]),
        *((c["name"], "reshaped", _both(c, _shape)) for c in data["reshaped"]),
        *((c["name"], "retyped", _both(c, str)) for c in data["retyped"]),
        *((c["name"], "changed", f"by {c['by']}") for c in data["changed"]),
    ]
    counts = data["num_same"]
    by = f"{counts['digests']} by digests, {counts['bytes']} by bytes"
    return [
        *(f"{side}: {data[side]['url']}" for side in ("a", "b")),
        *_titled("about", _changes(data["about"])),
        *_titled("tensors", _table("~name what how", rows)),
        *_titled("tied names", _changes(data["aliases"])),
        *_titled("not stored, told by fingerprint", _changes(data["base"])),
        *_titled("values", _changes(data["values"])),
        "",
        f"{sum(counts.values())} tensors are the same: {by}",
    ]


def _both(change: Data, write: Any) -> str:
    said = [write(change[k]) if k in change else "nothing" for k in ("a", "b")]
    return " -> ".join(said)


def _changes(changes: Sequence[Data]) -> list[Table]:
    rows = ((c["name"], _both(c, lambda v: short(json.dumps(v)))) for c in changes)
    return _table("~name ~change", rows)


def verify(data: Data) -> Blocks:
    """The state of each checkpoint, and each damage with its file and bytes."""
    each = data["checkpoints"]
    rows = ((c["name"], str(c["step"]), size(c["size"]), c["state"]) for c in each)
    damage = (
        (c["name"], d["file"], d["tensor"] or "-", *_range(d), _got(d["message"]))
        for c in each
        for d in c["damage"]
    )
    return [
        *_table("checkpoint >step >size state", rows),
        *_titled(
            "damage",
            _table("checkpoint file ~tensor >from >to ~what", damage),
        ),
        *(f"not of {c['name']}: {name}" for c in each for name in c["foreign"]),
    ]


def _range(damage: Data) -> tuple[str, str]:
    return _number(damage["start"]), _number(damage["stop"])


def _got(message: str) -> str:
    """Of a damage, the file is told beside it."""
    return came(message, "").partition(": ")[2] or message


def export(data: Data) -> Blocks:
    """The files that were written."""
    rows = ((one["name"], size(one["size"] or 0)) for one in data["files"])
    return [data["out"], *_table("file >size", rows)]


def question(gone: Sequence[Data]) -> list[str]:
    """What a person is asked before checkpoints are removed."""
    each = [f"  {one['url']}{'' if one['whole'] else ' (not whole)'}" for one in gone]
    return [*each, "remove these checkpoints for good?"]


def prune(data: Data, now: float) -> Blocks:
    """What went, or would go, and what stays."""
    gone, kept = data["removed"], data["kept"]
    freed = size(sum(one["size"] for one in gone))
    count = f"{len(gone)} of {len(gone) + len(kept)} checkpoints, {freed}"
    if not gone:
        head = "nothing is to be removed"
    elif data["done"]:
        head = f"removed {count}"
    elif data["dry_run"]:
        head = f"would remove {count}"
    else:
        head = "nothing was removed"
    tables = _listing(gone, now)
    return [head, *tables, *_titled("kept", _listing(kept, now))]
