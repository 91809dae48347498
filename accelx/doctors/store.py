"""Whether a store does what checkpoints ask of it, and how fast; nothing is left."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelx import storage
from accelx.doctors import text
from accelx.errors import StorageError
from accelx.storage_at import scrubbed
from accelx.text import size

Data = Mapping[str, Any]
SMALL = b"accelx doctor\n"
SLICE = 4096  # bytes read out of the middle


class _Trial:
    """Steps that were tried, in order; after one that failed none is."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    @property
    def sound(self) -> bool:
        return not any(step["error"] for step in self.steps)

    def step(self, name: str, do: Callable[[], Any], count: int = 0) -> None:
        if not self.sound:
            return
        self._timed(name, do, count)

    def last(self, name: str, do: Callable[[], Any]) -> None:
        """Also after a failure."""
        self._timed(name, do, 0)

    def _timed(self, name: str, do: Callable[[], Any], count: int) -> None:
        began, error = time.perf_counter(), ""
        try:
            do()
        except Exception as failure:  # a store may raise a kind of its own
            error = scrubbed(f"{type(failure).__name__}: {failure}")
        took = time.perf_counter() - began
        self.steps.append(
            {"step": name, "seconds": took, "bytes": count, "error": error}
        )


def tried(url: str, count: int) -> dict[str, Any]:
    """Write, read, verify and remove objects and a checkpoint in a folder under `url`.

    `count` is the bytes of the larger object. Effects: a folder `accelx-doctor-...`,
    which is removed at the end, also after a failure.
    """
    base = storage.at(url)
    folder = storage.inside(base, f"accelx-doctor-{secrets.token_hex(6)}")
    trial = _Trial()
    with _as_before(base):
        _objects(trial, folder, count)
        _checkpoint(trial, f"{url.rstrip('/')}/{folder.url.rpartition('/')[2]}")
        trial.last("remove all", lambda: storage.remove_folder(folder))
        trial.last("nothing is left", lambda: _gone(folder))
    return {"url": base.url, "steps": trial.steps, "sound": trial.sound}


@contextmanager
def _as_before(base: storage.Store) -> Generator[None]:
    """Take away the folders on a disk that this has made on the way to `base`."""
    path = Path(base.root)
    above = [path, *path.parents] if base.local else []
    missing = [one for one in above if not one.exists()]
    try:
        yield
    finally:
        for one in missing:  # the innermost first; one that is not empty stays
            if one.is_dir() and not any(one.iterdir()):
                one.rmdir()


def _objects(trial: _Trial, folder: storage.Store, count: int) -> None:
    data = os.urandom(min(count, 2**20))
    large = (data * (count // len(data) + 1))[:count]
    parts = [large[i : i + 2**20] for i in range(0, count, 2**20)]
    trial.step(
        "write a small object",
        lambda: storage.write(folder, "small", [SMALL], len(SMALL)),
    )
    trial.step("read it back", lambda: _same(folder, "small", SMALL))
    trial.step("write over it", lambda: _over(folder))
    trial.step("write", lambda: storage.write(folder, "large", parts, count), count)
    trial.step("read", lambda: _same(folder, "large", large), count)
    trial.step("read a range", lambda: _range(folder, large))
    trial.step("list", lambda: _listed(folder, count))
    trial.step("remove one", lambda: _removed(folder))


def _wanted(what: str, fine: bool, got: object) -> None:
    if not fine:
        raise StorageError(
            f"wanted {what}, got {got}; the store does not keep what it is given: do "
            "not save there"
        )


def _same(folder: storage.Store, name: str, data: bytes) -> None:
    got = storage.read(folder, name, len(data))
    _wanted(
        f"the {len(data)} bytes that were written", got == data, f"{len(got)} others"
    )


def _over(folder: storage.Store) -> None:
    new = SMALL.upper()
    storage.write(folder, "small", [new], len(new))
    _same(folder, "small", new)


def _range(folder: storage.Store, data: bytes) -> None:
    start = len(data) // 2
    out = bytearray(min(SLICE, len(data) - start))
    with storage.reading(folder, "large") as read_into:
        read_into(start, memoryview(out))
    _wanted(
        "a range as it was written",
        bytes(out) == data[start : start + len(out)],
        "another",
    )


def _listed(folder: storage.Store, count: int) -> None:
    got = storage.sizes(folder)
    wanted = {"small": len(SMALL), "large": count}
    _wanted(f"a listing of {wanted}", got == wanted, got)


def _removed(folder: storage.Store) -> None:
    storage.remove(folder, "small")
    got = sorted(storage.sizes(folder))
    _wanted("a listing without what was removed", got == ["large"], got)


def _gone(folder: storage.Store) -> None:
    got = storage.sizes(folder)
    _wanted("an empty listing after removing all", not got, sorted(got))


def _checkpoint(trial: _Trial, url: str) -> None:
    import torch

    from accelx.passes.load_state import load_state
    from accelx.passes.save_state import save_state
    from accelx.records import Env
    from accelx.run import init
    from accelx.saves.commit import latest
    from accelx.transform import identity

    where, env = f"{url}/run", Env()

    def state(fill: float) -> Any:
        made = torch.nn.Linear(8, 4)
        torch.nn.init.constant_(made.weight, fill)
        return init(identity, made, lambda m: torch.optim.SGD(m.parameters(), 0.1))

    def loaded() -> None:
        got = load_state(env, where)(state(0.0)).model.weight
        _wanted("the weights that were saved", bool((got == 0.5).all()), got.tolist())

    half = state(0.5)  # torch and its optimizers are imported before time is taken
    trial.step("save a checkpoint", lambda: save_state(env, where)(half))
    trial.step(
        "find it", lambda: _wanted("it", latest(where) is not None, "no checkpoint")
    )
    trial.step("load and compare it", loaded)


def lines(data: Data) -> list[str]:
    """One line a step, with its speed or what failed."""
    failed = [one for one in data["steps"] if one["error"]]
    verdict = "sound: nothing failed, nothing is left there"
    if failed:
        verdict = "NOT sound: " + ", ".join(one["step"] for one in failed)
    return [
        data["url"],
        "",
        *text.columns(
            "step >time >speed >result",
            (
                (
                    one["step"],
                    text.duration(one["seconds"]),
                    _speed(one),
                    "FAILED" if one["error"] else "ok",
                )
                for one in data["steps"]
            ),
        ),
        "",
        *(f"{one['step']}: {one['error']}" for one in failed),
        verdict,
    ]


def _speed(one: Data) -> str:
    if not one["bytes"] or one["error"]:
        return ""
    return f"{size(int(one['bytes'] / one['seconds']))}/s"
