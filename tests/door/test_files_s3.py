"""Real data from a disk and from a real S3 server: killed, resumed, each row once."""

from __future__ import annotations

import email
import gc
import http.client
import json
import os
import signal
import time
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
from accelx.testing import RankError, run
from tests.door.test_spawn_ends import runs as living
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
    lines = [(n, line) for n, f in enumerate(files) for line in _lines(f)]
    return [{"i": i, "file": n, "text": t} for i, (n, t) in enumerate(lines[:1200])]


def _lines(file):
    return file.read_text().splitlines()


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


def put(folder, form, rows, group=GROUP):
    """The rows in three files of one format, and their pattern."""
    more = {"parquet": {"group": group}, "arrow": {"batch": group}}.get(form, {})
    cuts = [0, 300, 301, len(rows)]
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


def ours(env, pattern):
    """This rank's batches: its real rows, the worker, how many blocks that has read."""
    files = from_files(pattern, env=env)
    assert files[0]["i"] == 0  # this rank has read before its workers are forked
    loader = DataLoader(
        files, BATCH, shuffle=True, num_workers=2, collate_fn=Collate(files)
    )
    tx = ax.shard_loader(env, seed=0)
    return [
        (b["rows"][: rows_of(b).rows], *b["read"].tolist()) for b in ax.feed(tx, loader)
    ]


def theirs(env, pattern):
    """What torch's own sampler gives the same ranks and workers, in the same form."""
    files = from_files(pattern, env=env)
    sampler = DistributedSampler(files, env.world, env.rank, seed=0)
    loader = DataLoader(
        files, 32, sampler=sampler, num_workers=2, collate_fn=Collate(files)
    )
    return [(b["rows"], *b["read"].tolist()) for b in loader]


def reads(ranks):
    """Blocks that all workers of all ranks have read."""
    last = {(r, w): n for r, rank in enumerate(ranks) for _, w, n in rank}
    assert len(last) == 4
    return sum(last.values())


def times(ranks):
    """How often each row came."""
    return Counter(row["i"] for rank in ranks for part in rank for row in part[0])


def test_each_block_is_read_by_one_worker(folder):
    """But where the rows of two workers meet; torch's sampler reads all everywhere."""
    rows = digits()
    pattern = put(folder, "parquet", rows)
    number = len(from_files(pattern)._blocks.rows)
    assert number > 70
    found = run(2, timeout=120)(ours)(pattern)
    # 8 lanes with the turns of 2 workers each, where the sequence begins, its tail
    assert reads(found) <= number + 8 * 2 + 2
    assert times(found) == dict.fromkeys(range(len(rows)), 1)
    if "s3" not in folder:  # the control, once
        found = run(2, timeout=120)(theirs)(pattern)
        assert reads(found) > 3 * number
        assert max(times(found).values()) == 2  # of 1797 rows two ranks read one twice


# What each format holds; rows of all are one dataset, whose readers open all of them.
HELD = {
    "parquet": lambda: digits()[:400],
    "jsonl": lambda: digits()[400:800],
    "arrow": lambda: text()[:400],
    "tar": lambda: text()[400:800],
}
EVERY, KILLED = 4, 10  # batches from save to save, and where the run is killed


def mixed(patterns, env=None):
    """The files of all patterns as one dataset, each row once an epoch."""
    files = {form: from_files(one, env=env) for form, one in patterns.items()}
    return ax.mix(files, {form: len(one) for form, one in files.items()}, seed=4)


def example(row):
    """A row as 64 numbers and a class of 10: pixels, or how often which bytes come."""
    if "pixels" in row:
        return torch.tensor(row["pixels"]).double() / 16, row["label"]
    codes = torch.tensor([*row["text"].encode()], dtype=torch.int64) % 64
    return torch.bincount(codes, minlength=64).double(), row["file"] % 10


def examples(items):
    """Rows of any format as one batch, with the name of each."""
    rows = [plain("tar" if "json" in item else "", item) for item in items]
    x, y = zip(*map(example, rows), strict=True)
    names = [f"{'text' if 'text' in row else 'digits'} {row['i']}" for row in rows]
    return {"x": torch.stack(x), "y": torch.tensor(y), "names": names}


def model():
    """The same in every run."""
    torch.manual_seed(2)
    return torch.nn.Linear(64, 10).double()


