"""Plain data as JSON that remembers its types, with tensors beside it. No pickle."""

from __future__ import annotations

import base64
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from accelx._torch import is_dtensor
from accelx.errors import CheckpointError
from accelx.saves import check
from accelx.saves.flat import Flat, Held

Keep = Callable[[str, Held], None]  # stores a tensor under a name
Made = Callable[..., Held]  # (name, like, on CPU, reuse like) -> one to be filled
LEVELS = 16  # of nesting; each is up to three of JSON, of which strict.DEPTH are read
BITS = 63  # of an integer that JSON readers take as it is
KEYS = (str, int, bool, float, type(None))
_PLAIN, _HELD = (bool, str), (Tensor, Flat)  # made once: a save asks of each tensor


@attrs.frozen(eq=False)
class Kept:
    """The state_dict of an object that is not here: written as the object would be."""

    state: Mapping[str, Any]


def encode(value: Any, path: str, keep: Keep, level: int = 0) -> Any:
    """`value` as JSON; its tensors go to `keep` under their path.

    None, bool, int, float, str, bytes, tuples, lists, dicts with keys of such, tensors,
    dtypes, frozen attrs records, and objects with state_dict and load_state_dict.
    Raises CheckpointError with the path for anything else.
    """
    if level > LEVELS:
        raise _refused(f"{path} is nested deeper than {LEVELS} levels, or in itself")
    if isinstance(value, _HELD):
        _plain(value, path)
        keep(path, value)
        return {"$": "tensor", "cpu": value.is_cpu}
    if value is None or isinstance(value, _PLAIN):
        return value
    if type(value) is int:
        small = value.bit_length() <= BITS
        return value if small else {"$": "int", "v": hex(value)}
    if isinstance(value, float):  # NumPy's too, as schedules compute them
        number = float(value)
        return number if math.isfinite(number) else {"$": "float", "v": repr(number)}
    if type(value) in (list, tuple):
        each = [encode(v, f"{path}.{i}", keep, level + 1) for i, v in enumerate(value)]
        return each if type(value) is list else {"$": "tuple", "v": each}
    if isinstance(value, Mapping):
        return _mapping(value, path, keep, level + 1)
    return _object(value, path, keep, level + 1)


def _plain(value: Held, path: str) -> None:
    if isinstance(value, Flat):
        return
    kind = type(value)
    if kind not in (Tensor, torch.nn.Parameter) and not is_dtensor(value):
        raise CheckpointError(
            f"{path} is a {kind.__name__}, a tensor of a class of its own, which a "
            "checkpoint cannot hold; save the plain tensors that it is made of"
        )
    if value.layout is not torch.strided or value.is_meta:
        where = f"{value.layout} on {value.device}"
        raise CheckpointError(
            f"{path} wants to be a dense tensor with numbers in it, got {where}; "
            "write tensor.to_dense(), or give it a device"
        )


def _mapping(value: Mapping[Any, Any], path: str, keep: Keep, level: int) -> Any:
    if set(map(type, value)) <= {str} and "$" not in value:
        return {k: encode(v, f"{path}.{k}", keep, level) for k, v in value.items()}
    for key in value:
        if type(key) not in KEYS:
            raise _refused(f"{path} has the key {key!r}")
    each = [
        [encode(k, path, keep, level), encode(v, f"{path}.{k}", keep, level)]
        for k, v in value.items()
    ]
    return {"$": "dict", "v": each}


