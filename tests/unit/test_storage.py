"""What is stored is what was sent, whole or not at all, wherever the folder lies."""

import errno
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest
from hypothesis import given, strategies as st

from accelx import (
    storage,
    storage_at,
    storage_blocks,
    storage_remote,
    storage_retry,
    storage_s3,
)
from accelx.errors import MissingExtraError, StorageError
from tests import faulty

BYTES = bytes(range(256)) * 8


@pytest.fixture(params=["local", "memory", "faulty"])
def store(request, tmp_path):
    """An empty folder of each kind of store."""
    if request.param == "faulty":
        with faulty.use(tmp_path):
            yield storage.at("faulty://run")
    elif request.param == "memory":
        made = storage.at("memory://run")
        yield made
        storage.remove_folder(made)
    else:
        yield storage.at(tmp_path / "run")


@pytest.fixture
def at_once(monkeypatch):
    """Retries that wait for next to nothing."""
    monkeypatch.setattr(storage_retry, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(storage_retry, "LONGEST_WAIT", 0.001)


def put(store, name, data=BYTES):
    storage.write(store, name, [data], len(data))


def fetch(store, name, offset, size):
    out = bytearray(size)
    with storage.reading(store, name) as read_into:
        read_into(offset, memoryview(out))
    return bytes(out)


# What every store does.


def test_what_is_written_is_read(store):
    """Parts of any kind of buffer come back as one object."""
    parts = [b"abc", bytearray(b"de"), memoryview(b"fgh")[::1], b""]
    storage.write(store, "object", iter(parts), 8)
    assert storage.read(store, "object", 8) == b"abcdefgh"
    assert storage.sizes(store) == {"object": 8}


def test_a_part_may_be_changed_once_the_next_is_asked_for(store):
    """The buffer that parts lie in can be used again."""

    def parts():
        buffer = bytearray(4)
        for letter in b"abc":
            buffer[:] = bytes([letter]) * 4
            yield memoryview(buffer)

    storage.write(store, "object", parts(), 12)
    assert storage.read(store, "object", 12) == b"aaaabbbbcccc"


def test_an_empty_object_is_an_object(store):
    """No bytes at all are stored too."""
    storage.write(store, "object", [], 0)
    assert storage.read(store, "object", 0) == b""
    assert storage.sizes(store) == {"object": 0}


@pytest.mark.parametrize("size", [7, 9])
def test_parts_of_another_size_leave_no_object(store, size):
    """Too few and too many bytes are an error, and nothing is to be seen of them."""
    with pytest.raises(StorageError, match=f"wants {size} bytes.*came to 8"):
        storage.write(store, "object", [b"abcd", b"efgh"], size)
    assert "object" not in storage.sizes(store)


def test_parts_that_fail_leave_no_object(store):
    """An error of whoever makes the parts comes out as it is."""

    def parts():
        yield b"abcd"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write(store, "object", parts(), 8)
    assert "object" not in storage.sizes(store)


@pytest.mark.parametrize(("offset", "size"), [(0, 2048), (5, 7), (2047, 1), (3, 0)])
def test_a_range_is_read_where_it_lies(store, offset, size):
    """Any range of an object is its slice."""
    put(store, "object")
    assert fetch(store, "object", offset, size) == BYTES[offset : offset + size]


def test_a_range_past_the_end_is_an_error(store):
    """A short read is told, never padded."""
    put(store, "object")
    with pytest.raises(StorageError, match="cut short"):
        fetch(store, "object", 2040, 9)


def test_threads_read_side_by_side(store):
    """One reading serves many threads."""
    put(store, "object")

    def one(offset):
        out = bytearray(64)
        read_into(offset, memoryview(out))
        return bytes(out)

    with storage.reading(store, "object") as read_into, ThreadPoolExecutor(8) as pool:
        came = list(pool.map(one, range(0, 2048, 64)))
    assert b"".join(came) == BYTES


def test_an_object_beyond_the_limit_is_not_read(store):
    """A file that is no manifest does not fill the memory."""
    put(store, "object")
    with pytest.raises(StorageError, match="at most 100 bytes, but has 2048"):
        storage.read(store, "object", 100)


def test_an_absent_object_is_told_by_name(store):
    """Reading what is not there is Python's own error."""
    with pytest.raises(FileNotFoundError, match="object"):
        storage.read(store, "object", 100)
    with pytest.raises(FileNotFoundError, match="object"):
        fetch(store, "object", 0, 1)


def test_a_listing_tells_objects_from_folders(store):
    """What lies deeper is a folder without a size."""
    put(store, "object")
    put(storage.inside(storage.inside(store, "sub"), "deep"), "other")
    assert storage.sizes(store) == {"object": 2048, "sub": None}
    assert storage.sizes(storage.inside(store, "absent")) == {}


def test_removing_is_no_error_twice(store):
    """An object that is gone can be removed."""
    put(store, "object")
    put(store, "kept")
    storage.remove(store, "object")
    storage.remove(store, "object")
    assert storage.sizes(store) == {"kept": 2048}


def test_a_folder_is_removed_with_all_that_it_holds(store):
    """Nothing of it is listed, and its neighbour stays."""
    gone, kept = storage.inside(store, "gone"), storage.inside(store, "gone2")
    for folder in (gone, storage.inside(gone, "deep"), kept):
        put(folder, "object")
    storage.remove_folder(gone, ["object", "absent"])
    storage.remove_folder(gone)
    assert storage.sizes(gone) == {}
    assert storage.sizes(store) == {"gone2": None}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "../a", "a\0b"])
