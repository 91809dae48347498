"""Rows of files come as they were written, from any place, each once, in order."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import tarfile

import fsspec
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch.utils.data import ConcatDataset, DataLoader

from accelx.data import files_cache
from accelx.data.files import from_files
from accelx.data.formats import jsonl, ranged, runs
from accelx.data.formats.safetensors import DTYPES
from accelx.errors import DataError
from accelx.loader import as_loader, batches
from accelx.rows import rows_of as mark_of
from tests.unit.data import written
from tests.unit.data.written import FORMATS, bytes_of, plain, rows_of, wanted

each_format = pytest.mark.parametrize("form", FORMATS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 300 bytes, so that files of a few rows have several."""
    monkeypatch.setattr(runs, "RUN", 300)
    monkeypatch.setattr("accelx.data.formats.safetensors.RUN", 100)


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    """The URL of a new folder, on disk and in memory."""
    if request.param == "disk":
        yield str(tmp_path)
        return
    fs = fsspec.filesystem("memory")
    yield "memory://data"
    fs.rm("/data", recursive=True)


def put(folder, name, data):
    """Write a file, by fsspec itself."""
    with fsspec.open(f"{folder}/{name}", "wb") as file:
        file.write(data)
    return f"{folder}/{name}"


def put_three(folder, form, counts=(20, 1, 30)):
    """Files of that many rows; their pattern, and all rows."""
    start = 0
    for number, count in enumerate(counts):
        data = bytes_of(form, rows_of(start, start + count))
        put(folder, f"part-{number}.{form}", data)
        start += count
    return f"{folder}/part-*.{form}", rows_of(0, start)


@each_format
def test_rows_come_as_they_were_written(form, folder):
    """One by one, by lists, from the end, and by a pattern in the order of names."""
    pattern, rows = put_three(folder, form)
    files = from_files(pattern)
    one_by_one = [plain(form, files[i]) for i in range(len(files))]
    assert one_by_one == wanted(form, rows)
    some = [50, 3, 3, 20, 0]
    found = [plain(form, item) for item in files.__getitems__(some)]
    assert found == [wanted(form, rows)[i] for i in some]
    assert plain(form, files[-1]) == wanted(form, rows)[-1]
    assert len(files._blocks.rows) >= 7
    assert files.skipped == ()
    for beyond in (51, -52):
        with pytest.raises(IndexError, match="51 rows"):
            files[beyond]


@each_format
def test_blocks_are_of_whole_rows(form, tmp_path, monkeypatch):
    """A file read block by block is the file; a block holds several rows."""
    monkeypatch.setattr(runs, "RUN", 5000 if form == "tar" else 300)
    pattern, rows = put_three(tmp_path, form, (40,))
    files = from_files(pattern)
    sizes = files._blocks.rows.tolist()
    assert sum(sizes) == len(rows)
    assert max(sizes) > 1
    assert len(sizes) > 1


@each_format
def test_an_item_is_the_readers_own(form, tmp_path):
    """What is done to an item is not seen by who reads the row again."""
    pattern, _ = put_three(tmp_path, form)
    files = from_files(pattern)
    before = str(files[3])
    item = files[3]
    for value in item.values():
        if isinstance(value, torch.Tensor):
            value.zero_()
        elif isinstance(value, list):
            value.append("more")
    item["new"] = 1
    assert str(files[3]) == before


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same(context, tmp_path):
    """torch's own DataLoader over the files, in workers, is the plain list."""
    pattern, rows = put_three(tmp_path, "parquet")
    files = from_files(pattern)
    assert files[0] == rows[0]  # the parent has read before its workers do
    loader = DataLoader(
        files,
        8,
        num_workers=2 if context == "fork" else 1,  # which takes seconds to start
        collate_fn=list,
        multiprocessing_context=multiprocessing.get_context(context),
    )
    assert [row for batch in loader for row in batch] == rows


@each_format
def test_a_pickled_dataset_is_the_same(form, folder):
    """Without the blocks that the first one keeps."""
    pattern, _ = put_three(folder, form)
    files = from_files(pattern)
    here = files[7]
    copy = pickle.loads(pickle.dumps(files))
    assert copy._cache.reads == 0
    assert str(copy[7]) == str(here)
    assert (len(copy), copy.skipped) == (len(files), files.skipped)
    assert repr(copy) == f"<Files: 51 rows of 3 {form} files>"


@pytest.mark.parametrize(
    ("form", "columns"),
    [
        *(("parquet", ["tags", "i"]), ("arrow", ["tags", "i"])),
        *(
            ("jsonl", ["tags", "i"]),
            ("tar", ["cls", "__key__"]),
            ("safetensors", ["x"]),
        ),
    ],
)
def test_columns_are_chosen_in_their_order(form, columns, tmp_path):
    """An item has these keys and no others; one that is nowhere is refused."""
    pattern, _ = put_three(tmp_path, form)
    whole, some = from_files(pattern), from_files(pattern, columns=columns)
    for i in (0, 20, 50):
        assert list(some[i]) == columns
        assert str(some[i]) == str({name: whole[i][name] for name in columns})
    with pytest.raises(DataError, match=r"absent.*choose among"):
        from_files(pattern, columns=["absent"])[0]


