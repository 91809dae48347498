"""Which line of the user's program an error or a stack is about."""

from __future__ import annotations

import re
import traceback
from types import TracebackType

from accelx.comm_site import is_program

FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<name>.+)$', re.M)


def innermost(trace: TracebackType | None) -> str:
    """`train.py:12, in main: x = f(y)`: the deepest line that is the program's own.

    The deepest of all where none is; empty without a traceback.
    """
    frames = traceback.extract_tb(trace)
    own = [frame for frame in frames if is_program(frame.filename)] or frames
    if not own:
        return ""
    frame = own[-1]
    text = f": {frame.line}" if frame.line else ""
    return f"{frame.filename}:{frame.lineno}, in {frame.name}{text}"


def of_stack(stack: str) -> str:
    """The same of what faulthandler wrote, which has the deepest call first."""
    frames = [found.groupdict() for found in FRAME.finditer(stack)]
    own = [frame for frame in frames if is_program(frame["file"])] or frames
    return "{file}:{line}, in {name}".format(**own[0]) if own else ""


def main_thread(stacks: str) -> str:
    """Of what faulthandler wrote of all threads, the main one's, which comes last."""
    head, mark, main = stacks.rpartition("(most recent call first):")
    return head.rpartition("\n")[2] + mark + main


def shows(text: str, line: str) -> bool:
    """Whether a traceback ends, or a stack begins, with this line of the program."""
    place = line.partition(", in ")[0]
    frames = re.findall(r'^  File "(.+)", line (\d+)', text, re.M)
    deepest = frames[:1] if "most recent call first" in text else frames[-1:]
    return not line or deepest == [tuple(place.rpartition(":")[::2])]
