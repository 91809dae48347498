"""Plain data as JSON that remembers its types, with tensors beside it. No pickle."""

from __future__ import annotations

import base64
import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from accelx.errors import CheckpointError

Keep = Callable[[str, Tensor], None]  # stores a tensor under a name
Made = Callable[[str, Any, bool], Tensor]  # (name, like, on CPU) -> one to be filled


def encode(value: Any, path: str, keep: Keep) -> Any:
    """`value` as JSON; its tensors go to `keep` under their path.

    None, bool, int, float, str, bytes, tuples, lists, dicts with keys of such, tensors,
    dtypes, frozen attrs records, and objects with state_dict and load_state_dict.
    Raises CheckpointError with the path for anything else.
    """
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, Tensor):
        _plain(value, path)
        keep(path, value)
        return {"$": "tensor", "cpu": value.device.type == "cpu"}
    if type(value) is float:
        return value if math.isfinite(value) else {"$": "float", "v": repr(value)}
    if type(value) in (list, tuple):
        each = [encode(v, f"{path}.{i}", keep) for i, v in enumerate(value)]
        return each if type(value) is list else {"$": "tuple", "v": each}
    if isinstance(value, Mapping):
        return _mapping(value, path, keep)
    return _object(value, path, keep)


def _plain(value: Tensor, path: str) -> None:
    from accelx._torch import is_dtensor

    kind = type(value)
    if kind not in (Tensor, torch.nn.Parameter) and not is_dtensor(value):
        raise CheckpointError(
            f"{path} is a {kind.__name__}, a tensor of a class of its own, which a "
            "checkpoint cannot hold; save the plain tensors that it is made of"
        )
    if value.layout is not torch.strided or value.device.type == "meta":
        where = f"{value.layout} on {value.device}"
        raise CheckpointError(
            f"{path} wants to be a dense tensor with numbers in it, got {where}; "
            "write tensor.to_dense(), or give it a device"
        )


def _mapping(value: Mapping[Any, Any], path: str, keep: Keep) -> Any:
    keys = [type(key) for key in value]
    if all(key is str for key in keys) and "$" not in value:
        return {k: encode(v, f"{path}.{k}", keep) for k, v in value.items()}
    if not all(key in (str, int, bool, float, type(None)) for key in keys):
        raise _refused(f"{path} has the key {next(iter(value))!r}")
    each = [
        [encode(k, path, keep), encode(v, f"{path}.{k}", keep)]
        for k, v in value.items()
    ]
    return {"$": "dict", "v": each}


def _object(value: Any, path: str, keep: Keep) -> Any:
    if isinstance(value, bytes):
        return {"$": "bytes", "v": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {"$": "dtype", "v": str(value).removeprefix("torch.")}
    if attrs.has(type(value)):
        fields = {f.name: getattr(value, f.name) for f in attrs.fields(type(value))}
        each = {k: encode(v, f"{path}.{k}", keep) for k, v in fields.items()}
        return {"$": "record", "v": each}
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return {"$": "object", "v": encode(value.state_dict(), path, keep)}
    raise _refused(f"{path} is a {type(value).__name__}")


def _refused(came: str) -> CheckpointError:
    return CheckpointError(
        "a checkpoint holds tensors, numbers, text, lists, tuples and dicts, but "
        f"{came}; give it as those, or as an object with state_dict() and "
        "load_state_dict()"
    )


def decode(raw: Any, path: str, like: Any, make: Made) -> Any:
    """What `encode` was given. `like` is what stands there now, or None.

    Records are `like` with other fields; an object comes back as a function that loads
    it, for when the tensors are filled: see `settle`. Raises CheckpointError.
    """
    if isinstance(raw, list):
        likes: Any = like if isinstance(like, list | tuple) else ()
        return [
            decode(v, f"{path}.{i}", likes[i] if i < len(likes) else None, make)
            for i, v in enumerate(raw)
        ]
    if not isinstance(raw, dict):
        return raw
    kind = raw.get("$")
    if kind is None:
        pairs = raw.items()
        made = {k: decode(v, f"{path}.{k}", _at(like, k), make) for k, v in pairs}
        return _mapped(made, like)
    if kind == "tensor":
        return make(path, like, bool(raw.get("cpu")))
    return _special(kind, raw.get("v"), path, like, make)


def _mapped(made: dict[Any, Any], like: Any) -> Any:
    """`made` as the kind of dict that stands there, such as a scheduler's Counter."""
    if not isinstance(like, dict) or type(like) is dict:  # type: ignore[reportUnknownArgumentType]
        return made
    kind: Any = copy.copy(like)  # type: ignore[reportUnknownArgumentType]
    kind.clear()
    kind.update(made)
    return kind


def _at(like: Any, key: Any) -> Any:
    return like.get(key) if isinstance(like, Mapping) else None


def _special(kind: Any, v: Any, path: str, like: Any, make: Made) -> Any:
    if kind == "tuple" and isinstance(v, list):
        return tuple(decode(v, path, like, make))
    if kind == "float" and v in ("nan", "inf", "-inf"):
        return float(v)
    if kind == "bytes" and isinstance(v, str):
        return base64.b64decode(v, validate=True)
    if kind == "dtype" and isinstance(getattr(torch, str(v), None), torch.dtype):
        return getattr(torch, str(v))
    if kind == "dict" and isinstance(v, list):
        pairs = [(decode(k, path, None, make), rest) for k, rest in v]
        each = {k: decode(r, f"{path}.{k}", _at(like, k), make) for k, r in pairs}
        return _mapped(each, like)
    if kind == "record" and isinstance(v, dict):
        return _record(v, path, like, make)
    if kind == "object":
        now = like.state_dict() if hasattr(like, "state_dict") else None
        return _Later(like, decode(v, path, now, make), path)
    raise CheckpointError(
        f"{path} wants a type that this accelx knows, got {str(kind)[:40]!r}; install "
        "the accelx that saved it"
    )


def _record(v: dict[str, Any], path: str, like: Any, make: Made) -> Any:
    if not attrs.has(type(like)):
        raise CheckpointError(
            f"{path} was saved as a record, and here it is {type(like).__name__}; put "
            "the pass that keeps it into the chain, or leave it out with only=..."
        )
    known = {f.name: f for f in attrs.fields(type(like))}
    fields = {
        known[k].alias: decode(one, f"{path}.{k}", getattr(like, k), make)
        for k, one in v.items()
        if k in known
    }
    return attrs.evolve(like, **fields)


@attrs.frozen(eq=False)
class _Later:
    """An object of the user's, and the state that it is to load."""

    target: Any
    state: Any
    path: str


def settle(value: Any) -> Any:
    """`value` with every object in it loaded: call it once tensors are filled."""
    if isinstance(value, _Later):
        if not hasattr(value.target, "load_state_dict"):
            raise CheckpointError(
                f"{value.path} was saved from an object with a state_dict, and here it "
                f"is {type(value.target).__name__}; put such an object there, or leave "
                "it out with only=..."
            )
        value.target.load_state_dict(settle(value.state))
        return value.target
    if isinstance(value, list | tuple):
        return type(value)(settle(v) for v in value)
    if isinstance(value, dict):
        return {k: settle(v) for k, v in value.items()}
    if attrs.has(type(value)):
        fields = attrs.fields(type(value))
        return attrs.evolve(
            value, **{f.alias: settle(getattr(value, f.name)) for f in fields}
        )
    return value
