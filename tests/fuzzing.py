"""Checkpoints that say anything at all, made from one that is sound.

    python -m tests.fuzzing [--inputs 100000] [--seed 0]

tries many more than the suite does, and ends with an error at the first that accelx
neither reads nor refuses by a CheckpointError.
"""

import argparse
import json
import random
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

from accelx.errors import CheckpointError
from accelx.saves.commit import read_commit
from accelx.saves.manifest import read_index, read_manifest
from tests import forged

WORDS = ("", "x", "..", "../x", "/etc/passwd", "a/b", "\0", "nan", "\ud800", "x" * 5000)
NUMBERS = (-1, 0, 1, 2, 7, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 10**19, -(2**63))
REALS = (0.0, -0.0, 0.5, 1e308, 5e-324, float("nan"), float("inf"))
TYPES = ("tensor", "tuple", "dict", "record", "object", "bytes", "dtype", "int")


def leaf(r):
    """A value without anything in it, or nested deep."""
    kind = r.randrange(6)
    if kind < 3:
        return r.choice((WORDS, NUMBERS, REALS)[kind])
    if kind == 3:
        return r.choice((None, True, False, [], {}))
    if kind == 4:
        inner = r.choice((None, [], {}, "x", 5, [[]], [1, 2], [["k", 1]], {"v": []}))
        return {"$": r.choice((*TYPES, "other", None, 5, [], {})), "v": inner}
    deep = []
    for _ in range(r.choice((3, 70, 300))):
        deep = [deep] if r.random() < 0.5 else {"$": "tuple", "v": [deep]}
    return deep


def places(value, found=None):
    """(container, key) of everything in a JSON value."""
    found = [] if found is None else found
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in list(keys):
            found.append((value, key))
            places(value[key], found)
    return found


def restructured(r, value):
    """The JSON value with one to three places changed."""
    value = {"": value}
    for _ in range(r.randint(1, 3)):
        every = places(value)
        where, key = r.choice(every)
        other = r.choice(every)
        act = r.randrange(6)
        if act == 0 and where is not value:
            del where[key]
        elif act == 1 and isinstance(where, list):
            where.insert(key, json.loads(json.dumps(where[key])))
        elif act == 2 and isinstance(where, dict) and where is not value:
            where[r.choice((*WORDS, "$", other[1] if other[1] else "v"))] = where[key]
        elif act == 3:
            where[key] = json.loads(json.dumps(other[0][other[1]]))
        elif act == 4 and type(where[key]) is int:
            where[key] += r.choice((-1, 1, 2**32))
        else:
            where[key] = leaf(r)
    return value[""]


def garbled(r, data):
    """The bytes with some of them turned, left out, doubled or put in."""
    data = bytearray(data)
    for _ in range(r.randint(1, 4)):
        at = r.randrange(len(data) + 1)
        stop = min(len(data), at + r.randint(1, 12))
        act = r.randrange(4)
        if act == 0 and at < len(data):
            data[at] ^= 1 << r.randrange(8)
        elif act == 1:
            del data[at:stop]
        elif act == 2:
            data[at:at] = data[at:stop]
        else:
            data[at:at] = r.choice((b"[", b"{", b"1e999", b'"', b",", b"\xff", b"-0"))
    return bytes(data)


def forgery(r, files):
    """A checkpoint in which one file says something else, signed as if it were sound.

    Beside the files, which one it was and what it says.
    """
    what = r.choice(("manifest", "manifest", "manifest", "index", "commit", "data"))
    if what == "data" or r.random() < 0.3:
        changed = garbled(r, files[forged.FILES[what]])
        if what == "data" and len(changed) != len(files[forged.FILES[what]]):
            changed = (changed + bytes(99))[: len(files[forged.FILES[what]])]
    else:
        changed = restructured(r, forged.json_of(files, what))
    return what, forged.signed(files, **{what: changed})


def tried(r, files, run):
    """What became of one forgery: the name of an error, or "read".

    Anything but a CheckpointError is raised.
    """
    what, made = forgery(r, files)
    ends = []
    for attempt in (lambda: read_alone(what, made, files), lambda: loaded(run, made)):
        try:
            attempt()
            ends.append("read")
        except CheckpointError as error:
            ends.append(type(error).__name__ if str(error) else "without a word")
    return what, ends[1]


def read_alone(what, made, files):
    """The file that was changed, by its own reader."""
    data = made[forged.FILES[what]]
    if what == "commit":
        read_commit(data, "commit")
    elif what == "manifest":
        read_manifest(data, "manifest")
    elif what == "index":
        read_index(data, read_manifest(files["manifest.json"], "manifest"), 0, "index")


def loaded(run, made):
    """All of it, into a real model and optimizer."""
    forged.write(run, made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forged.load(run)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ends, began = Counter(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        files = forged.saved(Path(folder) / "sound")
        for number in range(args.seed, args.seed + args.inputs):
            try:
                ends[tried(random.Random(number), files, Path(folder) / "run")] += 1
            except Exception:
                print(f"input {number}", flush=True)
                raise
            if sum(ends.values()) % 10_000 == 0:
                seconds = time.perf_counter() - began
                print(f"{sum(ends.values())} in {seconds:.0f} s", flush=True)
    for (what, end), count in sorted(ends.items()):
        print(f"{what:10} {end:16} {count}")
    print(f"{args.inputs} inputs in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