def test_files_are_in_the_order_of_the_list(tmp_path):
    """Patterns by name, one after another as they are given; Paths are taken."""
    names = ["b-2.jsonl", "b-1.jsonl", "a.jsonl", "c.txt"]
    for i, name in enumerate(names):
        put(tmp_path, name, written.jsonl(rows_of(i, i + 1)))
    urls = [f"{tmp_path}/b-*.jsonl", tmp_path / "a.jsonl", f"file://{tmp_path}/c.txt"]
    files = from_files(urls, format="jsonl")
    assert [row["i"] for row in map(files.__getitem__, range(4))] == [1, 0, 2, 3]
    assert [file.name for file in files.files] == sorted(names[:2]) + names[2:]


def test_a_pattern_may_span_folders(folder):
    """Files of one name in several folders are told apart."""
    for name in ("x", "y"):
        put(f"{folder}/{name}", "f.jsonl", written.jsonl(rows_of(0, 2)))
    files = from_files(f"{folder}/*/f.jsonl")
    assert [file.url.rpartition("data/")[2][-9:] for file in files.files] == [
        "x/f.jsonl",
        "y/f.jsonl",
    ]
    assert [files[i]["i"] for i in range(4)] == [0, 1, 0, 1]


def test_paths_are_taken_as_a_shell_takes_them(tmp_path, monkeypatch):
    """Relative, from the home folder, by a link, and with a name that has no folder."""
    put(tmp_path / "real", "a.jsonl", written.jsonl(rows_of(0, 2)))
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "real" / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for url in ("b.jsonl", "./b.jsonl", "*.jsonl", "~/b.jsonl", "real/../b.jsonl"):
        files = from_files(url)
        assert [files[i] for i in range(2)] == rows_of(0, 2)
        assert files.files[0].size == (tmp_path / "b.jsonl").stat().st_size


def test_many_urls_share_one_folder():
    """And one filesystem, whose connections take time to make."""
    for i in range(30):
        put("memory://many", f"{i}.jsonl", written.jsonl(rows_of(i, i + 1)))
    files = from_files([f"memory://many/{i}.jsonl" for i in range(30)])
    assert [files[i]["i"] for i in range(30)] == list(range(30))
    assert len({id(file.store) for file in files.files}) == 1


LINES = st.lists(
    st.one_of(
        st.sampled_from(["", "  ", "\t"]),
        st.dictionaries(st.text(max_size=3), st.text(max_size=99), max_size=2),
    ),
    max_size=20,
)


@settings(max_examples=60)
@given(LINES, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.integers(1, 99))
def test_lines_are_what_json_reads(lines, end, ended, chunk):
    """Blank lines are none; ends of lines, of the file and of what is read at once."""
    texts = [
        x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines
    ]
    data = end.join([*texts, ""] if ended else texts).encode()
    rows = [json.loads(line) for line in data.split(b"\n") if line.strip()]
    put("memory://lines", "a.jsonl", data or b" ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "CHUNK", chunk)
        if not rows:
            with pytest.raises(DataError, match=r"rows are wanted.*have none"):
                from_files("memory://lines/a.jsonl")
            return
        files = from_files("memory://lines/a.jsonl")
    assert files.__getitems__(list(range(len(files)))) == rows


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.sampled_from([pa.ipc.new_file, pa.ipc.new_stream]),
    st.sampled_from([None, "lz4", "zstd"]),
)
def test_record_batches_are_those_of_pyarrow(sizes, kind, compression):
    """Of files and streams, compressed or not, with dictionaries that change."""
    out = pa.BufferOutputStream()
    text = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema([("i", pa.int64()), ("word", text)])
    options = pa.ipc.IpcWriteOptions(
        compression=compression, emit_dictionary_deltas=kind is pa.ipc.new_file
    )
    rows, words = [], []
    with kind(out, schema, options=options) as writer:
        for number, size in enumerate(sizes):
            words = [*words, f"word {number}", "é" * number]
            if kind is pa.ipc.new_stream:  # which may replace a dictionary
                words = words[-2:]
            codes = pa.array([i % len(words) for i in range(size)], pa.int32())
            column = pa.DictionaryArray.from_arrays(codes, pa.array(words))
            batch = pa.record_batch([pa.array(range(size)), column], schema=schema)
            writer.write_batch(batch)
            rows += batch.to_pylist()
    put("memory://batches", "a.arrow", out.getvalue().to_pybytes())
    if not rows:
        with pytest.raises(DataError, match="rows are wanted"):
            from_files("memory://batches/a.arrow")
        return
    files = from_files("memory://batches/a.arrow")
    assert files._blocks.rows.tolist() == [size for size in sizes if size]
    assert files.__getitems__(list(range(len(files)))) == rows


