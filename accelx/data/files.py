"""Rows of files at any URL as a map-style dataset, in an order that reads them once."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import attrs
import torch
from torch import Tensor
from torch.utils.data import Dataset

from accelx.data import blocks as order, files_at, files_index
from accelx.data.blocks import Blocks
from accelx.data.files_cache import Cache
from accelx.data.files_index import Reading, Skipped
from accelx.data.formats.format import Block, File, FlawedError, Part, Row, here
from accelx.errors import DataError
from accelx.permutation import key
from accelx.records import Env

READERS = 8  # blocks of remote files that are read at the same time


@attrs.frozen(eq=False, repr=False)
class Files(Dataset[Row]):
    """The rows of files, in the files' order: what `from_files` makes.

    An item is a dict that is yours to change. Each process opens the files by itself
    and keeps the blocks that it is in the middle of; a pickled copy keeps none.
    """

    files: tuple[File, ...]
    skipped: tuple[Skipped, ...]  # what cannot be read and is left out
    _reading: Reading
    _blocks: Blocks
    _table: Tensor  # (blocks, 3) int64: number of the file, start, stop
    _cache: Cache = attrs.field(factory=Cache, init=False)

    def __repr__(self) -> str:
        form = self._reading.form.name
        return f"<Files: {len(self)} rows of {len(self.files)} {form} files>"

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def content(self) -> int:
        """By which ranks see that they read the same files: names, sizes, rows."""
        told = repr([(file.name, file.size) for file in self.files]).encode()
        return key(zlib.crc32(told), len(told), len(self))

    def __getitem__(self, index: int) -> Row:
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"an index of {n} rows is wanted, got {index}; write less")
        return self.__getitems__([int(index) % n])[0]

    def __getitems__(self, indices: list[int]) -> list[Row]:
        """The rows at `indices`, in their order; a block is looked up once."""
        found = self._rows(indices)
        self._cache.took(len(indices))
        return found

    def order_at(
        self,
        positions: Tensor,
        *,
        shuffle: bool,
        seed: int,
        epoch: int,
        batch_size: int,
    ) -> Tensor:
        """The indices that stand at `positions` of an epoch: int64, of the same shape.

        Law: over all positions each index comes once. Shuffled, a batch draws from few
        blocks and each block has few readers; see accelx/data/blocks.py.
        """
        if not shuffle:
            return positions
        return order.order_at(
            self._blocks, positions, seed=seed, epoch=epoch, batch_size=batch_size
        )

    def _rows(self, indices: Sequence[int]) -> list[Row]:
        at, rows = order.locate(self._blocks, torch.tensor(indices, dtype=torch.int64))
        where: dict[int, list[int]] = {}
        for i, block in enumerate(at.tolist()):
            where.setdefault(block, []).append(i)
        self._ahead(list(where))
        found: list[Any] = [None] * len(indices)
        wanted = rows.tolist()
        for block, places in where.items():
            for i, row in zip(
                places, self._taken(block, [wanted[i] for i in places]), strict=True
            ):
                found[i] = row
        return found

    def _ahead(self, numbers: list[int]) -> None:
        """Read what is missing of remote files at the same time, a batch's worth."""
        missing = self._cache.missing(numbers)[:READERS]
        files = [self._block(number)[0] for number in missing]
        if len(missing) < 2 or all(file.store.local for file in files):
            return
        # fsspec gives each thread a filesystem of its own, with connections to make
        jobs = [(n, here(file)) for n, file in zip(missing, files, strict=True)]
        with ThreadPoolExecutor(READERS, thread_name_prefix="accelx-block") as pool:
            for job in [pool.submit(self._taken, n, [], file) for n, file in jobs]:
                job.result()

    def _taken(self, number: int, rows: list[int], at: File | None = None) -> list[Row]:
        file, block = self._block(number)
        try:
            load = partial(self._load, at or file, block)
            part = self._cache.part(number, load)
            return part.take(rows) if rows else []
        except FlawedError as error:
            said = files_index.flawed(file, self._reading.form, str(error))
            raise DataError(
                f"{said}; it is found beforehand with verify=True"
            ) from error

    def _block(self, number: int) -> tuple[File, Block]:
        file, start, stop = self._table[number].tolist()
        return self.files[file], Block(start, stop, int(self._blocks.rows[number]), 0)

    def _load(self, file: File, block: Block) -> Part:
        part = self._reading.form.load(file, block, self._reading.columns)
        if part.rows != block.rows:
            raise FlawedError(
                f"{part.rows} rows are where {block.rows} were when it was listed"
            )
        return part


