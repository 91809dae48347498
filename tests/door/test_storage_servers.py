"""Real object stores, over HTTP, keep what was sent and survive bad weather."""

import base64
import gc
import hashlib
import http.client
import io
import os
import socket
import threading
import traceback
import tracemalloc
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import pytest

from accelx import storage, storage_remote, storage_retry, storage_s3
from accelx.errors import StorageError

pytestmark = pytest.mark.door

for package in ("s3fs", "gcsfs", "moto", "gcp_storage_emulator"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

MIB = 2**20
PART = 5 * MIB  # the least that S3 takes for a part that is not the last
DATA = os.urandom(64 * 1024) * 176 + b"end"  # 11 MiB and a bit: three parts
DROP = MIB  # a part in bad weather, where it is sent again and again
WET = DATA[: 2 * DROP + 3]  # three of those
SECRET = "tops3cret"


class Weather:
    """What befalls the requests that pass: a word each, in turn; then nothing more."""

    def __init__(self):
        self.plan = []  # of "busy", "drop", "flip", "deny", "lose", "pass"
        self.verbs = ("PUT", "POST")
        self.seen = []
        self.lock = threading.Lock()

    def next(self, verb, path):
        with self.lock:
            fate = "pass"
            if verb in self.verbs and self.plan:
                fate = self.plan.pop(0) if len(self.plan) > 1 else self.plan[0]
            self.seen.append((verb, path, fate))
            return fate


class Proxy(BaseHTTPRequestHandler):
    """Hands every request on to the server behind, as the weather lets it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        """Nothing on the terminal."""

    def reply(self, status, headers, body):
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in (
                "transfer-encoding",
                "connection",
                "date",
                "server",
            ):
                self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code):
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        self.reply(status, [("Content-Type", "application/xml")], body)

    def drop(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def pass_on(self, body):
        behind = http.client.HTTPConnection(*self.server.behind)
        try:
            behind.request(self.command, self.path, body, dict(self.headers))
            answer = behind.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            behind.close()

    def handle_one(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fate = self.server.weather.next(self.command, self.path)
        if fate == "busy":
            return self.refuse(503, "SlowDown")
        if fate == "deny":
            return self.refuse(403, "AccessDenied")
        if fate == "drop":
            return self.drop()
        if fate == "flip" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
            if self.server.checks:  # as S3 does, and moto does not
                crc = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
                if self.headers.get("x-amz-checksum-crc32", crc) != crc:
                    return self.refuse(400, "BadDigest")
        answer = self.pass_on(body)
        return self.drop() if fate == "lose" else self.reply(*answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one


@pytest.fixture(scope="module")
def moto():
    """A real S3 server with one bucket: host and port."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    made = http.client.HTTPConnection(*server.get_host_and_port())
    made.request("PUT", "/bucket")
    assert made.getresponse().status == 200
    made.close()
    yield server.get_host_and_port()
    server.stop()


def forget():
    """Drop the filesystems that fsspec keeps, with their connections."""
    import s3fs

    for fs in list(s3fs.S3FileSystem._cache.values()):
        if fs._s3 is not None:
            fs.close_session(fs.loop, fs._s3creator)
    s3fs.S3FileSystem.clear_instance_cache()
    gc.collect()


@pytest.fixture
def account(monkeypatch):
    """Credentials as botocore looks for them, and retries that are accelx's alone."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(storage_retry, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(storage_retry, "LONGEST_WAIT", 0.01)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    for name in ("connect_timeout", "read_timeout"):  # requests are counted
        monkeypatch.setattr(f"s3fs.S3FileSystem.{name}", 120)
    monkeypatch.setattr(storage_s3, "PART", PART)
    forget()
    yield
    forget()


@pytest.fixture
def bucket(moto, account, monkeypatch, request):
    """A new folder of the S3 server."""
    host, port = moto
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    return storage.at(f"s3://bucket/{abs(hash(request.node.name))}")


@pytest.fixture
def weather(moto, account, monkeypatch):
    """What befalls requests to the S3 server, reached through a proxy."""
    monkeypatch.setattr(storage_s3, "PART", DROP)
    monkeypatch.setattr(storage_remote, "RANGE", DROP * 3 // 2)  # two are read of WET
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", DROP)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.behind, server.weather, server.checks = moto, Weather(), True
    server.weather.server = server
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    host, port = server.server_address
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    yield server.weather
    forget()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def stormy(weather, request):
    """A new folder of the S3 server, behind the weather."""
    return storage.at(f"s3://bucket/{abs(hash(request.node.name))}")


def parts(data=DATA, length=3 * MIB):
    """The bytes in one buffer that is used again for each part."""
    buffer = bytearray(length)
    for start in range(0, len(data), length):
        piece = data[start : start + length]
        buffer[: len(piece)] = piece
        yield memoryview(buffer)[: len(piece)]


def put(store, name, data=DATA):
    storage.write(store, name, parts(data), len(data))


def fetch(store, name, size=None):
    out = bytearray(len(DATA) if size is None else size)
    with storage.reading(store, name) as read_into:
        read_into(0, memoryview(out))
    return bytes(out)


def uploads(store):
    """Multipart uploads that were begun and neither finished nor aborted."""
    reply = store.fs.call_s3("list_multipart_uploads", Bucket="bucket")
    keys = [upload["Key"] for upload in reply.get("Uploads", [])]
    return [key for key in keys if key.startswith(store.root.partition("/")[2])]


def in_child(work):
    """Fork, do `work` in the child, and return its exit status; 0 is success."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# S3.


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, len(DATA)])
def test_s3_keeps_objects_of_any_size(bucket, size):
    """One request or many parts: the bytes are the same."""
    put(bucket, "object", DATA[:size])
    assert storage.sizes(bucket) == {"object": size}
    assert fetch(bucket, "object", size) == DATA[:size]
    assert storage.read(bucket, "object", size) == DATA[:size]
    assert uploads(bucket) == []