def test_a_name_stays_in_its_folder(store, name):
    """A name from a manifest cannot reach outside."""
    for call in (storage.inside, storage.remove, put):
        with pytest.raises(StorageError, match="plain names"):
            call(store, name)
    with pytest.raises(StorageError, match="without a slash"):
        storage.read(store, name, 10)


# Disks.


def test_short_writes_are_completed(tmp_path, monkeypatch):
    """The system may take a few bytes at a time."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:100]))
    store = storage.at(tmp_path)
    put(store, "object")
    assert (tmp_path / "object").read_bytes() == BYTES


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    """The error says what the system said, with its number."""

    def full(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match=r"No space left.*space on its disk") as told:
        put(storage.at(tmp_path), "object")
    assert told.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_file_and_each_new_folder_reach_the_disk(tmp_path, monkeypatch):
    """What is reported written is synced, from the file up to the first old folder."""
    synced = []

    def fsync(fd):
        found = os.fstat(fd)
        synced.append(
            next(
                p
                for p in [tmp_path, *tmp_path.rglob("*")]
                if os.path.samestat(p.stat(), found)
            )
        )

    monkeypatch.setattr(os, "fsync", fsync)
    put(storage.at(tmp_path / "new" / "run"), "object")
    wanted = ["", "new", "new/run/object", "new/run"]
    assert synced == [tmp_path / name for name in wanted]


def test_nothing_is_renamed(store, monkeypatch):
    """Neither the system nor the store is asked for what object stores lack."""

    def refuse(*_, **__):
        raise AssertionError

    for name in ("rename", "replace", "renames", "link"):
        monkeypatch.setattr(os, name, refuse)
    for name in ("mv", "rename", "move", "cp_file", "copy"):
        monkeypatch.setattr(type(store.fs), name, refuse)
    with pytest.raises(AssertionError):  # the control
        os.rename("here", "there")  # noqa: PTH104 it was replaced above
    put(store, "object")
    assert set(storage.sizes(store)) == {"object"}
    storage.remove_folder(store, ["object"])
    assert storage.sizes(store) == {}


def test_what_goes_first_is_gone_before_the_rest(tmp_path, monkeypatch):
    """A removal that is interrupted has already removed the commit."""

    def interrupted(path):
        raise KeyboardInterrupt

    store = storage.at(tmp_path)
    put(store, "commit")
    put(store, "data")
    monkeypatch.setattr("shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.remove_folder(store, ["commit"])
    assert storage.sizes(store) == {"data": 2048}


def test_a_file_in_a_folders_place_is_told(tmp_path):
    """Listing or writing under a plain file names it."""
    (tmp_path / "run").write_text("no folder")
    store = storage.at(tmp_path / "run")
    with pytest.raises(StorageError, match=r"to list file://.*run was wanted"):
        storage.sizes(store)
    with pytest.raises(StorageError, match=r"to write file://.*run/object"):
        put(store, "object")


def test_errors_of_a_reader_stay_its_own(tmp_path):
    """What happens within `reading` is not taken for a fault of the store."""
    store = storage.at(tmp_path)
    put(store, "object")
    with pytest.raises(BlockingIOError), storage.reading(store, "object"):
        raise BlockingIOError("of the reader")


# URLs.


def test_a_plain_path_is_a_disk(tmp_path, monkeypatch):
    """Relative paths are made absolute when they are named, not when they are used."""
    monkeypatch.chdir(tmp_path)
    store = storage.at("runs/../run/")
    assert (store.root, store.local) == (str(tmp_path / "run"), True)
    assert store == storage.at(store.url) == storage.at(tmp_path / "run")


@pytest.mark.parametrize(
    ("slip", "write"),
    [
        ("s3:/bucket/run", 'write "s3://bucket/run", or put "./" before it'),
        ("s3:/key:word@bucket/run", '"s3://bucket/run"'),
        ("file:/tmp/run", '"file:///tmp/run"'),
        ("", 'got ""; write "." for here'),
    ],
)
def test_what_lacks_a_slash_or_all_is_no_folder_here(
    slip, write, tmp_path, monkeypatch
):
    """It would be a folder of this machine that nobody meant."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(write)) as error:
        storage.at(slip)
    assert "word" not in str(error.value)
    assert storage.at("./s3:/a").root == f"{tmp_path}/s3:/a"


