"""How a call and its results become bytes: by name where that will do, else whole."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Mapping
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

import attrs

from accelx.errors import MissingExtraError

MAIN = (
    "__mp_main__"  # the caller's main module, under the name multiprocessing gives it
)


# id of an object of the caller's main module -> its name there, and the object itself,
# so that the id stays its own.
Known = dict[int, tuple[str, object]]


def whole(value: object, known: Known | None = None) -> bytes:
    """The value with the code of all that no module holds, by cloudpickle.

    What is `known` goes as its name: a class that came from the caller is, when it
    comes back, the very class and not a copy. Raises MissingExtraError without
    cloudpickle, and whatever an object that cannot be sent raises.
    """
    try:
        import cloudpickle
    except ImportError as error:
        raise MissingExtraError(
            "functions and classes that no module holds (of a notebook, a lambda, one "
            f"within another) travel by cloudpickle, which does not import ({error}); "
            "write pip install 'accelx[notebook]', or put them at the top of a module"
        ) from error

    class Pickler(cloudpickle.Pickler):  # its base is known only now
        def persistent_id(self, obj: object) -> str | None:
            return known[id(obj)][0] if known and id(obj) in known else None

        def reducer_override(self, obj: Any) -> Any:
            # torch.backends.cudnn, say: a module of a class of its own
            if isinstance(obj, ModuleType) and sys.modules.get(obj.__name__) is obj:
                return import_module, (obj.__name__,)
            return super().reducer_override(obj)

    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def load(data: bytes) -> Any:
    """In the caller: what a rank has sent, with the types of this main module."""
    return _Unpickler(io.BytesIO(data)).load()


@attrs.frozen
class Again:
    """An exception that pickle could not make again, because its class takes more."""

    error: Exception

    def __reduce__(self) -> tuple[Any, ...]:
        return again, (type(self.error), self.error.args, vars(self.error))


def again(kind: type[Exception], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    """The exception of these parts; its class is not asked."""
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(state)
    return error


def known_of(names: Mapping[str, object]) -> Known:
    """The functions and classes of the caller's main module."""
    return {
        id(value): (name, value)
        for name, value in names.items()
        if isinstance(value, FunctionType | type) and value.__module__ == "__main__"
    }


def be_main(names: Mapping[str, Any]) -> None:
    """In a rank: let `__main__` be a module of these names, so that pickle finds them.

    Objects of a notebook's own classes can then go from rank to rank.
    """

    def find(name: str) -> Any:
        if name in names:
            return names[name]
        raise AttributeError(f"module '__main__' has no attribute {name!r}")

    main = ModuleType("__main__")
    main.__dict__["__getattr__"] = find
    sys.modules["__main__"] = main


class _Unpickler(pickle.Unpickler):
    """Finds what a rank calls `__mp_main__`, or has by name, in the main module."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class("__main__" if module == MAIN else module, name)

    def persistent_load(self, pid: str) -> Any:
        return super().find_class("__main__", pid)
