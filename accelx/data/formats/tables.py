"""What pyarrow does for us, in the one file that knows of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import attrs

from accelx.data.formats.format import Columns, File, Row, told
from accelx.errors import DataError, MissingExtraError


@attrs.frozen
class Packages:
    """The modules of pyarrow that are used."""

    ipc: Any
    parquet: Any
    types: Any


def packages(url: str) -> Packages:
    """pyarrow, to read `url`. Raises MissingExtraError where it is not installed."""
    try:
        from pyarrow import ipc, parquet, types
    except ImportError as error:
        raise MissingExtraError(
            f"to read {url} the package pyarrow is wanted, but it does not import "
            f"({error}); write pip install 'accelx[data]'"
        ) from None
    return Packages(ipc, parquet, types)


@attrs.frozen(eq=False)
class Table:
    """The rows of one block, in Arrow's own memory until they are asked for."""

    table: Any  # pyarrow.Table

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.table.num_rows

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return self.table.nbytes

    def take(self, rows: Sequence[int]) -> list[Row]:
        """These rows as Python objects."""
        with told("its values"):  # text that is none, or a time beyond Python's
            try:
                return self.table.take(list(rows)).to_pylist()
            except NotImplementedError:  # views, as Polars writes text, by pyarrow 26
                return [self.table.slice(row, 1).to_pylist()[0] for row in rows]


def table_of(made: Any, columns: Columns, file: File) -> Table:
    """The chosen columns of a pyarrow.Table."""
    check_columns(columns, made.schema.names, file)
    return Table(made if columns is None else made.select(list(columns)))


def check_columns(columns: Columns, names: Sequence[str], file: File) -> None:
    """Refuse columns that the file has not."""
    missing = [name for name in columns or () if name not in names]
    if missing:
        raise DataError(
            f"the columns {missing} are wanted, but {file.url} has {sorted(names)}; "
            "choose among those"
        )


def kinds(schema: Any, url: str) -> tuple[tuple[str, str], ...]:
    """Each column's name with what its values are in Python, by name.

    int32 and int64, or text with long and short offsets, give the same rows.
    """
    names = schema.names
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(
            f"columns of different names are wanted, but {url} has {twice} more than "
            "once; write it again with other names"
        )
    types = packages(url).types
    return tuple(sorted((field.name, _kind(field.type, types)) for field in schema))


def _kind(kind: Any, types: Any) -> str:
    if types.is_dictionary(kind):
        return _kind(kind.value_type, types)
    groups = {
        "int": types.is_integer,
        "float": types.is_floating,
        "text": lambda t: (
            types.is_string(t) or types.is_large_string(t) or str(t) == "string_view"
        ),
        "bytes": lambda t: any(
            is_(t)
            for is_ in (
                types.is_binary,
                types.is_large_binary,
                types.is_fixed_size_binary,
                lambda t: str(t) == "binary_view",
            )
        ),
        "list": lambda t: any(
            is_(t)
            for is_ in (types.is_list, types.is_large_list, types.is_fixed_size_list)
        ),
    }
    for name, is_ in groups.items():
        if is_(kind):
            inner = _kind(kind.value_type, types) if name == "list" else ""
            # of a list of nothing but nulls nobody can tell
            return f"list of {inner}" if inner and "null" not in inner else name
    if types.is_struct(kind):
        return f"struct of {', '.join(sorted(field.name for field in kind))}"
    if types.is_timestamp(kind):
        return "timestamp" if kind.tz is None else "timestamp with a zone"
    return str(kind).partition("<")[0].partition("[")[0]


def one_table(batches: bytes, url: str) -> Any:
    """The rows of an Arrow stream in memory, as a pyarrow.Table."""
    made = packages(url).ipc.open_stream(io.BytesIO(batches)).read_all()
    made.validate(full=True)  # offsets that lead out of its memory would crash Python
    return made