def test_inside_goes_one_folder_down():
    """The URL that is printed follows."""
    store = storage.inside(storage.at("memory://run/"), "step-1")
    assert (store.root, store.url, store.local) == (
        "/run/step-1",
        "memory://run/step-1",
        False,
    )
    assert storage.inside(storage.at("memory://"), "a").url == "memory://a"
    assert storage.inside(storage.at("/"), "a") == storage.at("/a")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sftp://ann:pa:ss@host:22/run/1", "sftp://host:22/run/1"),
        ("s3://key:secret@bucket/run", "s3://bucket/run"),
        ("https://host/run?token=abc#x", "https://host/run"),
        ("s3://bucket/mail@home/run/", "s3://bucket/mail@home/run"),
    ],
)
def test_a_url_is_printed_without_credentials(url, shown):
    """No user, password, query or fragment is shown; paths stay."""
    assert storage_at.printable(url) == shown


def test_a_store_is_printed_without_its_filesystem():
    """The repr holds no arguments of fsspec."""
    store = attrs.evolve(storage.at("memory://run"), fs="secret")
    assert "secret" not in repr(store)


@pytest.mark.parametrize(
    "text",
    [
        "GET https://ann:tops3cret@host/x failed",
        "GET https://host/x?X-Amz-Signature=tops3cret&a=b failed",
        "the key tops3cret is unknown",
        "the nested value tops3cret2 is unknown",
    ],
)
def test_an_errors_text_is_scrubbed(text):
    """Neither credentials in URLs nor those of the filesystem are told."""

    class Options:
        storage_options = {  # noqa: RUF012
            "secret": "tops3cret",
            "client_kwargs": {"aws_secret_access_key": "tops3cret2"},
            "anon": False,
        }

    shown = storage_at.scrubbed(text, Options())
    assert "tops3cret" not in shown
    assert "***2" not in shown
    assert shown.split()[0] == text.split()[0]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nosuch://bucket/run", "nosuch.*write a path, or a URL such as"),
        ("simplecache::s3://bucket/run", "chains several.*write the last URL alone"),
        ("s3://", "wants a folder.*s3://bucket/folder"),
    ],
)
def test_a_url_that_names_no_store_is_refused(url, words):
    """The error says which URL came and what to write."""
    with pytest.raises(ValueError, match=words):
        storage.at(url)


@pytest.mark.parametrize(
    ("url", "package", "words"),
    [
        ("s3://bucket/run", "s3fs", r"pip install 'accelx\[s3\]'"),
        ("gs://bucket/run", "gcsfs", r"pip install 'accelx\[gcs\]'"),
        ("abfs://box/run", "adlfs", "pip install adlfs"),
    ],
)
def test_a_missing_package_is_named(url, package, words, monkeypatch):
    """The error names the extra, or the package where accelx has none."""
    monkeypatch.setitem(sys.modules, package, None)
    loaded = sys.modules["fsspec.registry"]._registry
    monkeypatch.delitem(loaded, url.partition(":")[0], raising=False)
    with pytest.raises(MissingExtraError, match=words):
        storage.at(url)


def test_a_bucket_is_not_removed(monkeypatch):
    """Only folders in it are; the store is not even asked."""
    store = attrs.evolve(storage.at("memory://x"), root="bucket", url="s3://bucket")
    with pytest.raises(ValueError, match="s3://bucket is the bucket"):
        storage.remove_folder(store)


