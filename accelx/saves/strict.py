"""JSON that is written one way and read with distrust."""

from __future__ import annotations

import json
import math
from typing import Any

import xxhash

from accelx.errors import DamagedError

DEPTH = 64  # levels of nesting; ours has under ten, a user's extra state a few more
DIGITS = 20  # characters of an integer: all of 64 bits


def digest(data: bytes | bytearray | memoryview) -> str:
    """The XXH3 hash of `data`, 128 bits as 32 hex digits. Lets other threads run."""
    return xxhash.xxh3_128_hexdigest(data)  # type: ignore[no-any-return]


def hasher() -> Any:
    """What takes the digest of bytes that come in parts: `update`, `hexdigest`."""
    return xxhash.xxh3_128()


def dumps(value: Any, ordered: bool = True) -> bytes:
    """`value` as one line: `ordered`, so that equal values give equal bytes, or as is.

    A dict that is written as it is keeps the order in which its owner walks it.
    """
    text = json.dumps(value, separators=(",", ":"), sort_keys=ordered, allow_nan=False)
    return text.encode()


def loads(data: bytes, what: str) -> Any:
    """What `data` says. Raises DamagedError, with `what`, for anything but plain JSON.

    Refused beside bad syntax: a name twice in one object, NaN and infinities, integers
    of more than 20 characters, and nesting deeper than 64.
    """
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_object,
            parse_constant=_refuse,
            parse_float=_float,
            parse_int=_integer,
        )
    except RecursionError:
        raise DamagedError(_told(what, "nesting that is too deep")) from None
    except ValueError as error:
        raise DamagedError(_told(what, str(error)[:200])) from None
    if _deeper(value, DEPTH):
        raise DamagedError(_told(what, f"nesting deeper than {DEPTH} levels"))
    return value


def _told(what: str, came: str) -> str:
    return (
        f"{what} wants to be JSON as accelx writes it, got {came}; it is damaged or "
        "not of accelx: take another checkpoint"
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(n for n, _ in pairs if n in seen or seen.add(n))
        raise ValueError(f"the name {twice[:80]!r} twice")
    return made


def _refuse(text: str) -> Any:
    raise ValueError(f"the number {text}")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # a number of JSON, and none of ours: it cannot be written
        raise ValueError(f"the number {text[:40]}")
    return value


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _deeper(value: Any, depth: int) -> bool:
    """Whether `value` nests deeper, without recursion."""
    level = [value]
    for _ in range(depth):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        if not inner:
            return False
        level = inner
    return True
