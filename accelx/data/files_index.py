"""The index of a dataset of files: made by all ranks together, the same on each."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import attrs
import torch
from torch import Tensor

from accelx import comm
from accelx.data.formats.format import (
    Block,
    Columns,
    File,
    Flaw,
    FlawedError,
    Format,
    Scan,
)
from accelx.errors import AccelxError, DataError
from accelx.records import Env

T = TypeVar("T")
READERS = 8  # remote files whose headers are read at the same time


@attrs.frozen
class Skipped:
    """A part of the data that is left out, as it cannot be read."""

    file: str  # its URL
    what: str
    rows: int | None  # None where nobody can know


@attrs.frozen
class Reading:
    """How files are to be read."""

    form: Format
    columns: Columns
    skip: bool  # leave out what cannot be read
    verify: bool  # read every block beforehand


@attrs.frozen(eq=False)
class Found:
    """What the index holds of one file."""

    blocks: Tensor  # (n, 4) int64: start, stop, rows, bytes
    skipped: tuple[Skipped, ...]
    schema: tuple[tuple[str, str], ...]
    heads: tuple[tuple[int, int], ...]


def from_main(env: Env | None, do: Callable[[], T]) -> T:
    """What `do()` gives on rank 0."""
    made = shared(env, lambda: do() if env is None or env.main else None)[0]
    assert made is not None
    return made


def shared(env: Env | None, do: Callable[[], T]) -> list[T]:
    """What `do()` gives on each rank; raises on all ranks if it fails on one."""
    if env is None or env.world == 1:
        return [do()]
    told: tuple[T | None, Exception | None]
    try:
        told = do(), None
    except Exception as error:  # told to all ranks
        told = None, _sendable(error)
    every = comm.gather_objects(env, told)
    for rank, (_, error) in enumerate(every):
        if error is not None:
            raise type(error)(f"rank {rank}: {error}")
    return [made for made, _ in every]


def _sendable(error: Exception) -> Exception:
    """An error of a type that takes its text alone."""
    kinds = (AccelxError, FileNotFoundError)
    kind = type(error) if isinstance(error, kinds) else DataError
    said = (
        str(error) if isinstance(error, kinds) else f"{type(error).__name__}: {error}"
    )
    return kind(said)


def scanned(env: Env | None, files: Sequence[File], reading: Reading) -> list[Found]:
    """What is in each file; of several ranks, each reads its share of them."""
    mine = range(len(files))
    if env is not None and env.world > 1:
        mine = _shares([file.size for file in files], env.world)[env.rank]

    def do() -> dict[int, Found]:
        own = [files[i] for i in mine]
        return dict(zip(mine, _scan_all(own, reading), strict=True))

    found = {i: each for one in shared(env, do) for i, each in one.items()}
    return [found[i] for i in range(len(files))]


def _shares(sizes: Sequence[int], world: int) -> list[list[int]]:
    """For each rank its files, so that bytes are about equally many."""
    loads = [(0, rank) for rank in range(world)]
    shares: list[list[int]] = [[] for _ in range(world)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(i)
        heapq.heappush(loads, (load + sizes[i] + 1, rank))
    return shares


def _scan_all(files: Sequence[File], reading: Reading) -> list[Found]:
    if len(files) < 2 or all(file.store.local for file in files):
        return [_scan(file, reading) for file in files]
    with ThreadPoolExecutor(READERS, thread_name_prefix="accelx-scan") as pool:
        return list(pool.map(lambda file: _scan(file, reading), files))


def _scan(file: File, reading: Reading) -> Found:
    try:
        if not file.size:
            raise FlawedError("it is empty")
        scan = reading.form.scan(file, reading.skip)
    except FlawedError as error:
        scan = Scan((), (Flaw(str(error)),))
    if reading.verify:
        scan = _verified(attrs.evolve(file, heads=scan.heads), scan, reading)
    if scan.flaws and not reading.skip:
        raise flawed(file, reading.form, scan.flaws[0].what)
    rows = [[b.start, b.stop, b.rows, b.nbytes] for b in scan.blocks]
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)
    skipped = tuple(Skipped(file.url, flaw.what, flaw.rows) for flaw in scan.flaws)
    return Found(table, skipped, scan.schema, scan.heads)


def _verified(file: File, scan: Scan, reading: Reading) -> Scan:
    """The scan without the blocks that cannot be read to their last row."""
    good, flaws = list[Block](), list(scan.flaws)
    for block in scan.blocks:
        try:
            reading.form.load(file, block, reading.columns).take(range(block.rows))
            good.append(block)
        except FlawedError as error:
            flaws.append(Flaw(str(error), block.rows))
    return attrs.evolve(scan, blocks=tuple(good), flaws=tuple(flaws))


def flawed(file: File, form: Format, what: str) -> DataError:
    """The error for what a file does not hold."""
    return DataError(
        f"{file.url} is wanted as {form.name}, but {what}; write the file again, leave "
        "it out, or give on_error='skip', which leaves out what cannot be read"
    )


def _unknown(one: str, other: str) -> bool:
    """Whether one of two kinds of values may be the other: it has nothing but nulls."""
    short = {one, other} & {"null", "list"}
    return "null" in short or (
        "list" in short and all(kind.startswith("list") for kind in (one, other))
    )


def check_schemas(
    files: Sequence[File], found: Sequence[Found], columns: Columns
) -> None:
    """Refuse files whose rows have other columns than those of the first file."""
    known = [(file, dict(each.schema)) for file, each in zip(files, found, strict=True)]
    known = [(file, schema) for file, schema in known if schema]
    for file, schema in known:
        first, wanted = known[0]
        if missing := set(columns or ()) - wanted.keys():
            raise DataError(
                f"the columns {sorted(missing)} are wanted, but {first.url} has "
                f"{sorted(wanted)}; choose among those"
            )
        names = wanted.keys() | schema.keys() if columns is None else set(columns)
        for name in sorted(names):
            one, other = wanted.get(name, "absent"), schema.get(name, "absent")
            if one != other and not _unknown(one, other):
                raise DataError(
                    f"files with the same columns are wanted, but {name!r} is {one} in "
                    f"{first.url} and {other} in {file.url}; write them alike, choose "
                    "others with columns=, or read them by a from_files each"
                )