def test_importing_loads_no_store():
    """Whoever saves to a disk pays for no object store."""
    code = (
        "import sys, accelx.storage as s; s.at('/tmp'); "
        "print([m for m in ('s3fs', 'gcsfs', 'tenacity', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


# Blocks and digests.


@given(st.lists(st.binary(max_size=20)), st.integers(min_value=1, max_value=16))
def test_blocks_are_the_bytes_cut_evenly(parts, length):
    """Together they are the parts; all but the last are full, and none is empty."""
    data = b"".join(parts)
    cut = list(storage_blocks.blocks("x", parts, len(data), length))
    assert b"".join(cut) == data
    assert all(len(block) == length for block in cut[:-1])
    assert all(cut) or cut == [b""]


@pytest.mark.parametrize("size", [1, 2**33, 2**36, 2**37, 5 * 2**40])
def test_an_object_of_any_size_fits_in_parts(size):
    """S3 takes 10,000 parts of at most 5 GiB."""
    part = storage_s3.part_of(size)
    assert part >= storage_s3.PART
    assert -(-size // part) <= 10_000
    assert part <= 5 * 2**30


# Failures that pass, and those that do not.


def error_of(package, name, **fields):
    """An error as that package would raise it; the package is not needed for it."""
    kind = type(name, (Exception,), {"__module__": f"{package}.errors"})
    error = kind("it failed")
    for field, value in fields.items():
        setattr(error, field, value)
    return error


def s3_error(code, status):
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return error_of("botocore", "ClientError", response=response)


PASSING = [
    ConnectionResetError(),
    TimeoutError(),
    OSError(errno.EBUSY, "slow down"),
    s3_error("SlowDown", 503),
    s3_error("InternalError", 200),
    s3_error("BadDigest", 400),
    error_of("gcsfs", "HttpError", code="429"),
    error_of("aiohttp", "ClientResponseError", status=502),
    error_of("aiohttp", "ClientPayloadError"),
    error_of("azure", "HttpResponseError", status_code=503),
    storage_retry.PassingError("another checksum"),
]
FINAL = [
    FileNotFoundError(errno.ENOENT, "no such object"),
    PermissionError(errno.EACCES, "denied"),
    OSError(errno.ENOSPC, "full"),
    OSError(errno.EINVAL, "an argument"),
    ValueError("an argument"),
    s3_error("AccessDenied", 403),
    s3_error("NoSuchBucket", 404),
    error_of("gcsfs", "HttpError", code=401),
    error_of("mine", "ClientPayloadError"),
    StorageError("short"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_a_failure_that_passes_is_known(error):
    """Throttling, dropped connections, timeouts and damage on the way are retried."""
    assert storage_retry.transient(error)


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_a_failure_that_stays_is_known(error):
    """Rights, absence, a full disk and wrong arguments are told at once."""
    assert not storage_retry.transient(error)


def test_the_cause_of_a_translated_error_counts():
    """Replies of S3 become errors of Python, which keep what they were made from."""
    error = OSError(errno.EIO, "translated")
    error.__cause__ = s3_error("SlowDown", 503)
    assert storage_retry.transient(error)
    denied = PermissionError("translated")
    denied.__cause__ = s3_error("SlowDown", 503)
    assert not storage_retry.transient(denied)


def failing(times, error):
    """A call that fails so many times, and the list of its calls."""
    calls = []

    def call():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return call, calls


def test_what_passes_is_tried_again(at_once):
    """The call's value comes through in the end."""
    call, calls = failing(3, TimeoutError())
    store = storage.at("memory://run")
    assert storage_retry.attempt(store, "object", "write", call) == "done"
    assert len(calls) == 4


def test_what_does_not_pass_is_given_up(at_once):
    """The error says how often it was tried, at last with what, and what to do."""
    call, calls = failing(99, ConnectionResetError("https://me:tops3cret@host"))
    words = r"to write memory://run/object.*failed 6 times.*ConnectionReset.*call again"
    with pytest.raises(StorageError, match=words) as told:
        storage_retry.attempt(storage.at("memory://run"), "object", "write", call)
    assert len(calls) == storage_retry.ATTEMPTS == 6
    assert "tops3cret" not in str(told.value)
    assert told.value.__cause__ is told.value.__context__ is None


def test_what_stays_is_not_tried_again(at_once):
    """One call, and the advice fits what was said."""
    call, calls = failing(99, PermissionError("no"))
    with pytest.raises(StorageError, match="its credentials may do that"):
        storage_retry.attempt(storage.at("memory://run"), "object", "write", call)
    assert len(calls) == 1


# Stores that fail.


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 512 bytes: 2048 are four of them, written to a file one by one."""
    monkeypatch.setattr(storage_remote, "BLOCK", 512)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_stream_that_fails_leaves_no_object(tmp_path, small_blocks, number):
    """Whichever block fails, nothing is to be seen."""
    with faulty.use(tmp_path, fail_write=number) as faults:
        store = storage.at("faulty://run")
        with pytest.raises(StorageError, match="faulty was told to fail"):
            put(store, "object")
        assert faults.writes == number
        assert storage.sizes(store) == {}


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_dropped_block_is_sent_again(tmp_path, small_blocks, at_once, number):
    """A stream goes on where the connection was dropped."""
    with faulty.use(tmp_path, fail_write=number, error=faulty.dropped) as faults:
        store = storage.at("faulty://run")
        put(store, "object")
        assert faults.writes == 6  # four blocks, the end of the file, and one again
        assert storage.read(store, "object", 2048) == BYTES


def test_half_an_object_is_removed(tmp_path):
    """A store that leaves what it has of a failed write is tidied up."""
    with faulty.use(tmp_path, fail_write=1, leave_half=True):
        store = storage.at("faulty://run")
        with pytest.raises(StorageError):
            put(store, "object")
        assert storage.sizes(store) == {}


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_store_that_keeps_less_is_found_out(tmp_path, monkeypatch, blocks):
    """Success is not believed: the store must report the size that was sent."""
    monkeypatch.setattr(storage_remote, "BLOCK", 2048 // blocks)
    with (
        faulty.use(tmp_path, short_write=1),
        pytest.raises(StorageError, match="wants 2048 bytes, but the store has 1"),
    ):
        put(storage.at("faulty://run"), "object")


def test_a_read_that_is_cut_short_is_found_out(tmp_path):
    """Half of an answer is an error."""
    with faulty.use(tmp_path, short_read=1):
        store = storage.at("faulty://run")
        put(store, "object")
        with pytest.raises(StorageError, match="wants 2048 bytes at 0, but gave 1024"):
            storage.read(store, "object", 2048)


def test_a_dropped_read_is_asked_again(tmp_path, at_once):
    """Both ways of reading go on after a dropped connection."""
    with faulty.use(tmp_path, fail_read=1, error=faulty.dropped) as faults:
        store = storage.at("faulty://run")
        put(store, "object")
        assert storage.read(store, "object", 2048) == BYTES
        faults.fail_read = faults.reads + 1
        assert fetch(store, "object", 1, 7) == BYTES[1:8]


def test_a_long_range_is_read_in_pieces(tmp_path, monkeypatch):
    """Pieces are fetched side by side and lie where they belong."""
    monkeypatch.setattr(storage_remote, "RANGE", 100)
    with faulty.use(tmp_path) as faults:
        store = storage.at("faulty://run")
        put(store, "object")
        assert fetch(store, "object", 3, 2001) == BYTES[3:2004]
        assert faults.reads == 21


def test_a_removal_that_fails_has_removed_what_goes_first(tmp_path):
    """The commit is gone where the rest could not be removed."""
    with faulty.use(tmp_path) as faults:
        store = storage.at("faulty://run")
        for name in ("a", "commit", "z"):
            put(store, name)
        faults.fail_remove, faults.once = 2, False
        with pytest.raises(StorageError, match="to remove faulty://run was wanted"):
            storage.remove_folder(store, ["commit"])
        assert storage.sizes(store) == {"a": 2048, "z": 2048}


def test_a_late_listing_hides_no_object_from_removal(tmp_path, at_once):
    """Where listings lack the last changes, what they still hid is removed as well."""
    with faulty.use(tmp_path) as faults:
        store = storage.at("faulty://run")
        put(store, "object")
        faults.list_late = 1
        put(store, "late")
        assert storage.sizes(store) == {"object": 2048}
        storage.remove_folder(store)
        faults.list_late = 0
        assert storage.sizes(store) == {}


def test_objects_that_are_left_are_told(tmp_path, at_once, monkeypatch):
    """A store that reports a removal and keeps the object is not believed."""
    with faulty.use(tmp_path):
        store = storage.at("faulty://run")
        put(store, "object")
        monkeypatch.setattr(type(store.fs), "rm_file", lambda self, path: None)
        with pytest.raises(StorageError, match="1 objects are left"):
            storage.remove_folder(store)


def test_a_flipped_bit_is_a_flipped_bit(tmp_path):
    """The store for tests damages what it was told to, and nothing else."""
    with faulty.use(tmp_path, flip_write=2, flip_read=1) as faults:
        store = storage.at("faulty://run")
        put(store, "whole")
        put(store, "damaged")
        assert storage.read(store, "whole", 2048) != BYTES
        assert storage.read(store, "whole", 2048) == BYTES
        assert storage.read(store, "damaged", 2048) == faulty.flipped(BYTES)
        assert (faults.writes, faults.reads, faults.renames) == (2, 3, 0)


def test_writers_may_be_threads(store):
    """Objects that are written side by side do not mix."""
    started = threading.Barrier(4)

    def one(number):
        started.wait()
        put(store, f"object{number}", bytes([number]) * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))
    for number in range(4):
        assert storage.read(store, f"object{number}", 1000) == bytes([number]) * 1000
