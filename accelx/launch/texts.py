"""How settings about nodes are written: `2`, `1:4`, `auto`, `host:port`."""

from __future__ import annotations

import re
from typing import NamedTuple

PORT = 29400  # of a rendezvous that is written without one, as torchrun's


class Nodes(NamedTuple):
    """The fewest and the most nodes."""

    fewest: int
    most: int

    def __str__(self) -> str:
        return f"{self.fewest}:{self.most}" if self.fewest < self.most else f"{self[0]}"


class Endpoint(NamedTuple):
    """Where nodes meet."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def nodes(text: str) -> Nodes:
    """`2`, or `1:4` for the fewest and the most."""
    fewest, _, most = text.partition(":")
    made = Nodes(count(fewest), count(most or fewest))
    if not 1 <= made.fewest <= made.most or text.endswith(":"):
        raise ValueError(text)
    return made


def node_rank(text: str) -> int | None:
    """A number from 0; None for `auto`."""
    return None if text == "auto" else count(text)


def count(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def several(text: str) -> int:
    """A whole number, 1 or more."""
    if not (value := count(text)):
        raise ValueError(text)
    return value


def endpoint(text: str) -> Endpoint:
    """`host:port`, or `host` alone; an IPv6 address in brackets."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::(\d+))?", text)
    if found is None or not 0 < int(found[2] or PORT) < 2**16:
        raise ValueError(text)
    return Endpoint(found[1].strip("[]"), int(found[2] or PORT))


def name(text: str) -> str:
    """A word without blanks, since it becomes part of keys and messages."""
    if not re.fullmatch(r"[\w.:@/+-]{1,128}", text):
        raise ValueError(text)
    return text
