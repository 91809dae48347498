"""What the launcher does differently on each system, decided in one place; pure."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from typing import Literal

import attrs

from accelx.errors import SpawnError
from accelx.launch.options import PROGRAM

# What a system may lack of Python's `os`; macOS has `waitid` from Python 3.13 on.
ASKED = ("fork", "memfd_create", "sched_setaffinity", "waitid", "wait4")


@attrs.frozen
class System:
    """How ranks are started, tied to the launcher, bound, met and looked into."""

    starts: Literal["fork", "none"] = "fork"
    loopback: str = "lo"  # the interface that sees this machine only
    tether: Literal["kernel", "pipe"] = "kernel"  # by what ranks end with the launcher
    binds: bool = True  # whether a process can be kept on some cores
    stacks: Literal["memory", "file"] = "memory"  # where a rank writes its stacks
    peeks: bool = True  # whether an ended rank can be seen before its number is free
    rss_unit: int = 1024  # bytes in one of `ru_maxrss`
    libuv: bool = True  # what serves the store


LINUX = frozenset(ASKED)


def decide(
    name: str, has: Collection[str] = LINUX, environ: Mapping[str, str] | None = None
) -> System:
    """The differences of a system.

    `name` is as `sys.platform`, `has` what its `os` offers of ASKED. USE_LIBUV=0 in
    `environ` is torch's word for a build without libuv.
    """
    linux = name == "linux"
    return System(
        starts="fork" if {"fork", "wait4"} <= set(has) else "none",
        loopback="lo" if linux else "lo0",
        tether="kernel" if linux else "pipe",
        binds=linux and "sched_setaffinity" in has,
        stacks="memory" if "memfd_create" in has else "file",
        peeks="waitid" in has,
        rss_unit=1 if name == "darwin" else 1024,
        libuv=(environ or {}).get("USE_LIBUV", "1") != "0",
    )


def offered() -> frozenset[str]:
    """What this system's `os` has of ASKED."""
    return frozenset(name for name in ASKED if hasattr(os, name))


def check_system(name: str, has: Collection[str], target: str) -> None:
    """Refuse a system that cannot fork."""
    if decide(name, has).starts == "none":
        called = {"win32": "Windows", "emscripten": "a browser"}.get(name, name)
        raise SpawnError(
            f"{PROGRAM} starts ranks by fork, which {called} does not have; one "
            f"process needs no launcher: python {target}"
        )


def check_here(target: str) -> None:
    """Refuse this system if it cannot fork."""
    check_system(sys.platform, offered(), target)
