"""Which folder of which store a URL names, and how it is printed without secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from accelx.errors import MissingExtraError, StorageError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # protocol -> extra
SECRET = re.compile(r"key|secret|token|passw|credential|signature|sas|connection", re.I)
SLIP = re.compile(r"[A-Za-z][\w+.-]+:/(?!/)")  # "s3:/bucket": no path, and no URL
SHORT = 4  # characters: a shorter "secret" would blot out half of a text


@attrs.frozen
class Store:
    """A folder at a URL."""

    fs: Any = attrs.field(repr=False, eq=False)  # an fsspec filesystem
    root: str  # the folder's path in `fs`, no slash at its end
    local: bool  # a disk of this machine: written by the system's own calls
    url: str  # to print: no user, no password, no query
    pid: int = attrs.field(factory=os.getpid, repr=False, eq=False)  # that made `fs`


def at(url: str | os.PathLike[str]) -> Store:
    """The folder that `url` names; nothing is read, made or connected to.

    A text without `protocol://` is a path of this machine. Raises MissingExtraError
    where the package of the protocol is not installed, ValueError where fsspec does not
    know the protocol, the URL names no folder, or one slash of it is missing.
    """
    import fsspec.core
    from fsspec.implementations.local import LocalFileSystem

    text = os.fspath(url)
    if not text or SLIP.match(text):
        raise _slipped(text)
    if text.startswith("file:///") or "://" not in text:
        path = Path(text.removeprefix("file://")).expanduser().absolute()
        path = os.path.normpath(path)
        return Store(LocalFileSystem(), path.rstrip("/"), True, f"file://{path}")
    shown, protocol = printable(text), text.partition("://")[0]
    if "::" in text:
        raise ValueError(
            f"a store wants one protocol, but {shown} chains several, and what lies "
            "between may answer from a copy; write the last URL alone"
        )
    try:
        fs, root = fsspec.core.url_to_fs(text)
    except ImportError as error:
        raise _missing(protocol, shown, error) from None
    except ValueError as error:
        raise ValueError(
            f"a store wants a URL that fsspec can open, but {shown} is none "
            f"({scrubbed(str(error))}); write a path, or a URL such as "
            "s3://bucket/folder"
        ) from None
    root = root.rstrip("/")
    if isinstance(fs, LocalFileSystem):
        return Store(fs, root, True, f"file://{root}")
    if not root and "memory" not in protocols(fs):
        raise ValueError(
            f"a store wants a folder, but {shown} names none; write "
            f"{protocol}://bucket/folder"
        )
    if re.search("[?#]", root):  # it could not be printed, and so not found again
        raise ValueError(
            f"a store wants a folder without ? and # in its name, got {shown} with "
            "more behind it; name the folder otherwise"
        )
    return Store(fs, root, False, shown)


def _slipped(text: str) -> ValueError:
    """Of a text that would name a folder of this machine which nobody meant."""
    if not text:
        return ValueError('a store wants a path or a URL, got ""; write "." for here')
    protocol, _, path = text.partition(":/")
    shown = printable(f"{protocol}://{'/' * (protocol == 'file')}{path}")
    return ValueError(
        f"a store wants two slashes behind the protocol, got {protocol}:/ and no more; "
        f'write "{shown}", or put "./" before it for a folder of that name'
    )


def _missing(protocol: str, shown: str, error: ImportError) -> MissingExtraError:
    from fsspec.registry import known_implementations

    if protocol in EXTRAS:
        write = f"write pip install 'accelx[{EXTRAS[protocol]}]'"
    else:
        package = known_implementations.get(protocol, {}).get("class", "")
        package = package.partition(".")[0]
        plain = package not in ("", "fsspec")
        write = f"write pip install {package}" if plain else "install what it names"
    return MissingExtraError(
        f"{shown} wants the package that speaks {protocol}, but it does not import "
        f"({error}); {write}"
    )


def inside(store: Store, name: str) -> Store:
    """The folder `name` in this one."""
    url = f"{store.url.rstrip('/')}/{name}" if store.root else f"{store.url}{name}"
    return attrs.evolve(store, root=path_of(store, name), url=url)


def path_of(store: Store, name: str) -> str:
    """Where the object or folder `name` lies in `store.fs`.

    Names come out of manifests too, which anybody may have written: one that would
    leave the folder raises StorageError.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise StorageError(
            f"{store.url} wants plain names in its folder, but {name!r} is none; "
            "write a name without a slash"
        )
    return f"{store.root}/{name}"


def filesystem(store: Store) -> Any:
    """The store's filesystem, for this process.

    Threads and sockets do not cross a fork, so a child makes its own from the same
    arguments; fsspec hands it the same one on every call.
    """
    if store.pid == os.getpid():
        return store.fs
    return type(store.fs)(*store.fs.storage_args, **store.fs.storage_options)


def protocols(fs: Any) -> tuple[str, ...]:
    """The names by which URLs ask for this filesystem."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def printable(url: str) -> str:
    """`url` without user, password, query and fragment."""
    protocol, _, rest = url.rpartition("://")
    rest = re.split(r"[?#]", rest, maxsplit=1)[0].rstrip("/")
    authority, slash, path = rest.partition("/")
    return f"{protocol}://{authority.rpartition('@')[2]}{slash}{path}"


def scrubbed(text: str, fs: Any = None) -> str:
    """`text` without the credentials of URLs in it, and without those of `fs`."""
    secrets = _secrets(getattr(fs, "storage_options", {}))
    for secret in sorted(secrets, key=len, reverse=True):  # one may begin another
        text = text.replace(secret, "***")
    text = re.sub(r"://[^\s/'\"]*@", "://", text)
    return re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1?...", text)


def _secrets(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets(value)
        elif isinstance(value, str) and len(value) >= SHORT and SECRET.search(name):
            yield value
