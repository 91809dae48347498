"""A store that fails on purpose: fsspec's protocol `faulty://`, over a folder.

    with faulty.use(tmp_path, fail_write=3) as faults:
        store = storage.at("faulty://run")      # lies in tmp_path/run
        ...                                     # the third write call raises
    assert faults.writes >= 3

Every call is counted, from 1, and a fault is set by the number of the call that it
befalls; `faults` may be changed at any time. To fail each write call of a run in turn,
count those of a good run first:

    with faulty.use(tmp_path / "good") as faults:
        run("faulty://run")
    for number in range(1, faults.writes + 1):
        with faulty.use(tmp_path / str(number), fail_write=number):
            ...

It is an object store: a write replaces the whole object or nothing, unless told
otherwise; folders are made by what lies in them; nothing can be renamed. Ranks that are
forked within `use` share the folder, and each counts its own calls.
"""

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs
import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


def broken():
    """What a call that fails raises; it does not pass by itself."""
    return OSError(errno.EIO, "faulty was told to fail")


def dropped():
    """What a dropped connection raises: the same call may succeed a little later."""
    return ConnectionResetError(errno.ECONNRESET, "faulty dropped the connection")


@attrs.define
class Faults:
    """Which calls fail, and how many there were; None fails no call."""

    fail_write: int | None = None  # this write raises `error`
    fail_read: int | None = None  # this read raises `error`
    fail_remove: int | None = None  # this removal raises `error`
    once: bool = True  # False: whatever changes the store fails from then on
    leave_half: bool = False  # a write that fails leaves half an object
    short_write: int | None = None  # this write keeps half of its bytes, and succeeds
    short_read: int | None = None  # this read gives half of the bytes
    flip_write: int | None = None  # this write keeps one bit turned around
    flip_read: int | None = None  # this read gives one bit turned around
    list_late: int = 0  # listings lack the last changes, so many of them
    error: Callable[[], Exception] = broken

    writes: int = 0
    reads: int = 0
    removes: int = 0
    lists: int = 0
    renames: int = 0
    dead: bool = False  # a call failed and `once` is False
    shown: list[dict[str, int]] = attrs.field(factory=list)  # before each change
    lock: threading.Lock = attrs.field(factory=threading.Lock, repr=False)


@contextmanager
def use(folder: Path, **settings) -> Iterator[Faults]:
    """`faulty://` is `folder`, with the faults that the settings name."""
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    before = FaultyFileSystem.folder, FaultyFileSystem.faults
    folder.mkdir(parents=True, exist_ok=True)
    FaultyFileSystem.folder, FaultyFileSystem.faults = folder, Faults(**settings)
    try:
        yield FaultyFileSystem.faults
    finally:
        FaultyFileSystem.folder, FaultyFileSystem.faults = before


def flip(file: Path, at: int = 0):
    """Turn one bit of a stored object around; `at` may count from its end."""
    file.write_bytes(flipped(file.read_bytes(), at))


def flipped(data, at=0):
    """The bytes with one bit turned around."""
    changed = bytearray(data)
    if changed:
        changed[at] ^= 1
    return bytes(changed)


class FaultyFileSystem(AbstractFileSystem):
    protocol = "faulty"
    root_marker = "/"
    cachable = False
    folder: Path | None = None
    faults: Faults = Faults()

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("faulty://").strip("/")

    def file(self, path) -> Path:
        assert self.folder is not None, "call it within `with faulty.use(folder):`"
        return self.folder / self._strip_protocol(path).strip("/")

    def count(self, kind):
        """Which call of its kind this is."""
        with self.faults.lock:
            number = getattr(self.faults, kind) + 1
            setattr(self.faults, kind, number)
        return number

    def change(self, number, fault):
        """Raise if this change is to fail, else remember how things were before it."""
        faults = self.faults
        if faults.dead:
            raise faults.error()
        if number == fault:
            faults.dead = not faults.once
            raise faults.error()
        if faults.list_late:
            faults.shown.append(self.objects())

    def objects(self):
        """path -> bytes, of everything that is stored."""
        found = {}
        for file in self.file("/").rglob("*"):
            with suppress(FileNotFoundError):  # another rank removed it
                if file.is_file():
                    path = "/" + file.relative_to(self.folder).as_posix()
                    found[path] = file.stat().st_size
        return found

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self.store(path, bytes(value))

    def store(self, path, data):
        """One write call."""
        faults = self.faults
        number = self.count("writes")
        file = self.file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.change(number, faults.fail_write)
        except Exception:
            if faults.leave_half:
                file.write_bytes(data[: len(data) // 2])
            raise
        if number == faults.short_write:
            data = data[: len(data) // 2]
        file.write_bytes(flipped(data) if number == faults.flip_write else data)

    def cat_file(self, path, start=None, end=None, **kwargs):
        faults = self.faults
        number = self.count("reads")
        if number == faults.fail_read:
            raise faults.error()
        data = self.file(path).read_bytes()[start:end]
        if number == faults.short_read:
            data = data[: len(data) // 2]
        return flipped(data) if number == faults.flip_read else data

    def ls(self, path, detail=True, **kwargs):
        self.count("lists")
        late = self.faults.list_late
        shown = self.faults.shown
        objects = shown[-min(late, len(shown))] if late and shown else self.objects()
        root = self._strip_protocol(path).rstrip("/")
        found = {}
        for name, size in objects.items():
            if name.startswith(root + "/"):
                child, _, deeper = name[len(root) + 1 :].partition("/")
                kind = "directory" if deeper else "file"
                entry = {"name": f"{root}/{child}", "size": size, "type": kind}
                found.setdefault(child, entry)
        if not found and root in objects:
            found = {root: {"name": root, "size": objects[root], "type": "file"}}
        if not found and root:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else [e["name"] for e in found.values()]

    def info(self, path, **kwargs):
        """Never late: stores are, at most, in their listings."""
        path = self._strip_protocol(path)
        objects = self.objects()
        if path in objects:
            return {"name": path, "size": objects[path], "type": "file"}
        if any(name.startswith(path.rstrip("/") + "/") for name in objects):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def rm_file(self, path):
        """No error if there is none, as in S3."""
        file = self.file(path)
        if not file.is_dir():
            self.change(self.count("removes"), self.faults.fail_remove)
            file.unlink(missing_ok=True)

    def makedirs(self, path, exist_ok=False):
        """An object store has no folders."""

    mkdir = makedirs

    def mv(self, *args, **kwargs):
        self.count("renames")
        raise NotImplementedError("an object store cannot rename")

    rename = move = mv_file = cp_file = mv

    def _open(self, path, mode="rb", block_size=None, **kwargs):
        return FaultyFile(self, path, mode, block_size=block_size or 2**20)


class FaultyFile(AbstractBufferedFile):
    """A file that is written block by block, each of them one write call."""

    def _initiate_upload(self):
        self.sent = []

    def _upload_chunk(self, final=False):
        fs = self.fs
        number = fs.count("writes")
        fs.change(number, fs.faults.fail_write)
        data = self.buffer.getvalue()
        if number == fs.faults.short_write:
            data = data[: len(data) // 2]
        self.sent.append(flipped(data) if number == fs.faults.flip_write else data)
        if final:
            file = fs.file(self.path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"".join(self.sent))

    def discard(self):
        self.sent = []
