"""Real data from a disk and from a real S3 server: stopped, resumed, each row once."""

from __future__ import annotations

import email
import gc
import http.client
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.distributed import DistributedSampler

import accelx as ax
from accelx.data.files import from_files
from accelx.data.formats import runs
from accelx.rows import rows_of
from accelx.testing import run
from tests.unit.data import written
from tests.unit.data.written import plain

pytestmark = pytest.mark.door

for package in ("s3fs", "moto", "sklearn"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

GROUP = 20  # rows of a row group or a record batch
BATCH = 64


def digits():
    """The pixels and labels of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pairs = zip(data.data.astype(int).tolist(), data.target.tolist(), strict=True)
    return [{"i": i, "pixels": x, "label": y} for i, (x, y) in enumerate(pairs)]


def text():
    """Lines of the standard library's package `email`."""
    files = sorted(Path(email.__file__).parent.glob("*.py"))
    lines = [(f.name, line) for f in files for line in f.read_text().splitlines()]
    return [{"i": i, "file": f, "text": t} for i, (f, t) in enumerate(lines[:2500])]


# A worker's first connection costs half a second: each format is read of one of them.
DATA = {"digits": (digits, ["parquet", "jsonl"]), "text": (text, ["arrow", "tar"])}


@pytest.fixture(scope="module")
def moto():
    """A real S3 server with one bucket: its URL."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    made = http.client.HTTPConnection(host, port)
    made.request("PUT", "/bucket")
    assert made.getresponse().status == 200
    made.close()
    yield f"http://{host}:{port}"
    server.stop()


def forget():
    """Drop the filesystems that fsspec keeps, with their connections."""
    import s3fs

    for fs in list(s3fs.S3FileSystem._cache.values()):
        if fs._s3 is not None:
            fs.close_session(fs.loop, fs._s3creator)
    s3fs.S3FileSystem.clear_instance_cache()
    gc.collect()


@pytest.fixture(params=["disk", "s3"])
def folder(request, tmp_path, monkeypatch):
    """A new folder on the disk, or on the S3 server."""
    monkeypatch.setattr(runs, "RUN", 16384)
    if request.param == "disk":
        yield str(tmp_path)
        return
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("moto"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tops3cret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    forget()
    yield f"s3://bucket/{abs(hash(request.node.name))}"
    forget()


def put(folder, form, rows):
    """The rows in three files of one format, and their pattern."""
    more = {"parquet": {"group": GROUP}, "arrow": {"batch": GROUP}}.get(form, {})
    cuts = [0, 700, 701, len(rows)]
    for number, (start, stop) in enumerate(pairwise(cuts)):
        data = getattr(written, form)(rows[start:stop], **more)
        with fsspec.open(f"{folder}/{number}.{form}", "wb") as file:
            file.write(data)
    return f"{folder}/*.{form}"


class Collate:
    """Rows as they are, with how many blocks the process has read that read them."""

    def __init__(self, files):
        self.files = files

    def __call__(self, items):
        info = get_worker_info()
        read = torch.tensor([-1 if info is None else info.id, self.files._cache.reads])
        return {"rows": items, "read": read}


def fed(env, patterns, start, stop):
    """For each format, this rank's batches: real rows, worker, blocks it has read."""
    found = {}
    for form, pattern in patterns.items():
        files = from_files(pattern, env=env)
        plain(form, files[0])  # this rank has read before its workers are forked
        loader = DataLoader(
            files, BATCH, shuffle=True, num_workers=2, collate_fn=Collate(files)
        )
        tx = ax.shard_loader(env, seed=0)
        found[form] = [
            (
                [plain(form, x) for x in b["rows"]][: rows_of(b).rows],
                *b["read"].tolist(),
            )
            for b in ax.feed(tx, loader, start=start, stop=stop)
        ]
    return found


def joined(ranks, form):
    """The global batches, put together from every rank's."""
    steps = zip(*(rank[form] for rank in ranks), strict=True)
    return [[row for rows, _, _ in step for row in rows] for step in steps]


def one_process(pattern, form, rows):
    """The batches of one process, from the plain list and the dataset's own order."""
    n = len(rows)
    at = from_files(pattern).order_at(
        torch.arange(n), shuffle=True, seed=0, epoch=0, batch_size=BATCH
    )
    return [[rows[i] for i in part] for part in torch.split(at, BATCH)]


@pytest.mark.parametrize("data", DATA)
def test_rows_come_once_over_a_stop_and_other_ranks(data, folder):
    """Two ranks with two workers each, stopped, then three ranks: the plain list."""
    made, formats = DATA[data]
    rows = made()
    patterns = {form: put(folder, form, rows) for form in formats}
    reference = {f: one_process(p, f, rows) for f, p in patterns.items()}
    steps = -(-len(rows) // BATCH)
    middle = steps // 3
    first = run(2, timeout=120)(fed)(patterns, 0, middle)
    second = run(3, timeout=120)(fed)(patterns, middle, None)
    for form in formats:
        found = joined(first, form) + joined(second, form)
        assert len(found) == steps
        assert found == reference[form], form
        every = sorted((row for batch in found for row in batch), key=lambda r: r["i"])
        assert every == rows
        assert {worker for rank in second for _, worker, _ in rank[form]} == {0, 1}


def plainly(env, patterns):
    """What torch's own sampler gives the same ranks and workers, in the same form."""
    found = {}
    for form, pattern in patterns.items():
        files = from_files(pattern, env=env)
        sampler = DistributedSampler(files, env.world, env.rank, seed=0)
        loader = DataLoader(
            files, 32, sampler=sampler, num_workers=2, collate_fn=Collate(files)
        )
        found[form] = [(b["rows"], *b["read"].tolist()) for b in loader]
    return found


def reads(ranks, form):
    """Blocks that all workers of all ranks have read."""
    last = {(r, w): n for r, rank in enumerate(ranks) for _, w, n in rank[form]}
    assert len(last) == 4
    return sum(last.values())


def test_each_block_is_read_by_one_worker(folder):
    """But where the rows of two workers meet; torch's sampler reads all everywhere."""
    rows = digits()
    patterns = {form: put(folder, form, rows) for form in ("parquet",)}
    blocks = {f: len(from_files(p)._blocks.rows) for f, p in patterns.items()}
    ours = run(2, timeout=120)(fed)(patterns, 0, None)
    theirs = run(2, timeout=120)(plainly)(patterns)
    for form, number in blocks.items():
        assert number > 70
        # 8 lanes with the turns of 2 workers each, where the sequence begins, its tail
        assert reads(ours, form) <= number + 8 * 2 + 2
        assert reads(theirs, form) > 3 * number
        seen = Counter(
            row["i"] for rank in theirs for part in rank[form] for row in part[0]
        )
        assert max(seen.values()) == 2  # 1797 rows on two ranks: one comes twice


def test_only_ranges_of_an_object_are_read(folder):
    """The index of a Parquet file, and of its rows one row group."""
    rows = digits()
    pattern = put(folder, "parquet", rows)
    files = from_files(pattern, columns=["label"])
    assert [files[i] for i in (0, 1796)] == [
        {"label": rows[i]["label"]} for i in (0, 1796)
    ]
    assert files._cache.reads == 2


def test_a_store_that_fails_is_no_damage(folder):
    """What was not read is not skipped: the error is the store's, and goes to all."""
    pattern = put(folder, "jsonl", text())
    files = from_files(pattern)
    fs, path = fsspec.core.url_to_fs(files.files[2].url)
    fs.rm(path)
    with pytest.raises(FileNotFoundError, match=r"2\.jsonl"):
        files[len(files) - 1]
    for broken in ("s3://nosuchbucket/*.jsonl", f"{folder}/9.jsonl"):
        with pytest.raises(ax.AccelxError, match=r"nosuchbucket|9\.jsonl"):
            from_files(broken, on_error="skip")


def ahead(env, pattern):
    """In a forked rank: rows of many blocks at once, and the filesystems it took."""
    import s3fs

    files = from_files(pattern, env=env)
    found = files.__getitems__(list(range(0, 600, 30)))
    return (
        [row["i"] for row in found],
        files._cache.reads,
        len(s3fs.S3FileSystem._cache),
    )


def test_blocks_are_read_at_the_same_time(folder):
    """By threads that share one filesystem, also in a process that was forked."""
    pattern = put(folder, "parquet", digits())
    files = from_files(pattern)
    assert files[0]["i"] == 0
    for rows, reads, filesystems in run(2)(ahead)(pattern):
        assert rows == list(range(0, 600, 30))
        assert reads == 20
        assert filesystems <= 1
