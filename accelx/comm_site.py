"""Which line of the user's program a call of ours comes from."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from types import CodeType, FrameType

# Python's own files, installed packages, and accelx are not the user's program.
LIBRARY = (sysconfig.get_path("stdlib"), str(Path(__file__).parent), "<frozen ")
INSTALLED = ("/site-packages/", "/dist-packages/")
WRAPPED = "<@beartype("  # what a checker of types puts between a caller and accelx

FILE = 140  # bytes of a path that are kept, the last ones

Site = tuple[bytes, int]  # file and line


class Known(dict[int, "dict[int, Site] | None"]):
    """Of each function, by the id of its code: sites by instruction; None where it is
    not of the program.
    """

    def __init__(self) -> None:
        self.codes: list[CodeType] = []  # held, so that no other gets the id


def is_program(file: str) -> bool:
    """Whether a file is the user's own."""
    return not file.startswith((*LIBRARY, WRAPPED)) and not any(
        part in file for part in INSTALLED
    )


def site(known: Known, depth: int = 2) -> Site:
    """File and line of the program, `depth` calls up or further; b"" where there is
    none. `known` remembers what it found of each call: then a frame takes 0.1 us.
    """
    # documented for this; the public inspect.currentframe takes 0.2 us more
    frame: FrameType | None = sys._getframe(depth)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        try:
            sites = known[id(frame.f_code)]
            if sites is not None:
                return sites[frame.f_lasti]
            frame = frame.f_back
        except KeyError:
            _look(known, frame)
    return b"", 0


def _look(known: Known, frame: FrameType) -> None:
    code, file = frame.f_code, frame.f_code.co_filename
    if id(code) not in known:
        known.codes.append(code)
        known[id(code)] = {} if is_program(file) else None
    sites = known[id(code)]
    if sites is not None:  # Python counts lines out: 0.5 us in a long function
        sites[frame.f_lasti] = file.encode()[-FILE:], frame.f_lineno
