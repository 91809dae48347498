"""Slices of a checkpoint into memory: only the bytes that are wanted, and checked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import attrs
import torch
from torch import Tensor

from accelx import storage
from accelx.errors import DamagedError
from accelx.saves.boxes import Box, contiguous, overlap, rows, span, strides
from accelx.saves.manifest import Index, Layout, Manifest, Where
from accelx.saves.memory import inside, view
from accelx.saves.strict import digest
from accelx.saves.verify import THREADS, Fill, cores, damage, open_index, problems
from accelx.storage import Store

BLOCK = 16 << 20  # bytes that one thread holds beside the destination, about
VERIFY = ("touched", "full", "off")


@attrs.frozen(eq=False)
class Want:
    """A box of a stored tensor, and the memory that it is to fill.

    Memory of another dtype gets the numbers cast.
    """

    name: str
    box: Box
    out: Tensor


Read = Callable[[Iterable[Want]], int]  # fills them; the bytes that it read


@attrs.frozen(eq=False)
class _Cut:
    """A box that is read at once; the same one for all tensors that are cut alike."""

    piece: int  # number of the stored slice in the layout
    part: int  # that holds it
    stored: Box  # the slice
    box: Box  # what is wanted of it
    low: int  # bytes from the slice's first to the box's
    high: int  # and behind its last
    run: bool  # whether all between them are wanted
    all: bool  # whether there is no other box


@attrs.frozen(eq=False)
class _Job:
    """A box of one stored slice, and where it goes."""

    name: str
    cut: _Cut
    where: Where
    out: Tensor
    dtype: torch.dtype  # as stored


def fill(
    store: Store,
    manifest: Manifest,
    wants: Iterable[Want],
    verify: str = "touched",
    neighbours: int = 1,
) -> int:
    """Read every want into its memory; the bytes that were read.

    Bytes are read where they are to lie, or by way of a buffer of about BLOCK a thread
    where they must be turned or moved to a device. "touched" checks the digest of each
    chunk that is read from, "full" of every byte of every part first, "off" of none.
    Raises DamagedError, which names file, tensor and bytes.
    """
    if verify == "full":
        for problem in problems(store, manifest):
            raise DamagedError(problem)
    with reader(store, manifest, verify != "off", neighbours=neighbours) as read:
        return read(wants)


@contextmanager
def reader(
    store: Store,
    manifest: Manifest,
    checked: bool,
    known: Mapping[int, Index] | None = None,
    neighbours: int = 1,
) -> Generator[Read]:
    """What fills wants, any number of times; a file that it has opened stays open.

    `known` are the indices of parts that have no index in the store. `neighbours` read
    on this machine, this rank counted in: where they have no core to spare, one thread
    reads a local disk.
    """
    indices = dict(known or {})
    readers: dict[int, Fill] = {}
    count = THREADS[store.local]
    if store.local and cores() <= neighbours:
        count = 1
    workers = ThreadPoolExecutor(count, "accelx-read")
    with ExitStack() as stack, workers as pool:  # the pool ends before files close
        run = _runner(store, manifest, readers, checked)

        def read(wants: Iterable[Want]) -> int:
            direct, later = _landing(wants)
            jobs = deque(_jobs(store, manifest, direct, indices, checked))
            for part in dict.fromkeys(job.cut.part for job in jobs):
                if part not in readers:
                    file = storage.reading(store, manifest.parts[part].file)
                    readers[part] = stack.enter_context(file)
            each = [pool.submit(_drained, jobs, run) for _ in range(count)]
            size = sum(one.result() for one in each)
            for out, landed in later:
                out.copy_(landed)
            return size

        yield read


def _landing(
    wants: Iterable[Want],
) -> tuple[list[Want], list[tuple[Tensor, Tensor]]]:
    """The wants with memory of the host for those on XLA, and what is copied then.

    Threads write where they can, and XLA compiles no copy of a part.
    """
    direct, later = list[Want](), list[tuple[Tensor, Tensor]]()
    for want in wants:
        if want.out.device.type == "xla":
            buffer = torch.empty(want.out.shape, dtype=want.out.dtype, device="cpu")
            later.append((want.out, buffer))
            want = attrs.evolve(want, out=buffer)
        direct.append(want)
    return direct, later


def _drained(jobs: deque[_Job], run: Callable[[_Job], int]) -> int:
    """Do what is left of `jobs`, beside other threads; a future for each costs more."""
    count = 0
    try:
        while jobs:
            try:
                job = jobs.popleft()
            except IndexError:  # another thread took the last one
                break
            count += run(job)
    except BaseException:
        jobs.clear()  # nobody waits for the rest
        raise
    return count


def _jobs(
    store: Store,
    manifest: Manifest,
    wants: Iterable[Want],
    indices: dict[int, Index],
    checked: bool,
) -> Iterator[_Job]:
    near: dict[tuple[int, int, Box], list[_Cut]] = {}
    for want in wants:
        entry = manifest.tensors[manifest.aliases.get(want.name, want.name)]
        key = entry.layout, entry.width, want.box
        if key not in near:
            near[key] = list(_cuts(manifest.layouts[entry.layout], want.box, key[1]))
        dtype = getattr(torch, entry.dtype)
        for cut in near[key]:
            if cut.part not in indices:
                indices[cut.part] = open_index(store, manifest, cut.part, checked)
            where = indices[cut.part].slices.get((entry.number, cut.piece))
            if where is None:
                file = manifest.parts[cut.part].index
                raise DamagedError(
                    f"{store.url}/{file} wants to list slice {cut.piece} of "
                    f"{want.name}, and does not; take another checkpoint"
                )
            out = want.out if cut.all else inside(want.out, cut.box, want.box)
            yield _Job(want.name, cut, where, out, dtype)


def _cuts(layout: Layout, wanted: Box, width: int) -> Iterator[_Cut]:
    for k, piece in enumerate(layout):
        box = overlap(piece.box, wanted)
        for one in () if box is None else _blocks(box, piece.box, width):
            low, high = span(one, piece.box)
            ends, run = (low * width, high * width), contiguous(one, piece.box)
            yield _Cut(k, piece.part, piece.box, one, *ends, run, one == wanted)


def _blocks(box: Box, stored: Box, width: int) -> list[Box]:
    """`box` in parts whose bytes in the slice, gaps included, are about BLOCK."""
    if not box.lo:
        return [box]
    row = strides(stored.shape)[0] * width
    return rows(box, BLOCK // row)


def _runner(
    store: Store, manifest: Manifest, readers: dict[int, Fill], checked: bool
) -> Callable[[_Job], int]:
    def run(job: _Job) -> int:
        read, low, size = readers[job.cut.part], job.cut.low, job.cut.high - job.cut.low
        direct = (
            job.cut.run
            and job.out.is_contiguous()
            and job.out.is_cpu
            and job.out.dtype == job.dtype
        )
        made = None if direct else torch.empty(size, dtype=torch.uint8, device="cpu")
        out = view(job.out if made is None else made)
        if checked:
            count = _checked(store, manifest, job, read, low, out)
        else:
            read(job.where.offset + low, out)
            count = size
        if made is not None:
            _place(job, made)
        return count

    return run


def _place(job: _Job, made: Tensor) -> None:
    """Copy out of a buffer that begins at the first byte of the job's box."""
    typed = made.view(job.dtype)
    steps = strides(job.cut.stored.shape)
    job.out.copy_(torch.as_strided(typed, job.cut.box.shape, steps))


def _checked(
    store: Store, manifest: Manifest, job: _Job, read: Fill, low: int, out: memoryview
) -> int:
    """Fill `out` from byte `low` of the slice, chunk by chunk; bytes that were read."""
    size, high, count = manifest.chunk, low + len(out), 0
    for k in range(low // size, -(-high // size)):
        start, stop = k * size, min((k + 1) * size, job.where.size)
        offset = job.where.offset + start
        if start >= low and stop <= high:
            chunk = out[start - low : stop - low]
            read(offset, chunk)
        else:
            chunk = memoryview(bytearray(stop - start))
            read(offset, chunk)
        if digest(chunk) != job.where.digests[k]:
            file = f"{store.url}/{manifest.parts[job.cut.part].file}"
            raise DamagedError(damage(file, job.name, offset, offset + len(chunk)))
        if not (start >= low and stop <= high):
            a, b = max(start, low), min(stop, high)
            out[a - low : b - low] = chunk[a - start : b - start]
        count += stop - start
    return count
