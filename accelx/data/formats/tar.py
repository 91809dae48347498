"""Tar in the manner of WebDataset: neighbours of one key are one sample.

`a/7.jpg` and `a/7.cls` are {"__key__": "a/7", "jpg": bytes, "cls": bytes}. A block is a
run of whole samples of about 1 MiB, which is a tar of its own when its bytes are read
alone. Python's reader takes a damaged header for the end of the archive: here the end
must look like one, so that no sample goes missing in silence.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO, Any, cast

import attrs

from accelx.data.formats.format import (
    Block,
    Columns,
    File,
    Flaw,
    FlawedError,
    Format,
    Row,
    Scan,
    pick,
    read,
    told,
)
from accelx.data.formats.ranged import ranged
from accelx.data.formats.runs import Runs

AHEAD = 2**20  # bytes that the scan reads at once: larger members are passed over
NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)  # key, extension


@attrs.frozen(eq=False)
class Samples:
    """The samples of one block."""

    file: File
    samples: list[Row]
    nbytes: int
    columns: Columns

    @property
    def rows(self) -> int:
        """How many samples there are."""
        return len(self.samples)

    def take(self, rows: Sequence[int]) -> list[Row]:
        """These samples, as dicts of their own."""
        return [pick(dict(self.samples[i]), self.columns, self.file) for i in rows]


@attrs.define
class _Sample:
    """What the scan knows of the sample that it is in."""

    key: str
    start: int
    stop: int
    names: set[str]
    twice: str = ""  # an extension that it has two times
    link: str = ""  # a member that is a link, whose content stands elsewhere


def scan(file: File, careful: bool) -> Scan:
    """Find the samples by their headers."""
    del careful  # the headers are read in any case
    runs, flaws = Runs(), list[Flaw]()
    try:
        for sample in _samples(file):
            if sample.twice or sample.link:
                runs.cut()
                flaws.append(Flaw(_told(sample), rows=1))
            else:
                runs.add(sample.start, sample.stop)
    except FlawedError as error:
        flaws.append(Flaw(str(error)))
    runs.cut()
    return Scan(tuple(runs.blocks), tuple(flaws))


def _told(sample: _Sample) -> str:
    if sample.link:
        return (
            f"the member {sample.link!r} is a link, whose content stands elsewhere: "
            "tar with --hard-dereference"
        )
    return f"the sample {sample.key!r} has {sample.twice!r} twice"


def _samples(file: File) -> Iterator[_Sample]:
    found: _Sample | None = None
    with ranged(file, buffer=AHEAD) as opened:
        for _, member, key, name in _members(cast(IO[bytes], opened)):
            stop = member.offset_data + -(-member.size // 512) * 512
            if stop > file.size:
                raise FlawedError(f"the member {member.name!r} is cut short")
            if found is None or found.key != key:
                if found is not None:
                    yield found
                found = _Sample(key, member.offset, stop, {name})
            else:
                found.stop = stop
                found.twice = name if name in found.names else found.twice
                found.names.add(name)
            found.link = found.link if member.isreg() else member.name
    if found is not None:
        yield found


def _members(
    opened: IO[bytes],
) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo, str, str]]:
    """The members that samples are made of, each with its key and extension."""
    with told("it is no tar"):
        tar = tarfile.open(fileobj=opened, mode="r:")  # noqa: SIM115 - closed by its owner
    while True:
        with told(f"the header at byte {tar.offset}"):
            member = tar.next()
        if member is None:
            break
        cast(Any, tar).members.clear()  # it would keep them all
        match = NAME.fullmatch(member.name)
        linked = member.islnk()
        if match and (member.isreg() or linked) and not member.name.startswith("__"):
            yield tar, member, match[1], match[2].lower()
    opened.seek(tar.offset)
    if not _ended(opened.read(512)):
        raise FlawedError(
            f"the header at byte {tar.offset} is damaged, or the archive is cut short"
        )


def _ended(block: bytes) -> bool:
    """Whether these are the zeros that every tar ends with."""
    return len(block) == 512 and not any(block)


def load(file: File, block: Block, columns: Columns) -> Samples:
    """The samples of one block."""
    data = bytes(read(file, block.start, block.stop)) + bytes(512)
    samples: list[Row] = []
    with io.BytesIO(data) as opened:
        for tar, member, key, name in _members(opened):
            if not samples or samples[-1]["__key__"] != key:
                samples.append({"__key__": key})
            content = tar.extractfile(member)
            assert content is not None  # it is a regular file
            samples[-1][name] = content.read()
    return Samples(file, samples, len(data), columns)


FORMAT = Format("tar", (".tar",), scan, load)