@pytest.mark.parametrize("verify", [False, True])
def test_views_of_text_are_text(verify, tmp_path):
    """As Polars writes it: in an order of any kind, beside a file of plain text."""
    columns = {
        "text": pa.array([None, *(f"row {i} " * i for i in range(19))]),
        "bytes": pa.array([b"\0" * i for i in range(20)]),
    }
    views = [(pa.string_view(), columns["text"]), (pa.binary_view(), columns["bytes"])]
    made = [pa.array(column.to_pylist(), kind) for kind, column in views]
    for name, table in (
        ("a", pa.table(columns)),
        ("b", pa.table(made, names=list(columns))),
    ):
        with pa.ipc.new_file(tmp_path / f"{name}.arrow", table.schema) as out:
            out.write_table(table, max_chunksize=6)
    files = from_files(tmp_path / "*.arrow", on_error="skip", verify=verify)
    assert not files.skipped
    rows = 2 * pa.table(columns).to_pylist()
    assert files.__getitems__(list(range(39, -1, -1))) == rows[::-1]


@pytest.mark.parametrize("style", ["ustar", "gnu", "pax"])
def test_samples_of_a_tar_are_neighbours_of_one_key(style, tmp_path):
    """Long names, folders and links, and the names that WebDataset passes over."""
    styles = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT}
    long = "d" * 90 if style == "ustar" else "ü" * 200
    members = [
        *(("a/1.b/x.jpg", b"1"), ("a/1.b/x.seg.png", b"2" * 600), ("a/y.jpg", b"")),
        *(("__meta__.json", b"no"), (f"{long}/z.JPG", b"3"), ("plain", b"no")),
        *((".hidden", b"no"), ("a/y.cls", b"4"), ("a/y.jpg", b"5")),
    ]
    with tarfile.open(
        tmp_path / "a.tar", "w", format=styles.get(style, tarfile.PAX_FORMAT)
    ) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("a/y.link")
        link.type, link.linkname = tarfile.SYMTYPE, "a/y.jpg"
        archive.addfile(link)
    files = from_files(tmp_path / "a.tar")
    assert files.__getitems__(list(range(len(files)))) == [
        {"__key__": "a/1.b/x", "jpg": b"1", "seg.png": b"2" * 600},
        {"__key__": "a/y", "jpg": b""},
        {"__key__": f"{long}/z", "jpg": b"3"},
        {"__key__": "a/y", "cls": b"4", "jpg": b"5"},
    ]


def test_every_dtype_of_torch_comes_back(tmp_path):
    """Rows of one, two and no further dimensions, bit for bit."""
    data = torch.randint(0, 2, (9, 16), dtype=torch.uint8)
    kept = {
        name: data.view(dtype).clone() if name != "BOOL" else data.bool()
        for name, dtype in DTYPES.items()
    }
    kept["flat"], kept["none"] = torch.arange(9), torch.empty(9, 0)
    save_file(kept, tmp_path / "a.safetensors")
    files = from_files(tmp_path / "a.safetensors")
    for i, item in enumerate(files.__getitems__(list(range(9)))):
        assert item.keys() == kept.keys()
        for name, value in item.items():
            assert value.dtype == kept[name].dtype
            assert value.shape == kept[name][i].shape
            same = value.reshape(-1).view(torch.uint8), kept[name][i].reshape(-1)
            assert torch.equal(same[0], same[1].view(torch.uint8)), name


class Counted:
    """Counts the bytes and requests of what is read by ranges."""

    def __init__(self, monkeypatch):
        self.asked = []
        reading = ranged.storage.reading
        monkeypatch.setattr(
            ranged.storage, "reading", lambda *at: self.open(reading(*at))
        )

    def open(self, opened):
        counted = self.asked

        class Opened:
            def __enter__(self):
                read_into = opened.__enter__()

                def counting(offset, out):
                    counted.append((offset, out.nbytes))
                    read_into(offset, out)

                return counting

            def __exit__(self, *error):
                return opened.__exit__(*error)

        return Opened()


def test_only_what_is_wanted_is_read(tmp_path, monkeypatch):
    """The index reads footers and headers, and a block the chosen columns, at once."""
    rows = [{"i": i, "big": "x" * 1000 + str(i) * 99} for i in range(20_000)]
    big = put(tmp_path, "a.parquet", written.parquet(rows, group=10_000))
    size = len((tmp_path / "a.parquet").read_bytes())
    monkeypatch.setattr(ranged, "GAP", 1000)
    counted = Counted(monkeypatch)
    files = from_files(big, columns=["i"])
    assert sum(n for _, n in counted.asked) <= 2**16 < size / 10
    counted.asked.clear()
    files._cache.part(0, lambda: files._load(*files._block(0)))
    assert len(counted.asked) == 2  # the footer, and the column
    assert sum(n for _, n in counted.asked) <= 2**17 + 2**16


