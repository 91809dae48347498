"""Which names a DCP `.metadata` may use: each becomes an inert record of ours."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

from accelx.errors import CheckpointError, DamagedError

METADATA = "torch.distributed.checkpoint.metadata"
KNOWN = {
    f"{METADATA}.Metadata",
    f"{METADATA}.MetadataIndex",
    f"{METADATA}.StorageMeta",
    f"{METADATA}.TensorStorageMetadata",
    f"{METADATA}.BytesStorageMetadata",
    f"{METADATA}.ChunkStorageMetadata",
    f"{METADATA}.TensorProperties",
    f"{METADATA}._MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    # where it was saved; the second as Python 3.13 writes it
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.WindowsPath",
}


class Record:
    """What one object of the pickle held; it does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, dict) else {"state": state})


RECORDS = {name: type(name.rpartition(".")[2], (Record,), {}) for name in KNOWN}


def _member(of: Any, name: Any) -> Record:
    """A member of an enumeration by name, as Python 3.11.0 to 3.11.3 pickle it."""
    if of is not RECORDS[f"{METADATA}._MEM_FORMAT_ENCODING"]:
        raise _refused(f"builtins.getattr of {of!r}")
    return of(name)


def _refused(full: str) -> CheckpointError:
    return CheckpointError(
        f"a .metadata wants classes of torch.distributed.checkpoint alone, got {full}, "
        "which could run code; it was not imported. The folder is of another tool or "
        "was tampered with: do not use it"
    )


class _Reader(pickle.Unpickler):
    """Builds records, and refuses every other name before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in RECORDS:
            return RECORDS[full]
        if full == "torch.Size":
            return tuple
        if full == "collections.OrderedDict":
            return dict
        if full == "builtins.getattr":
            return _member
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise _refused(full)


def unpickled(data: bytes, what: str) -> Any:
    """The records that a `.metadata` describes; no code of the file's runs.

    Raises CheckpointError for a name beyond those that DCP writes, DamagedError for
    bytes that are no pickle.
    """
    try:
        return _Reader(io.BytesIO(data)).load()
    except CheckpointError:
        raise
    except Exception as error:  # a broken pickle may raise anything
        raise DamagedError(
            f"{what} wants to be a pickle as DCP writes it, got {str(error)[:200]}; it "
            "is damaged: take another checkpoint"
        ) from error