def descent(m):
    """SGD with a memory: the order of batches matters."""
    return torch.optim.SGD(m.parameters(), 0.05, momentum=0.9)


def loss(m, batch):
    """The mean over rows."""
    return torch.nn.functional.cross_entropy(m(batch["x"]), batch["y"])


def begun(log):
    """A worker_init_fn that notes the worker's process."""
    return lambda worker: note(log, worker=os.getpid())


def note(log, **said):
    """One line of the log, whole even if the process is killed right after."""
    os.write(log, json.dumps(said).encode() + b"\n")


def train(env, patterns, url, log, killed=()):
    """Train over the epoch, from the newest checkpoint; ranks of `killed` never end."""
    data = mixed(patterns, env)
    tx = ax.chain(
        ax.shard_loader(env, seed=0),
        ax.shard_model(env, "ddp"),
        ax.load_state(env, url, missing="fresh"),
        ax.save_state(env, url, every=EVERY, keep=2),
    )
    state, step = ax.init(tx, model(), descent), ax.step(tx, loss)
    note(log, rank=env.rank, begins=state.step)
    loader = DataLoader(
        data,
        BATCH,
        shuffle=True,
        num_workers=2,
        collate_fn=examples,
        worker_init_fn=begun(log),
    )
    for batch in ax.feed(tx, loader, start=state):
        if state.step == KILLED and killed:
            ax.barrier(env)  # each has noted what it did before
            if env.rank in killed:
                os.kill(os.getpid(), signal.SIGKILL)
        at = state.step
        state, _ = step(state, batch)
        rows = batch["names"][: rows_of(batch).rows]
        note(log, rank=env.rank, step=at, rows=rows)
    return dict(state.model.state_dict())


def undisturbed(patterns):
    """One process, the rows from memory in the dataset's order, a loop by hand."""
    rows = [row for form in patterns for row in HELD[form]()]
    order, m = mixed(patterns).order(), model()
    optim, names = descent(m), []
    for start in range(0, len(rows), BATCH):
        batch = examples([rows[i] for i in order[start : start + BATCH]])
        loss(m, batch).backward()
        optim.step()
        optim.zero_grad()
        names.append(batch["names"])
    return names, m.state_dict()


def trained(lines, ranks):
    """The rows of each step that all ranks have made, put together; where it began."""
    steps = {}
    for line in lines:
        if "step" in line:
            steps.setdefault(line["step"], {})[line["rank"]] = line["rows"]
    begins = {line["begins"] for line in lines if "begins" in line}
    assert len(begins) == 1
    return begins.pop(), {
        step: [name for rank in range(ranks) for name in parts[rank]]
        for step, parts in steps.items()
        if len(parts) == ranks
    }


def test_a_killed_run_goes_on_from_its_last_checkpoint(folder, tmp_path):
    """Two ranks with two workers each die by kill -9, both or one, and three go on."""
    killed = (0, 1) if "s3" in folder else (1,)
    patterns = {
        form: put(folder, form, rows(), group=50) for form, rows in HELD.items()
    }
    names, weights = undisturbed(patterns)
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
    with pytest.raises(RankError, match="SIGKILL"):
        run(2, timeout=120)(train)(patterns, f"{folder}/run", log, killed)
    first = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    saved = ax.latest(f"{folder}/run").step
    ended = run(3, timeout=120)(train)(patterns, f"{folder}/run", log)
    every = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    os.close(log)

    start, before = trained(first, 2)
    again, after = trained(every[len(first) :], 3)
    assert start == 0
    assert EVERY <= saved == again <= KILLED == len(before)
    assert [before[step] for step in range(KILLED)] == names[:KILLED]
    assert sorted(after) == list(range(saved, len(names)))
    assert [after[step] for step in sorted(after)] == names[saved:]
    seen = [name for batch in (before | after).values() for name in batch]
    assert len(seen) == len(set(seen)) == sum(len(rows()) for rows in HELD.values())
    for one in ended:
        for name, weight in weights.items():
            torch.testing.assert_close(one[name], weight, rtol=1e-9, atol=1e-9)
    assert not alive(line["worker"] for line in every if "worker" in line)


def alive(workers):
    """Which processes live on; a worker looks for its rank every few seconds."""
    left, until = set(workers), time.monotonic() + 60
    while left and time.monotonic() < until:
        left = {pid for pid in left if living(pid)}
        time.sleep(0.1)
    return left


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