def from_files(
    urls: files_at.Url | Sequence[files_at.Url],
    *,
    format: Literal["parquet", "arrow", "jsonl", "tar", "safetensors"] | None = None,
    columns: Sequence[str] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    verify: bool = False,
    env: Env | None = None,
) -> Files:
    """The rows of Parquet, Arrow, JSON Lines, tar or safetensors files, as a dataset.

    `urls` are paths, URLs of any fsspec filesystem, or patterns, whose files come by
    name. `format` is said by the suffix. `columns` are the keys of an item, in their
    order: all by default. What cannot be read raises DataError, or with
    `on_error="skip"` is left out, told in a warning and in `Files.skipped`; `verify`
    reads every block beforehand, so that none is found later. Effects: lists the files
    and reads their footers or headers, of JSON Lines all of it. With an `env` of
    several ranks each reads its share, and all must call it.

    An item is a dict: of tar {"__key__": ..., extension: bytes}, of safetensors {name:
    tensor}. Raises DataError for what is absent, empty, or differs from file to file,
    MissingExtraError without pyarrow for Parquet and Arrow.
    """
    if on_error not in ("raise", "skip"):
        raise DataError(
            f"on_error wants 'raise' or 'skip', got {on_error!r}; write "
            "on_error='skip' to leave out what cannot be read"
        )
    chosen = _columns(columns)
    files = files_index.from_main(env, lambda: files_at.listed(urls))
    form = files_at.format_of(files, format)
    reading = Reading(form, chosen, on_error == "skip", verify)
    found = files_index.scanned(env, files, reading)
    files_index.check_schemas(files, found, chosen)
    made = _files(files, found, reading)
    if env is None or env.main:
        _report(made.skipped)
    return made


def _columns(columns: Sequence[str] | None) -> tuple[str, ...] | None:
    if columns is None:
        return None
    if isinstance(columns, str) or not columns or len(set(columns)) < len(columns):
        raise DataError(
            f"columns wants names, each once, got {columns!r}; write columns=['text'], "
            "or leave it out for all"
        )
    return tuple(columns)


def _files(
    files: Sequence[File], found: Sequence[files_index.Found], reading: Reading
) -> Files:
    table = torch.cat([each.blocks for each in found])
    counts = torch.tensor([len(each.blocks) for each in found])
    skipped = tuple(part for each in found for part in each.skipped)
    if not len(table):
        lost = f", and {len(skipped)} parts cannot be read" if skipped else ""
        raise DataError(
            f"rows are wanted, but the {len(files)} files from {files[0].url} on have "
            f"none{lost}; look whether what wrote them had ended"
        )
    number = torch.arange(len(files)).repeat_interleave(counts)
    return Files(
        tuple(
            attrs.evolve(file, heads=each.heads)
            for file, each in zip(files, found, strict=True)
        ),
        skipped,
        reading,
        Blocks(table[:, 2].clone(), int(table[:, 3].double().mean())),
        torch.stack([number, table[:, 0], table[:, 1]], dim=1),
    )


def _report(skipped: Sequence[Skipped]) -> None:
    if not skipped:
        return
    rows = sum(each.rows or 0 for each in skipped)
    more = " or more" if any(each.rows is None for each in skipped) else ""
    first = skipped[0]
    warnings.warn(
        f"{rows}{more} rows cannot be read and are left out, in {len(skipped)} parts: "
        f"the first is in {first.file}, where {first.what}; see Files.skipped",
        stacklevel=3,
    )
