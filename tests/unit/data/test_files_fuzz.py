"""Whatever the bytes of a file are: its rows, or an error that says what is wrong."""

from __future__ import annotations

import io
import json
import random

import pyarrow as pa
import pytest

from accelx.data.files import from_files
from accelx.data.formats.format import FlawedError
from accelx.data.formats.messages import BATCH, messages
from accelx.errors import DataError
from tests.unit.data import written
from tests.unit.data.written import FORMATS, bytes_of, plain, rows_of, wanted

ROWS = rows_of(0, 30)


def damaged(data, seed):
    """Some bytes changed, a part cut out, put in, or taken twice."""
    draw = random.Random(seed)
    data = bytearray(data)
    at = draw.randrange(len(data))
    to = min(len(data), at + draw.choice([1, 1, 4, 64, 700]))
    kind = draw.choice(["flip", "flip", "zero", "cut", "twice", "noise"])
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "zero":
        data[at:to] = bytes(to - at)
    elif kind == "cut":
        del data[at:to]
    elif kind == "twice":
        data[at:at] = data[at:to]
    else:
        data[at:to] = draw.randbytes(to - at)
    return bytes(data)


def outcome(path, form, **settings):
    """The rows of a file, or the DataError that says what is wrong with it."""
    try:
        files = from_files(path, format=form, **settings)
        return [files[i] for i in range(len(files))]
    except DataError as error:
        text = str(error)
    assert str(path) in text
    assert "write" in text or "look" in text
    return None


@pytest.mark.filterwarnings("ignore:.* rows cannot be read:UserWarning")
@pytest.mark.parametrize("form", FORMATS)
def test_damage_never_crashes(form, tmp_path):
    """Nor raises what is no DataError, whether it is looked for or met; and skipped,
    what is left are rows, with no other error for what remains.
    """
    path = tmp_path / "a.bin"
    whole, refused = bytes_of(form, ROWS), 0
    for seed in range(60):
        path.write_bytes(damaged(whole, seed))
        early, late = outcome(path, form, verify=True), outcome(path, form)
        refused += early is None
        assert (early is None) or str(early) == str(late)
        outcome(path, form, verify=True, on_error="skip")
    assert refused > 10
    path.write_bytes(whole)
    found = [plain(form, item) for item in outcome(path, form, verify=True)]
    assert found == wanted(form, ROWS)  # the control


def test_a_flipped_bit_of_parquet_is_seen(tmp_path):
    """Its pages have checksums here: rows are those that were written, or none."""
    whole, seen = written.parquet(ROWS), 0
    path = tmp_path / "a.parquet"
    pages = range(4, len(whole) - int.from_bytes(whole[-8:-4], "little") - 8, 9)
    for at in pages:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        found = outcome(path, "parquet", verify=True)
        seen += found is None
        assert found is None or found == ROWS, at
    assert seen > 0.6 * len(pages)


@pytest.mark.parametrize("kind", [pa.ipc.new_file, pa.ipc.new_stream])
def test_headers_say_what_pyarrow_says(kind):
    """The rows and the place of each record batch, and a schema before them."""
    data = written.arrow(ROWS, batch=7, kind=kind)
    found = list(messages(io.BytesIO(data), len(data)))
    assert [m.rows for m in found if m.kind == BATCH] == [7, 7, 7, 7, 2]
    assert found[0].kind == 1
    schema = pa.ipc.read_schema(pa.py_buffer(data[found[0].start : found[0].stop]))
    rows = []
    for each in found[1:]:
        message = pa.ipc.read_message(data[each.start : each.stop])
        rows += pa.ipc.read_record_batch(message, schema).to_pylist()
    assert rows == ROWS
    ends = [m.stop for m in found]
    assert [m.start for m in found][1:] == ends[:-1]


def test_headers_of_noise_are_refused():
    """Random metadata in a frame that is right gives an error of ours."""
    draw = random.Random(0)
    for _ in range(300):
        size = draw.choice([8, 16, 64])
        frame = b"\xff\xff\xff\xff" + size.to_bytes(4, "little") + draw.randbytes(size)
        with pytest.raises(FlawedError):
            list(messages(io.BytesIO(frame), len(frame)))


@pytest.mark.parametrize("end", ["", "\n", "\n\n  \n"])
def test_lines_of_any_length(end, tmp_path):
    """Longer than a block, than what is read at once, and empty."""
    rows = [{"x": "y" * n} for n in (0, 10, 3 * 2**20, 1, 9 * 2**20, 2)]
    text = "\n".join(json.dumps(row) for row in rows) + end
    (tmp_path / "a.jsonl").write_text(text)
    files = from_files(tmp_path / "a.jsonl")
    assert [files[i] for i in range(len(files))] == rows
    assert files._blocks.rows.tolist() == [3, 2, 1]