def _object(value: Any, path: str, keep: Keep, level: int) -> Any:
    if isinstance(value, Kept):
        return {"$": "object", "v": encode(value.state, path, keep, level)}
    if isinstance(value, bytes):
        return {"$": "bytes", "v": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {"$": "dtype", "v": str(value).removeprefix("torch.")}
    if _stateful(value):
        return {"$": "object", "v": encode(value.state_dict(), path, keep, level)}
    if attrs.has(type(value)):
        fields = attrs.fields(type(value))
        for f in fields:
            if not f.init:  # nothing could set it again
                raise _refused(f"{path}.{f.name} is a field that init=False keeps out")
        each = {
            f.name: encode(getattr(value, f.name), f"{path}.{f.name}", keep, level)
            for f in fields
        }
        return {"$": "record", "v": each}
    raise _refused(f"{path} is a {type(value).__name__}")


def _stateful(value: Any) -> bool:
    both = hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
    return both and not isinstance(value, type)


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
        return [decode(v, f"{path}.{i}", _at(like, i), make) for i, v in enumerate(raw)]
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
    """What stands at a key or index; a tensor stands for all that lies inside."""
    if isinstance(like, (list, tuple)):
        return like[key] if key in range(len(like)) else None  # type: ignore[reportUnknownArgumentType]
    return like.get(key) if isinstance(like, Mapping) else _tensor(like)


def _tensor(like: Any) -> Any:
    return like if isinstance(like, _HELD) else None


def _special(kind: Any, v: Any, path: str, like: Any, make: Made) -> Any:
    if isinstance(kind, str) and kind in _SCALARS and isinstance(v, str):
        return _scalar(kind, v, path)
    if kind == "tuple" and isinstance(v, list):
        return tuple(decode(v, path, like, make))
    if kind == "dict" and isinstance(v, list):
        pairs = [_pair(one, path, make) for one in v]
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


_SCALARS: dict[str, Callable[[str], Any]] = {
    "int": lambda v: int(v, 16),
    "float": lambda v: {str(f): f for f in (math.nan, math.inf, -math.inf)}[v],
    "bytes": lambda v: base64.b64decode(v, validate=True),
    "dtype": lambda v: {str(d): d for d in _dtypes()}[f"torch.{v}"],
}


def _dtypes() -> Iterator[torch.dtype]:
    return (d for d in vars(torch).values() if isinstance(d, torch.dtype))


def _scalar(kind: str, v: str, path: str) -> Any:
    try:
        return _SCALARS[kind](v)
    except (ValueError, KeyError):
        raise check.damaged(path, f"the {kind} {v[:40]!r}") from None


def _pair(one: Any, path: str, make: Made) -> tuple[Any, Any]:
    """A key, and its value still as JSON."""
    if isinstance(one, list) and len(one) == 2:  # type: ignore[reportUnknownArgumentType]
        key = decode(one[0], path, None, make)
        if type(key) in KEYS:
            return key, one[1]
    raise check.damaged(path, f"{str(one)[:40]} in place of a key and a value")


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
    return hand(lambda fields: attrs.evolve(like, **fields), fields, path)


@attrs.frozen(eq=False)
class _Later:
    """An object of the user's, and the state that it is to load."""

    target: Any
    state: Any
    path: str


def hand(load: Callable[[Any], Any], state: Any, path: str) -> Any:
    """`load(state)`, where `load` is not ours; what it raises, as a CheckpointError."""
    try:
        return load(state)
    except Exception as error:
        raise CheckpointError(
            f"{path} wants to be loaded as it was saved, but what loads it here raised "
            f"{type(error).__name__}: {error}; put there what was saved, or leave it "
            "out with only=..."
        ) from error


def _unloaded(path: str, target: Any) -> str:
    if target is None and path.startswith("slots."):
        return (
            f"{path} was saved by a pass that is not in this chain; put it in, or load "
            f'the rest: only=lambda name, _: not name.startswith("{path}")'
        )
    return (
        f"{path} was saved from an object with a state_dict, and here it is "
        f"{type(target).__name__}; put such an object there, or leave it out with "
        "only=..."
    )


def settle(value: Any) -> Any:
    """`value` with every object in it loaded: call it once tensors are filled."""
    if isinstance(value, _Later):
        if not hasattr(value.target, "load_state_dict"):
            raise CheckpointError(_unloaded(value.path, value.target))
        hand(value.target.load_state_dict, settle(value.state), value.path)
        return value.target
    if isinstance(value, list | tuple):
        return type(value)(settle(v) for v in value)
    if isinstance(value, dict):
        return _mapped({k: settle(v) for k, v in value.items()}, value)
    if attrs.has(type(value)):
        fields = attrs.fields(type(value))
        return attrs.evolve(
            value, **{f.alias: settle(getattr(value, f.name)) for f in fields}
        )
    return value
