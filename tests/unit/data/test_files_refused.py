"""Files that are absent, unlike, damaged or cut short are refused, or left out."""

from __future__ import annotations

import io
import struct
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from accelx.data.files import from_files
from accelx.data.files_index import Skipped
from accelx.data.formats import runs
from accelx.errors import DataError, StorageError
from tests.unit.data import written
from tests.unit.data.written import bytes_of, plain, rows_of, wanted


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 300 bytes, so that files of a few rows have several."""
    monkeypatch.setattr(runs, "RUN", 300)


def put(folder, name, data):
    """Write a file."""
    (folder / name).write_bytes(data)
    return folder / name


# Damage.


def flipped(data, at):
    """The bytes with one of them changed."""
    data = bytearray(data)
    data[at] ^= 0xFF
    return bytes(data)


def line(data, number, text):
    """JSON Lines with another line `number`."""
    lines = data.split(b"\n")
    lines[number] = text
    return b"\n".join(lines)


def batch_at(data, number):
    """Where record batch `number` of an Arrow stream begins."""
    from accelx.data.formats.messages import BATCH, messages

    every = [m for m in messages(io.BytesIO(data), len(data)) if m.kind == BATCH]
    return every[number].start


SECOND = 4 * 512  # where the second sample of a tar begins, and each takes as much
ROWS = rows_of(0, 20)
STREAM = written.arrow(ROWS, kind=pa.ipc.new_stream)
PARQUET, ARROW, LINES, TAR = (
    bytes_of(form, ROWS) for form in ("parquet", "arrow", "jsonl", "tar")
)
TENSORS = bytes_of("safetensors", ROWS)
UNEVEN = save({"a": torch.zeros(3), "b": torch.zeros(2)})
TWICE = written.tar([*ROWS[:3], ROWS[2], *ROWS[3:]])

# format, bytes, words of the error, rows that are left, rows that are known as lost
DAMAGES = [
    ("parquet", PARQUET[:-9], "its footer", 0, None),
    ("parquet", flipped(PARQUET, -8), "its footer", 0, None),
    ("parquet", b"text", "its footer", 0, None),
    ("arrow", ARROW[: len(ARROW) // 2], "cut short at byte .*, before", 7, None),
    ("arrow", ARROW[:-3], "within its footer", 20, None),
    ("arrow", STREAM[:-8], "cut short at byte .*, before its end mark", 20, None),
    ("arrow", flipped(STREAM, batch_at(STREAM, 1)), "no message at byte", 7, None),
    ("arrow", flipped(STREAM, batch_at(STREAM, 2) + 6), "cut short at byte", 14, None),
    ("arrow", b"FEA1" + bytes(90), "no message at byte 0", 0, None),
    ("jsonl", line(LINES, 4, b"{"), "line 5: '{' is no JSON", 19, 1),
    ("jsonl", line(LINES, 0, b"[1]"), r"line 1: '\[1\]' is no JSON object", 19, 1),
    ("jsonl", line(LINES, 19, b"\xff" * 99), "line 20: .* is no JSON", 19, 1),
    ("jsonl", line(LINES, 7, b"[" * 10**5), "line 8: .* is no JSON", 19, 1),
    # Where the next header cannot be read, nobody knows whether the sample was whole.
    ("tar", flipped(TAR, SECOND), "header at byte 2048 is damaged", 0, None),
    ("tar", flipped(TAR, 2 * SECOND), "header at byte 4096 is damaged", 1, None),
    ("tar", TAR[: 2 * SECOND], "header at byte 4096 .* cut short", 1, None),
    ("tar", TAR[: 2 * SECOND + 9], "header at byte 4096 .* cut short", 1, None),
    ("tar", TAR[: 3 * SECOND - 9], "member 'part/00002.cls' is cut short", 2, None),
    ("tar", b"text", "it is no tar", 0, None),
    ("tar", TWICE, "the sample 'part/00002' has 'json|cls' twice", 19, 1),
    ("safetensors", TENSORS[:-9], "it is cut short", 0, None),
    ("safetensors", flipped(TENSORS, 7), "its header would have", 0, None),
    ("safetensors", flipped(TENSORS, 9), "its header: ", 0, None),
    ("safetensors", UNEVEN, "no leading dimension in common", 0, None),
    ("safetensors", b"", "it is empty", 0, None),
]


@pytest.mark.parametrize(("form", "data", "words", "left", "lost"), DAMAGES)
def test_damage_is_refused_or_left_out(form, data, words, left, lost, tmp_path):
    """The error names file and place; left out, the other rows come, and it is told."""
    rows = rows_of(20, 30)
    put(tmp_path, "0.bad", data)
    put(tmp_path, "1.bad", bytes_of(form, rows))
    settings = {"format": form, "verify": form == "jsonl"}
    with pytest.raises(DataError, match=f"0.bad is wanted as {form}, but .*on_error="):
        from_files(f"{tmp_path}/*.bad", **settings)
    with pytest.warns(UserWarning, match=f"left out, in 1 parts.*0.bad.*{words}"):
        files = from_files(f"{tmp_path}/*.bad", on_error="skip", **settings)
    assert len(files) == left + 10
    found = [plain(form, files[i]) for i in range(len(files))]
    assert found[left:] == wanted(form, rows)
    assert all(row in wanted(form, ROWS) for row in found[:left])
    (skipped,) = files.skipped
    assert skipped == Skipped(f"file://{tmp_path}/0.bad", skipped.what, lost)


@pytest.mark.parametrize(
    ("form", "data"),
    [
        *(("parquet", PARQUET), ("arrow", ARROW), ("arrow", STREAM), ("jsonl", LINES)),
        *(("tar", TAR), ("safetensors", TENSORS)),
    ],
)
def test_no_shortened_file_passes_for_whole(form, data, tmp_path):
    """Cut anywhere, a file is refused or has all its rows: none is lost in silence."""
    missed = []
    for size in range(0, len(data), max(1, len(data) // 150)):
        put(tmp_path, "0.bad", data[:size])
        try:
            files = from_files(tmp_path / "0.bad", format=form, verify=True)
        except DataError:
            continue
        missed.append((size, len(files)))
    whole_lines = {size for size in range(len(data)) if data[size : size + 1] == b"\n"}
    whole_lines |= {size + 1 for size in whole_lines}
    if form == "jsonl":  # has no end mark: cut after a line, it is a file of fewer
        assert {size for size, _ in missed} <= whole_lines
    else:
        assert [each for each in missed if each[1] < 20] == []


def test_control_pythons_tar_loses_samples_in_silence():
    """The control: it takes a damaged header, or the end of the file, for the end."""
    for data in (flipped(TAR, SECOND), TAR[: 2 * SECOND]):
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            assert 0 < len(archive.getnames()) < 40


def in_a_page(data):
    """A Parquet file of which one byte of a page is another: its checksum tells."""
    group = pq.read_metadata(io.BytesIO(data)).row_group(1)
    chunk = group.column(0)
    at = chunk.data_page_offset + chunk.total_compressed_size - 2
    return flipped(data, at)


def test_what_is_found_late_is_never_skipped(tmp_path):
    """A damaged page is an error when it is read, the same on each rank and worker."""
    put(tmp_path, "0.parquet", in_a_page(PARQUET))
    files = from_files(tmp_path / "0.parquet", on_error="skip")
    assert len(files) == 20
    assert files[0] == ROWS[0]
    words = r"0.parquet is wanted as parquet, but row group 1: .*with verify=True"
    with pytest.raises(DataError, match=words):
        files[7]
    with pytest.raises(DataError, match="row group 1"):
        from_files(tmp_path / "0.parquet", verify=True)
    with pytest.warns(UserWarning, match="7 rows cannot be read.*1 parts"):
        files = from_files(tmp_path / "0.parquet", on_error="skip", verify=True)
    assert [files[i] for i in range(13)] == ROWS[:7] + ROWS[14:]
    assert files.skipped[0].rows == 7


def test_a_bad_line_is_named_when_it_is_read(tmp_path):
    """Lines are counted beforehand, and parsed when they are asked for."""
    put(tmp_path, "0.jsonl", line(LINES, 4, b"{"))
    files = from_files(tmp_path / "0.jsonl")
    assert files[3] == ROWS[3]
    words = r"0.jsonl .* line \d+ after byte \d+: '{' is no"
    with pytest.raises(DataError, match=words):
        files[4]


def test_where_nothing_is_left_there_is_no_dataset(tmp_path):
    """All files damaged: an error that says how many parts cannot be read."""
    put(tmp_path, "0.parquet", b"text")
    with pytest.raises(DataError, match="have none, and 1 parts cannot be read"):
        from_files(tmp_path / "0.parquet", on_error="skip")


@pytest.mark.parametrize("kind", ["F4", "what"])
def test_a_dtype_that_torch_has_not_is_named(kind, tmp_path):
    """Neither guessed nor read as bytes."""
    header = b'{"x": {"dtype": "%s", "shape": [2], "data_offsets": [0, 1]}}'
    header %= kind.encode()
    data = struct.pack("<Q", len(header)) + header + bytes(1)
    put(tmp_path, "0.safetensors", data)
    with pytest.raises(DataError, match=f"torch has no dtype for {kind}"):
        from_files(tmp_path / "0.safetensors")


def test_columns_of_one_name_are_refused(tmp_path):
    """A dict has each key once."""
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["i", "i"])
    pq.write_table(table, tmp_path / "0.parquet")
    with pytest.raises(DataError, match=r"has \['i'\] more than once"):
        from_files(tmp_path / "0.parquet")


# What is refused.


@pytest.mark.parametrize(
    ("urls", "settings", "words"),
    [
        ([], {}, r"got|names none"),
        ("none-*.jsonl", {}, r"none-\*.jsonl, but nothing is there"),
        ("none.jsonl", {}, "none.jsonl, but nothing is there"),
        ("", {}, r"is a folder; write a pattern.*\*.parquet"),
        (["a.jsonl", "*.jsonl"], {}, "a.jsonl is named twice; name it once"),
        (["a.jsonl", "b.tar"], {}, "b.tar is tar.*a.jsonl is jsonl|a.jsonl is jsonl"),
        ("c.txt", {}, r"c.txt ends with none of .parquet.*write format="),
        ("d.jsonl.gz", {}, "d.jsonl.gz is compressed as a whole; unpack it"),
        ("a.jsonl", {"format": "csv"}, "format wants one of.*got 'csv'"),
        ("a.jsonl", {"columns": "i"}, r"columns wants names.*write columns=\['text'\]"),
        ("a.jsonl", {"columns": []}, "columns wants names"),
        ("a.jsonl", {"columns": ["i", "i"]}, "each once"),
        ("a.jsonl", {"on_error": "no"}, "on_error wants 'raise' or 'skip', got 'no'"),
        ("e.jsonl", {}, "e.jsonl is wanted as jsonl, but it is empty"),
        ("f.parquet", {}, "rows are wanted, but the 1 files from .*f.parquet"),
    ],
)
def test_what_cannot_be_is_refused(urls, settings, words, tmp_path):
    """With what was wanted, what came, and what to write instead."""
    put(tmp_path, "a.jsonl", written.jsonl(rows_of(0, 3)))
    put(tmp_path, "b.tar", written.tar(rows_of(0, 3)))
    for name in ("c.txt", "d.jsonl.gz"):
        put(tmp_path, name, b"text")
    put(tmp_path, "e.jsonl", b"")
    put(tmp_path, "f.parquet", _no_rows())
    urls = [urls] if isinstance(urls, str) else urls
    with pytest.raises(DataError, match=words):
        from_files([f"{tmp_path}/{url}" for url in urls], **settings)


def _no_rows():
    out = io.BytesIO()
    pq.write_table(pa.table({"i": pa.array([], pa.int64())}), out)
    return out.getvalue()


def put_tables(folder, *tables):
    """Tables as Parquet files."""
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"{number}.parquet")
    return f"{folder}/*.parquet"


def test_files_with_other_columns_are_refused(tmp_path):
    """Both files and the column are named; columns that are alike can be chosen."""
    pattern = put_tables(
        tmp_path, pa.table({"i": [1], "x": [1.5]}), pa.table({"i": [2], "x": ["a"]})
    )
    words = "'x' is float in .*0.parquet and text in .*1.parquet; write them alike"
    with pytest.raises(DataError, match=words):
        from_files(pattern)
    assert [dict(row) for row in from_files(pattern, columns=["i"])] == [
        {"i": 1},
        {"i": 2},
    ]
    fewer = put_tables(tmp_path, pa.table({"i": [1]}), pa.table({"i": [2], "x": ["a"]}))
    with pytest.raises(DataError, match="'x' is absent in"):
        from_files(fewer)


def test_files_whose_rows_are_alike_go_together(tmp_path):
    """Widths, nothing but nulls, dictionaries and another order change no row."""
    x = pa.array(["b"]).dictionary_encode()
    pattern = put_tables(
        tmp_path,
        pa.table({"i": pa.array([1], pa.int32()), "x": ["a"]}),
        pa.table({"x": x, "i": pa.array([2], pa.int64())}),
        pa.table({"i": [3], "x": pa.nulls(1)}),
    )
    files = from_files(pattern)
    assert [files[i] for i in range(3)] == [
        *({"i": 1, "x": "a"}, {"i": 2, "x": "b"}, {"i": 3, "x": None})
    ]


def test_a_file_that_changes_is_seen(tmp_path):
    """Gone, shortened or with other rows: an error, and never other rows in silence."""
    path = put(tmp_path, "part-0.jsonl", written.jsonl(rows_of(0, 40)))
    whole = path.read_bytes()
    for data, error, words in (
        (whole[: len(whole) // 2], StorageError, "ends there"),
        (whole.replace(b"\n", b" "), DataError, "rows are where|is no JSON"),
        (None, FileNotFoundError, "part-0.jsonl"),
    ):
        path.write_bytes(whole)
        files = from_files(path)
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(error, match=words):
            files[39]
