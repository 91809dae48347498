"""Which rank of a run that hangs is the odd one, and where each of them stands."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelx.comm_hang import Left, read
from accelx.comm_ring import ENDED, FAILED, OPEN, Operation
from accelx.doctors import text
from accelx.doors import WrongUseError
from accelx.launch.told import names
from accelx.launch.where import main_thread, of_stack

LAST = 5  # operations that are shown of a rank

Data = dict[str, Any]


def looked(folder: str) -> Data:
    """What the ranks have left in `folder`, merged. Raises WrongUseError for none."""
    path = Path(folder)
    left = read(path) if path.is_dir() else []
    if not left:
        raise WrongUseError(
            "hang wants a folder in which ranks have left rank-0.ops and the like, got "
            f"{folder!r}, which has none; write that of accelx.spawn --logs, or of "
            "ax.connect(reports=...)"
        )
    return merged(left)


def merged(left: Sequence[Left]) -> Data:
    """Where each rank stands, which ones are odd, and where their ways parted; pure."""
    ranks = [_standing(one) for one in left]
    world = max([one.world for one in left] + [one.rank + 1 for one in left])
    there = {one.rank for one in left}
    ranks += [_nothing(rank) for rank in range(world) if rank not in there]
    ranks.sort(key=lambda one: one["rank"])
    places = _places(ranks)
    odd = _odd(places)
    return {
        "world": world,
        "odd": odd,
        "verdict": _verdict(places, odd, world),
        "parted": _parted(left),
        "ranks": ranks,
    }


def lines(data: Data) -> list[str]:
    """The same as text that can be pasted anywhere."""
    rows = map(_row, data["ranks"])
    shown = _shown_last(data)
    return [
        f"{data['world']} ranks",
        "",
        data["verdict"],
        *([data["parted"]] if data["parted"] else []),
        "",
        *text.columns(">rank host stands operation since program torch", rows),
        *(["", *shown] if shown else []),
    ]


def _row(one: Data) -> tuple[object, ...]:
    program = one["program"].partition(",")[0]
    shown = (one["host"], one["key"][0], one["last"], one["since"], program)
    return (one["rank"], *(text or "-" for text in (*shown, one["torch"])))


def _standing(left: Left) -> Data:
    each, program = left.operations, _program(left)
    one = _innermost(each)
    found = {
        "rank": left.rank,
        "host": left.host,
        "pid": left.pid,
        "since": None,
        "program": program,
        "torch": _flight(left.flight),
        "last": _said(each[-1]) if each else "-",
        "operations": [_plain(op, left.ahead) for op in each],
    }
    if one is None and left.ended:
        what = f"has ended{f', seen before at {program}' * bool(program)}"
        return {**found, "key": ("ended",), "text": what, "number": 0}
    if one is None:
        number = each[-1].number if each else 0
        what = f"is not in a collective{f': {program}' * bool(program)}, after "
        what += _said(each[-1]) if each else "none"
        return {**found, "key": ("after", number), "text": what, "number": number}
    kind, verb = ("in", "is in") if one.state == OPEN else ("failed", "failed in")
    return {
        **found,
        "last": _said(one),
        "key": (kind, one.name, one.file, one.line, one.number),
        "text": f"{verb} {_said(one)}",
        "number": one.number,
        "since": _clock(one.begun + left.ahead),
    }


def _program(left: Left) -> str:
    """The line that the program is at; empty where it has gone on since it was seen."""
    last = max((max(one.begun, one.ended) for one in left.operations), default=0.0)
    if left.operations and left.looked < last + left.ahead:
        return ""
    return of_stack(main_thread(left.stack))


def _nothing(rank: int) -> Data:
    what = "has left nothing here: it has not connected, or left it in another folder"
    found = {"rank": rank, "host": "", "pid": 0, "since": None, "program": ""}
    more = {"torch": "", "last": "-", "operations": [], "number": 0}
    return {**found, **more, "key": ("nothing",), "text": what}


def _innermost(each: Sequence[Operation]) -> Operation | None:
    """The newest operation under way, or one that failed and nothing came after it."""
    last = max((one.ended for one in each if one.state == ENDED), default=0.0)
    inside = [
        one
        for one in each
        if one.state == OPEN or (one.state == FAILED and one.ended >= last)
    ]
    return inside[-1] if inside else None


def _said(one: Operation) -> str:
    return f"{one.name} at {one.file}:{one.line} (#{one.number})"


def _places(ranks: Sequence[Data]) -> dict[tuple[Any, ...], list[Data]]:
    places: dict[tuple[Any, ...], list[Data]] = {}
    for one in ranks:
        places.setdefault(one["key"], []).append(one)
    return places


def _odd(places: dict[tuple[Any, ...], list[Data]]) -> list[int]:
    """The ranks that stand where the fewest do; of as many, those that are behind."""
    if len(places) < 2:
        return []
    fewest = min(
        places.values(),
        key=lambda some: (
            len(some),
            # who waits in one is waiting for who does not
            some[0]["key"][0] in ("in", "failed"),
            some[0]["number"],
        ),
    )
    return [one["rank"] for one in fewest]


def _verdict(
    places: dict[tuple[Any, ...], list[Data]], odd: Sequence[int], world: int
) -> str:
    if not odd:
        return f"all {world} ranks {_verb(next(iter(places.values())))}: none is odd"
    groups = sorted(places.values(), key=lambda some: some[0]["rank"] not in odd)
    first, *rest = groups
    texts = [f"{_ranks(first)} {_verb(first)}"]
    if len(rest) == 1:
        who = "the other" if len(rest[0]) == 1 else "the others"
        return f"{texts[0]}; {who} {_verb(rest[0])}"
    return "; ".join(texts + [f"{_ranks(some)} {_verb(some)}" for some in rest])


def _ranks(some: Sequence[Data]) -> str:
    return names([one["rank"] for one in some])


def _verb(some: Sequence[Data]) -> str:
    """What one rank does, or several: `is in`, `are in`."""
    said: str = some[0]["text"]
    if len(some) == 1:
        return said
    for one, many in (("is ", "are "), ("has ", "have ")):
        if said.startswith(one):
            return many + said.removeprefix(one)
    return said


def _parted(left: Sequence[Left]) -> str:
    """The first operation that ranks did not do alike, of those that all still have."""
    known = [{op.number: op for op in one.operations} for one in left]
    numbers = sorted(set.intersection(*(set(one) for one in known)) if known else ())
    for number in numbers:
        did = [f"{one[number].name} at {_place(one[number])}" for one in known]
        if len(set(did)) > 1:
            ranks: dict[str, list[int]] = {}
            for one, what in zip(left, did, strict=True):
                ranks.setdefault(what, []).append(one.rank)
            says = ", ".join(f"{names(who)} did {what}" for what, who in ranks.items())
            return f"their ways part at #{number}: {says}"
    return ""


def _place(one: Operation) -> str:
    """Without its folder, which may be another on another machine."""
    return f"{Path(one.file).name}:{one.line}"


def _shown_last(data: Data) -> list[str]:
    """The last operations of an odd rank and of another."""
    shown = list[str]()
    others = [one["rank"] for one in data["ranks"] if one["rank"] not in data["odd"]]
    for rank in [*data["odd"][:1], *others[:1]]:
        one = next(each for each in data["ranks"] if each["rank"] == rank)
        rows = [
            (f"#{op['number']}", op["name"], op["brings"] or "-", op["at"], op["state"])
            for op in one["operations"][-LAST:]
        ]
        if rows:
            shown += text.columns(f">rank-{rank} operation brings at state", rows)
            shown += [""]
    return shown[:-1]


def _plain(one: Operation, ahead: float) -> Data:
    seconds = None if one.state == OPEN else one.ended - one.begun
    state = {OPEN: "under way", ENDED: "ended", FAILED: "failed"}[one.state]
    return {
        "number": one.number,
        "name": one.name,
        "brings": one.brings,
        "at": f"{one.file}:{one.line}",
        "state": state,
        "begun": _clock(one.begun + ahead),
        "seconds": seconds,
    }


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def _flight(said: str) -> str:
    """The last collective that torch's own recorder has."""
    try:
        entries = json.loads(said)["entries"] if said else []
    except (ValueError, KeyError, TypeError):  # written half
        return ""
    if not entries:
        return ""
    last = entries[-1]
    number = last.get("collective_seq_id", last.get("p2p_seq_id", "?"))
    return f"{last.get('profiling_name', '?')} {number}"
