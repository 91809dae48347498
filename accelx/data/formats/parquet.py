"""Parquet: a block is a row group, of which the chosen columns' bytes are read.

The index is made of footers. A process that reads a row group reads the footer again,
once for each file that it is at.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from accelx.data.formats import tables
from accelx.data.formats.format import Block, Columns, File, Format, Scan, told
from accelx.data.formats.ranged import ranged

FOOTER = 2**16  # bytes at the end that are read at once: most footers are shorter


def scan(file: File, careful: bool) -> Scan:
    """The row groups that the footer names."""
    del careful
    footer = _footer(file)
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    blocks = tuple(
        Block(i, i + 1, group.num_rows, group.total_byte_size)
        for i, group in enumerate(groups)
        if group.num_rows
    )
    schema = tables.kinds(footer.schema.to_arrow_schema(), file.url)
    return Scan(blocks, schema=schema)


def _footer(file: File) -> Any:
    parquet = tables.packages(file.url).parquet
    last = max(0, file.size - FOOTER)
    with told("its footer"), ranged(file, [(last, file.size)]) as opened:
        return parquet.read_metadata(opened)


# Data without a handle, so that a fork may keep it.
_kept = lru_cache(maxsize=64)(_footer)


def load(file: File, block: Block, columns: Columns) -> tables.Table:
    """The rows of one row group."""
    parquet = tables.packages(file.url).parquet
    footer = _kept(file)
    names = footer.schema.to_arrow_schema().names
    tables.check_columns(columns, names, file)
    with (
        told(f"row group {block.start}"),
        ranged(file, _ranges(footer.row_group(block.start), columns)) as opened,
    ):
        reader = parquet.ParquetFile(
            opened, metadata=footer, pre_buffer=False, page_checksum_verification=True
        )
        chosen = None if columns is None else list(columns)
        group = reader.read_row_group(block.start, chosen, use_threads=False)
    return tables.table_of(group, columns, file)


def _ranges(group: Any, columns: Columns) -> list[tuple[int, int]]:
    """The bytes of the chosen columns."""
    found: list[tuple[int, int]] = []
    for chunk in map(group.column, range(group.num_columns)):
        if columns is None or chunk.path_in_schema.partition(".")[0] in columns:
            starts = [chunk.dictionary_page_offset, chunk.data_page_offset]
            start = min(at for at in starts if at)
            found.append((start, start + chunk.total_compressed_size))
    return found


FORMAT = Format("parquet", (".parquet", ".pq"), scan, load)
