"""What a rank of 1,024 does with the manifest of 10,000 tensors.

    python benchmarks/manifest.py [--rounds 5] [--ranks 1024] [--tensors 10000]

A simulated layout: weights of a large model in twelve shapes, each cut along dim 0 over
all ranks as fsdp2 cuts it. Plans it, writes and reads the manifest and this rank's
index, and finds what a rank of another number of ranks needs. Each goal is a second.
"""

from __future__ import annotations

import argparse
from collections import Counter

import compare

from accelx.saves.boxes import Box, overlap
from accelx.saves.lie import Lie, Slice
from accelx.saves.manifest import (
    CHUNK,
    Index,
    Manifest,
    Part,
    Where,
    read_index,
    read_manifest,
    write_index,
    write_manifest,
)
from accelx.saves.plan import planned
from accelx.saves.strict import digest

ABOUT = {"step": 1, "skipped": 0, "position": 1, "world": 1024}
COUNTS = {"step": 1, "skipped": 0}
WIDTH = 8192
SHAPES = [(WIDTH * k, WIDTH) for k in (1, 2, 3, 4, 8, 16)]
SHAPES += [(WIDTH, 1024 * k) for k in (1, 2, 4)] + [
    (WIDTH,),
    (2 * WIDTH,),
    (128256, 16),
]


def cut(shape, ranks):
    """The slices of a tensor over ranks, as torch chunks dim 0."""
    rows = -(-shape[0] // ranks)
    ends = [(r * rows, min((r + 1) * rows, shape[0])) for r in range(ranks)]
    rest = shape[1:]
    return tuple(
        Slice(Box((low, *(0 for _ in rest)), (high, *rest)), (r,))
        for r, (low, high) in enumerate(ends)
        if low < high
    )


def lies(tensors, ranks):
    """How each tensor lies; those of one shape share their slices, as in a save."""
    slices = {shape: cut(shape, ranks) for shape in SHAPES}
    return {
        f"model.layers.{i}.weight": Lie("float32", shape, slices[shape])
        for i in range(tensors)
        for shape in [SHAPES[i % len(SHAPES)]]
    }


def manifest_of(plan, ranks):
    """A manifest with parts, whose files nobody has written."""
    sizes = [1000] * ranks
    count = Counter((e.layout, e.width) for e in plan.entries.values())
    for (layout, width), tensors in count.items():
        for piece in plan.layouts[layout]:
            sizes[piece.part] += tensors * piece.box.volume * width
    parts = tuple(
        Part(f"rank-{r:05d}.safetensors", size, f"rank-{r:05d}.json", 1, "0" * 32)
        for r, size in enumerate(sizes)
    )
    return Manifest(ABOUT, parts, plan.layouts, plan.entries, {}, COUNTS, {})


def index_of(plan, part):
    """The index of a part, with digests of nothing."""
    slices, at = {}, 1000
    for name, piece, box in plan.of(part):
        size = box.volume * 4
        each = ("0" * 32,) * -(-size // CHUNK)
        slices[plan.entries[name].number, piece] = Where(at, size, each)
        at += size
    return Index(1000, "0" * 32, slices)


def needed(manifest, ranks, rank):
    """Which slices a rank of `ranks` reads, of every tensor."""
    near, found = {}, 0
    for entry in manifest.tensors.values():
        box = cut(entry.shape, ranks)[rank].box if entry.layout not in near else None
        if box is not None:
            pieces = manifest.layouts[entry.layout]
            near[entry.layout] = [p for p in pieces if overlap(p.box, box)]
        found += len(near[entry.layout])
    return found


def main():
    """Measure every part of the work, write the figures and their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--tensors", type=int, default=10_000)
    args = parser.parse_args()
    held = lies(args.tensors, args.ranks)
    plan = planned(held, args.ranks)
    index = index_of(plan, 7)
    manifest = manifest_of(plan, args.ranks)
    data, own = write_manifest(manifest), write_index(index)
    print(f"manifest {len(data) / 1e6:.1f} MB, index {len(own) / 1e6:.1f} MB")
    second = "under 1000"
    steps = {
        "plan": lambda: planned(held, args.ranks),
        "write the manifest": lambda: digest(write_manifest(manifest)),
        "read and check the manifest": lambda: read_manifest(data, "it"),
        "write this rank's index": lambda: digest(write_index(index)),
        "read and check an index": lambda: read_index(own, manifest, 7, "it"),
        "intersect with 768 ranks": lambda: needed(manifest, 768, 500),
    }
    found = compare.ratios(compare.interleaved(steps, args.rounds))
    title = f"A manifest of {args.tensors:,} tensors over {args.ranks:,} ranks"
    goals = dict.fromkeys(steps, second)
    compare.write(
        "manifest", title, goals, found, unit="ms", per=1e3, rounds=args.rounds
    )


if __name__ == "__main__":
    main()