def test_s3_lists_and_removes(bucket):
    """Folders are told from objects, a listing is fresh, and removal is thorough."""
    inner = storage.inside(bucket, "inner")
    assert storage.sizes(bucket) == {}
    for store, name in ((bucket, "a"), (inner, "b"), (inner, "commit")):
        put(store, name, b"abc")
    assert storage.sizes(bucket) == {"a": 3, "inner": None}
    storage.remove(bucket, "a")
    storage.remove(bucket, "a")
    assert storage.sizes(bucket) == {"inner": None}
    storage.remove_folder(inner, ["commit"])
    storage.remove_folder(inner, ["commit"])
    assert storage.sizes(bucket) == {}


def test_s3_sees_what_others_write(bucket):
    """A listing that fsspec keeps is not believed."""
    assert storage.sizes(bucket) == {}
    key = bucket.root.partition("/")[2]
    bucket.fs.call_s3("put_object", Bucket="bucket", Key=f"{key}/new", Body=b"abc")
    assert storage.sizes(bucket) == {"new": 3}
    assert storage.read(bucket, "new", 3) == b"abc"


def test_s3_is_not_left_with_parts(bucket):
    """An upload that cannot end is aborted, and no object appears."""
    with pytest.raises(StorageError, match="wants 99999999 bytes"):
        storage.write(bucket, "object", parts(), 99999999)
    with pytest.raises(ZeroDivisionError):
        storage.write(
            bucket, "object", (b"x" * (9 * MIB // n) for n in (1, 0)), 99 * MIB
        )
    assert storage.sizes(bucket) == {}
    assert uploads(bucket) == []


def test_s3_memory_is_bounded(bucket, monkeypatch):
    """No more parts are in memory than the budget has room for."""
    alive = []
    most = []
    cut = storage_s3.blocks

    def counted(*args):
        for block in cut(*args):
            alive.append(block)
            yield block

    send = storage_s3._send

    def counting(store, name, upload_id, number, block):
        most.append(len(alive))
        try:
            return send(store, name, upload_id, number, block)
        finally:
            alive.remove(block)

    monkeypatch.setattr(storage_s3, "blocks", counted)
    monkeypatch.setattr(storage_s3, "_send", counting)
    monkeypatch.setattr(storage_s3, "MEMORY", 2 * PART)
    put(bucket, "object")
    assert len(most) == 3
    assert max(most) <= 2
    assert fetch(bucket, "object") == DATA


def test_the_client_copies_no_part():
    """aiohttp, which asks a stream for its buffer, gets the memory of the bytes."""
    payload = pytest.importorskip("aiohttp.payload")
    block = os.urandom(MIB) * 8

    def taken(kind):
        tracemalloc.start()
        try:
            made = payload.BytesIOPayload(kind(block))
            assert made.size == len(block)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert taken(storage_s3._Stream) < MIB
    assert taken(io.BytesIO) >= 8 * MIB  # the control


def test_s3_with_plain_md5(bucket, monkeypatch):
    """Where botocore is set to send no checksum, an MD5 goes, which all stores know."""
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    put(bucket, "object")
    put(bucket, "small", b"abc")
    assert fetch(bucket, "object") == DATA
    assert storage.read(bucket, "small", 3) == b"abc"


def test_s3_says_what_is_absent(bucket):
    """An object, and a bucket that is not there."""
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/.*/object"):
        storage.read(bucket, "object", 10)
    absent = storage.at("s3://nosuchbucket/run")
    assert storage.sizes(absent) == {}
    with pytest.raises(StorageError, match="to write s3://nosuchbucket/run/object"):
        put(absent, "object")


def test_s3_bytes_past_the_end_are_an_error(bucket):
    """A range that ends beyond, or begins there."""
    put(bucket, "object", b"abc")
    with storage.reading(bucket, "object") as read_into:
        for offset in (1, 3, 100):
            with pytest.raises(StorageError, match=r"bucket/\d+/object"):
                read_into(offset, memoryview(bytearray(3)))


def test_s3_after_a_fork(bucket):
    """A child writes with the parent's store, and the parent goes on undisturbed."""
    put(bucket, "before")

    def work():
        put(bucket, "child")
        assert fetch(bucket, "before") == DATA
        forget()  # the child's copies of the parent's connections are collected

    assert in_child(work) == 0
    put(bucket, "after")
    assert storage.sizes(bucket) == dict.fromkeys(
        ["after", "before", "child"], len(DATA)
    )


def test_a_fork_that_uses_no_store_is_undisturbed(bucket):
    """The threads of fsspec are no hindrance to a child, nor its end to the parent."""
    put(bucket, "before", b"abc")
    assert in_child(gc.collect) == 0
    assert storage.read(bucket, "before", 3) == b"abc"


# S3 in bad weather.


@pytest.mark.parametrize("fate", ["busy", "drop", "lose", "flip"])
@pytest.mark.parametrize("size", [1000, len(WET)])
def test_bad_weather_that_passes_is_waited_for(stormy, weather, fate, size):
    """Throttling, dropped connections, lost answers and flipped bits are repeated."""
    # An upload whose beginning nobody heard of is left to the bucket's own rules.
    begin = ["pass"] if fate == "lose" and size > 1000 else []
    weather.plan = [*begin, fate, "pass", fate, fate, "pass", fate, "pass"]
    put(stormy, "object", WET[:size])
    weather.plan = []
    assert fetch(stormy, "object", size) == WET[:size]
    assert [f for _, _, f in weather.seen].count(fate) >= 1
    assert uploads(stormy) == []


def test_each_request_of_an_upload_may_fail_once(stormy, weather):
    """Beginning, every part and the end: none of them is special."""
    put(stormy, "good", WET)
    wanted = [each for each in weather.seen if each[0] in weather.verbs]
    assert len(wanted) == 5
    for number in range(len(wanted)):
        for fate in ("busy", "lose"):
            weather.plan = ["pass"] * number + [fate, "pass"]
            put(stormy, f"{fate}{number}", WET)
            weather.plan = []
            assert fetch(stormy, f"{fate}{number}", len(WET)) == WET


def test_a_flipped_bit_is_seen_without_checksums(stormy, weather, monkeypatch):
    """Where the store echoes no checksum, its ETag tells; the part is sent again."""
    monkeypatch.setattr(storage_s3, "_has_crc", lambda fs: False)
    for plan in (["flip", "pass"], ["pass", "pass", "flip", "pass"]):
        weather.plan = plan
        put(stormy, "object", WET)
        weather.plan = []
        assert fetch(stormy, "object", len(WET)) == WET


def test_a_network_that_always_damages_is_given_up(stormy, weather):
    """The error says what was wanted, how often it failed, and shows no secret."""
    weather.plan = ["pass", "flip"]
    with pytest.raises(StorageError, match=r"failed 6 times.*BadDigest.*call again"):
        put(stormy, "object", WET)
    weather.plan = []
    assert storage.sizes(stormy) == {}
    assert uploads(stormy) == []


@pytest.mark.parametrize(
    ("fate", "words"), [("busy", "Slow|Unavailable"), ("drop", "onnection")]
)
def test_weather_that_does_not_clear_is_given_up(stormy, weather, fate, words):
    """Reading and writing end with an error that names the object."""
    put(stormy, "object", b"abc")
    weather.plan, weather.verbs = [fate], ("GET", "HEAD", "PUT", "POST")
    for verb, call in (
        ("write", lambda: put(stormy, "other", WET)),
        ("read", lambda: storage.read(stormy, "object", 3)),
        ("read", lambda: fetch(stormy, "object", 3)),
        ("list", lambda: storage.sizes(stormy)),
    ):
        with pytest.raises(StorageError, match=f"to {verb} s3://.*times.*({words})"):
            call()


def test_what_is_denied_is_told_at_once(stormy, weather):
    """No second request, and nothing of the account in any line of the traceback."""
    weather.plan = ["deny"]
    with pytest.raises(StorageError, match=r"AccessDenied.*credentials may") as told:
        put(stormy, "object", b"abc")
    assert len(weather.seen) == 1
    lines = "".join(traceback.format_exception(told.value))
    assert SECRET not in lines
    assert "someone" not in lines


def test_reads_go_on_in_bad_weather(stormy, weather):
    """Every kind of read is repeated."""
    put(stormy, "object", WET)
    weather.verbs = ("GET", "HEAD")
    weather.plan = ["drop", "pass", "busy", "pass", "lose", "busy", "pass"]
    assert fetch(stormy, "object", len(WET)) == WET
    weather.plan = ["busy", "drop", "pass"]
    assert storage.read(stormy, "object", len(WET)) == WET
    weather.plan = ["busy", "drop", "pass"]
    assert storage.sizes(stormy) == {"object": len(WET)}


# Google Cloud Storage.

# gcsfs hands aiohttp plain bytes, which it warns of from 1 MiB on.
large_body = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")


@pytest.fixture(scope="module")
def emulator():
    """A real server that speaks Google's protocol: its URL."""
    from gcp_storage_emulator.server import create_server

    made = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    with made as server:  # it has no name for the port that it was given
        yield f"http://127.0.0.1:{server._api._httpd.server_address[1]}"


@pytest.fixture
def google(emulator, monkeypatch, request):
    """A new folder of the Google server."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    # Read at import; else it looks for a kind of bucket that the emulator has not.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import gcsfs

    gcsfs.GCSFileSystem.clear_instance_cache()
    yield storage.at(f"gs://bucket/{abs(hash(request.node.name))}")
    gcsfs.GCSFileSystem.clear_instance_cache()
    gc.collect()


@large_body
def test_google_keeps_lists_and_removes(google):
    """What is written is read, listed and removed, and nothing is renamed."""
    inner = storage.inside(google, "inner")
    assert storage.sizes(google) == {}
    put(google, "object", DATA[: 3 * MIB])
    put(google, "empty", b"")
    put(inner, "commit", b"abc")
    assert storage.sizes(google) == {"object": 3 * MIB, "empty": 0, "inner": None}
    assert fetch(google, "object", 3 * MIB) == DATA[: 3 * MIB]
    assert storage.read(google, "empty", 0) == b""
    with pytest.raises(StorageError, match="cut short"):
        fetch(google, "object", 3 * MIB + 1)
    with pytest.raises(FileNotFoundError):
        storage.read(google, "absent", 1)
    storage.remove(google, "object")
    storage.remove(google, "object")
    storage.remove_folder(inner, ["commit"])
    assert storage.sizes(google) == {"empty": 0}
    storage.remove_folder(google)
    assert storage.sizes(google) == {}


def test_google_takes_a_stream(google, monkeypatch):
    """An object of several blocks is one upload, and one that fails leaves nothing."""
    monkeypatch.setattr(storage_remote, "BLOCK", MIB)
    put(google, "object", DATA[: 2 * MIB + 5])
    assert fetch(google, "object", 2 * MIB + 5) == DATA[: 2 * MIB + 5]
    ended = []  # the emulator does not know how to end an upload
    monkeypatch.setattr("gcsfs.core.GCSFile.discard", lambda file: ended.append(1))
    with pytest.raises(StorageError, match="its parts came to"):
        storage.write(google, "bad", parts(DATA[: 3 * MIB]), 4 * MIB)
    assert len(ended) == 1
    assert storage.sizes(google) == {"object": 2 * MIB + 5}


def test_google_after_a_fork(google):
    """A child makes connections of its own."""
    put(google, "before", b"abc")
    assert in_child(lambda: put(google, "child", b"abc")) == 0
    assert storage.sizes(google) == {"before": 3, "child": 3}


def test_google_is_asked_for_the_digest(google):
    """What the store has is what was sent, by its own MD5."""
    put(google, "object", b"abc")
    info = google.fs.info(f"{google.root}/object")
    assert base64.b64decode(info["md5Hash"]) == hashlib.md5(b"abc").digest()


# A whole run.


def disturb(weather):
    """Now and then a request that fails, of any kind."""
    if weather is not None:
        weather.verbs = ("PUT", "POST", "GET", "HEAD", "DELETE")
        weather.plan = ["pass", "pass", "busy", "pass", "drop", "pass", "lose"] * 40
        weather.plan += ["pass"]


@pytest.mark.parametrize("where", ["bucket", "google", "stormy", "memory"])
def test_a_run_goes_on_from_a_store(where, request):
    """Saved, removed, found and loaded over HTTP: the losses of a run with no store."""
    import accelx as ax
    from tests import saving

    env, weather = ax.Env(), None
    store = storage.at("memory://run")
    if where != "memory":
        store = request.getfixturevalue(where)
    if where == "stormy":
        weather = request.getfixturevalue("weather")
    disturb(weather)
    whole, losses = saving.train(saving.chain(env, "ddp"), 7)
    saves = ax.save_state(env, store.url, every=2, keep=2)
    saving.train(saving.chain(env, "ddp", saves), 5)
    disturb(weather)
    newest = ax.latest(store.url)
    assert newest is not None
    assert newest.step == 4
    loads = ax.load_state(env, store.url, verify="full")
    state, rest = saving.train(saving.chain(env, "ddp", loads), 7)
    assert rest == losses[4:]
    ours, theirs = saving.weights(state), saving.weights(whole)
    assert all((ours[n] == theirs[n]).all() for n in theirs)
    assert len([n for n in storage.sizes(store) if n.startswith("step-")]) == 2
    if weather is not None:
        assert {"busy", "drop"} <= {fate for *_, fate in weather.seen}


def test_weights_come_from_a_store_and_go_to_one(bucket):
    """export writes to S3 what load_weights reads from there, to the bit."""
    import torch

    import accelx as ax
    from tests import saving
    from tests.laws.training import made

    env = ax.Env()
    saves = ax.save_state(env, bucket.url, every=2)
    state, _ = saving.train(saving.chain(env, "ddp", saves), 2)
    ax.export(bucket.url, f"{bucket.url}-out", max_shard_size="1KB")
    model = ax.load_weights(f"{bucket.url}-out")(made(seed=9)())
    for name, tensor in saving.weights(state).items():
        assert torch.equal(model.state_dict()[name], tensor), name
