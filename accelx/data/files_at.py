"""Which files URLs and patterns name, in which order, and of which format."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from accelx import storage
from accelx.data.formats import arrow, jsonl, parquet, safetensors, tar
from accelx.data.formats.format import File, Format
from accelx.errors import DataError
from accelx.storage_at import filesystem, path_of
from accelx.storage_retry import attempt

Url = str | os.PathLike[str]

FORMATS = {
    each.FORMAT.name: each.FORMAT for each in (parquet, arrow, jsonl, tar, safetensors)
}
PATTERN = re.compile(r"[*?\[]")
COMPRESSED = (".gz", ".tgz", ".zst", ".bz2", ".xz", ".lz4", ".zip")
ASKING = 16  # files whose sizes are asked for at the same time


def listed(urls: Url | Sequence[Url]) -> list[File]:
    """The files that `urls` name: those of a pattern by name, the rest as given.

    Raises DataError where one names nothing, a folder, or a file named before.
    """
    each = [urls] if isinstance(urls, str | os.PathLike) else list(urls)
    if not each:
        raise DataError(
            f"files are wanted, but {urls!r} names none; write a path, a URL or a "
            'pattern such as "s3://bucket/data/*.parquet"'
        )
    cuts = [_cut(os.fspath(url)) for url in each]
    # Here, as fsspec makes a filesystem for each thread that asks for one.
    stores = {folder: storage.at(folder) for folder in dict.fromkeys(dict(cuts))}
    jobs = [(stores[folder], name) for folder, name in cuts]
    with ThreadPoolExecutor(ASKING, thread_name_prefix="accelx-list") as pool:
        found = [x for files in pool.map(lambda job: _named(*job), jobs) for x in files]
    seen = set[str]()
    for file in found:
        if file.url in seen:
            raise DataError(
                f"each file is wanted once, but {file.url} is named twice; name it "
                "once, and give it more weight with ax.mix"
            )
        seen.add(file.url)
    return found


def _named(store: storage.Store, name: str) -> list[File]:
    infos = _matching(store, name) if PATTERN.search(name) else _one(store, name)
    shown = f"{store.url.rstrip('/')}/{name}"
    if not infos:
        raise DataError(
            f"files are wanted at {shown}, but nothing is there; look at its spelling, "
            "and write * for what differs between names"
        )
    folders: dict[str, storage.Store] = {}
    return [
        _file(store, path, info["size"], folders)
        for path, info in sorted(infos.items())
        if _is_file(info, shown, single=len(infos) == 1)
    ]


def _cut(text: str) -> tuple[str, str]:
    """The folder, and what is to be found in it: a name, or the rest of a pattern."""
    parts = text.split("/")
    magic = (i for i, part in enumerate(parts) if PATTERN.search(part))
    at = next(magic, len(parts) - 1)
    folder, name = "/".join(parts[:at]), "/".join(parts[at:])
    if folder.endswith(":/"):  # memory://name
        folder += "/"
    return folder or ("/" if text.startswith("/") else "."), name


def _matching(store: storage.Store, pattern: str) -> dict[str, Any]:
    fs = filesystem(store)

    def ask() -> dict[str, Any]:
        fs.invalidate_cache(store.root)
        return fs.glob(f"{store.root}/{pattern}", detail=True)

    found = attempt(store, "", "list", ask)
    hidden = any(part.startswith(".") for part in pattern.split("/"))
    root = store.root.strip("/")
    return {
        path: info
        for path, info in found.items()
        if info["type"] != "directory"
        and (hidden or not _hidden(path.strip("/").removeprefix(root)))
    }


def _hidden(path: str) -> bool:
    """Whether a shell's pattern would leave it out, as copies of editors are."""
    return any(part.startswith(".") for part in path.split("/"))


def _one(store: storage.Store, name: str) -> dict[str, Any]:
    if not name:
        return {store.root: {"type": "directory"}}
    fs, path = filesystem(store), path_of(store, name)

    def ask() -> dict[str, Any]:
        fs.invalidate_cache(store.root)
        return fs.info(path)

    try:
        return {path: attempt(store, name, "read", ask)}
    except FileNotFoundError:
        return {}


def _is_file(info: dict[str, Any], shown: str, single: bool) -> bool:
    if info["type"] != "directory":
        return True
    assert single
    raise DataError(
        f"files are wanted, but {shown} is a folder; write a pattern of what is in it, "
        f"such as {shown.rstrip('/')}/*.parquet"
    )


def _file(
    store: storage.Store, path: str, size: int, folders: dict[str, storage.Store]
) -> File:
    inner = path.strip("/").removeprefix(store.root.strip("/")).strip("/")
    folder, _, name = inner.rpartition("/")
    if folder not in folders:
        folders[folder] = store
        for part in folder.split("/") if folder else ():
            folders[folder] = storage.inside(folders[folder], part)
    return File(folders[folder], name, size)


def format_of(files: Sequence[File], name: str | None) -> Format:
    """The format called `name`, or else that of the files' suffixes.

    Raises DataError where there is no such format, or files differ.
    """
    if name is not None:
        if name not in FORMATS:
            raise DataError(
                f"format wants one of {sorted(FORMATS)}, got {name!r}; write one of "
                "these, or leave it out where the suffix says it"
            )
        return FORMATS[name]
    kinds = {_by_suffix(file): file for file in reversed(files)}
    if len(kinds) > 1:
        told = ", ".join(f"{file.url} is {kind}" for kind, file in kinds.items())
        raise DataError(
            f"files of one format are wanted, but {told}; read each format by its own "
            "from_files, and put them together with ax.mix or ConcatDataset"
        )
    return FORMATS[next(iter(kinds))]


def _by_suffix(file: File) -> str:
    name = file.name.lower()
    if name.endswith(COMPRESSED):
        raise DataError(
            f"a file of which parts can be read is wanted, but {file.url} is "
            "compressed as a whole; unpack it, or write it as Parquet, which "
            "compresses by parts"
        )
    for kind, form in FORMATS.items():
        if name.endswith(form.suffixes):
            return kind
    suffixes = [suffix for form in FORMATS.values() for suffix in form.suffixes]
    raise DataError(
        f"a format is wanted, but the name of {file.url} ends with none of "
        f"{', '.join(suffixes)}; write format= with one of {sorted(FORMATS)}"
    )