def test_a_large_member_is_passed_over(tmp_path, monkeypatch):
    """The scan of a tar reads headers, not what lies between them."""
    (tmp_path / "x").write_bytes(bytes(5 * 2**20))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(4):
            archive.add(tmp_path / "x", f"{i}.bin")
    counted = Counted(monkeypatch)
    files = from_files(tmp_path / "a.tar")
    assert len(files) == 4
    assert sum(n for _, n in counted.asked) < 8 * 2**20
    assert len(files[3]["bin"]) == 5 * 2**20


def test_close_ranges_are_one():
    """In order, and no byte is lost."""
    assert ranged.merged([(9, 12), (0, 4), (3, 7)]) == [(0, 12)]
    far = 2**21
    assert ranged.merged([(far, far + 1), (0, 4)]) == [(0, 4), (far, far + 1)]


# Order and cache.


@each_format
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_loader_gives_each_row_once(form, shuffle, tmp_path):
    """Over three ranks the rows are the plain list's, each once: L10 for files."""
    pattern, rows = put_three(tmp_path, form)
    files = from_files(pattern)
    source = DataLoader(files, 8, shuffle=shuffle, collate_fn=collated)
    found, two = [], []
    for world, into in ((3, found), (2, two)):
        loaders = [as_loader(source, seed=1, rank=r, world=world) for r in range(world)]
        for step in zip(*map(batches, loaders), strict=True):
            for batch in step:
                into += batch["rows"][: mark_of(batch).rows]
    assert [str(row) for row in found] == [str(row) for row in two]
    ours = [plain(form, item) for item in found]
    assert sorted(map(str, ours)) == sorted(map(str, wanted(form, rows)))
    assert (ours == wanted(form, rows)) is not shuffle


def collated(items):
    """Rows as they are, beside a tensor that carries the mark."""
    return {"rows": items, "count": torch.tensor(len(items))}


def test_an_epoch_reads_each_block_once(tmp_path):
    """In one process; a full permutation with as small a memory reads them often."""
    put(tmp_path, "a.jsonl", written.jsonl(rows_of(0, 3000)))
    files = from_files(tmp_path / "a.jsonl")
    blocks = len(files._blocks.rows)
    assert blocks > 300
    order = files.order_at(
        torch.arange(3000), shuffle=True, seed=0, epoch=0, batch_size=16
    )
    for batch in order.split(16):
        files.__getitems__(batch.tolist())
    assert files._cache.reads <= blocks + 8 * 12 + 1
    control = from_files(tmp_path / "a.jsonl")
    for batch in torch.randperm(3000).split(16):
        control.__getitems__(batch.tolist())
    assert control._cache.reads > 1.3 * blocks


def test_idle_blocks_are_let_go(tmp_path):
    """Reading on, a process keeps the blocks that it is at, and no long tail."""
    put(tmp_path, "a.jsonl", written.jsonl(rows_of(0, 6_000)))
    files = from_files(tmp_path / "a.jsonl")
    kept = []
    for start in range(0, 6_000, 10):
        files.__getitems__(list(range(start, start + 10)))
        kept.append(len(files._cache._parts))
    assert files._cache.reads == len(files._blocks.rows) > 600
    assert max(kept) <= files_cache.BLOCKS
    assert files._cache._nbytes < 200_000
    for _ in range(60):
        files.__getitems__([0] * 1000)
    assert len(files._cache._parts) == 1


def test_memory_is_bounded(tmp_path, monkeypatch):
    """In bytes too, but the block that is read last is always kept."""
    put(tmp_path, "a.jsonl", written.jsonl(rows_of(0, 1000)))
    for most in (1, 2000):
        monkeypatch.setattr(files_cache, "BYTES", most)
        files = from_files(tmp_path / "a.jsonl")
        for i in range(1000):
            files[i]
            cache = files._cache
            assert cache._nbytes <= most or len(cache._parts) == 1
            assert cache._nbytes == sum(p.nbytes for p, _ in cache._parts.values())
        assert cache.reads == len(files._blocks.rows)


def test_rows_of_several_datasets_stand_together(tmp_path):
    """A map-style dataset as others are: torch's ConcatDataset takes it."""
    pattern, rows = put_three(tmp_path, "parquet")
    both = ConcatDataset([from_files(pattern), from_files(pattern)])
    assert [both[i] for i in (0, 50, 51)] == [rows[0], rows[50], rows[0]]
