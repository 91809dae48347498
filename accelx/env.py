"""Where this process stands, and the one effect that joins it to the other ranks."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

import attrs

from accelx.env_axes import Axes, lay_out
from accelx.env_detect import detect
from accelx.env_device import (
    choose_backend,
    choose_device,
    named_device,
    probe,
    set_device,
)
from accelx.env_part import rows_env, sums_env
from accelx.env_rest import rest
from accelx.errors import CollectiveError

if TYPE_CHECKING:
    from accelx.records import Env

__all__ = ["close", "connect", "detect"]

REPORTS = "ACCELX_REPORTS"  # by which the launcher says where its logs are
GOODBYE = 10.0  # seconds that the rank with the store waits for the others to leave


def connect(
    env: Env | None = None,
    *,
    axes: Axes | None = None,
    device: str | None = None,
    backend: str | None = None,
    timeout: float | None = None,
    reports: str | None = None,
) -> Env:
    """Join this process to the other ranks; the Env returned says where it stands.

    `env` is by default what `detect` finds in the environment. `axes` names the axes of
    the mesh: `"replicate=2,shard=-1"`, a mapping, or a tuple of Axis; by default one
    axis "data". `device` and `backend` are by default the best that this machine has;
    "cuda" is the one of the local rank.
    `timeout` in seconds is how long a collective may wait. `reports` is a folder where
    each rank leaves what it did last and, when nothing happens for nearly as long, its
    stacks, for `python -m accelx.doctor hang`; by default the launcher's `--logs`.

    Effects: sets torch's current device; with several ranks opens torch's process group
    (or takes the one that is open, if it has as many ranks) and closes it at exit. One
    process opens none. Writes no environment variable. Again is the same as once.
    Raises ValueError for axes that do not multiply to the world, PlacementError for a
    device that is not here.
    """
    env = detect(os.environ) if env is None else env
    axes = axes if axes is not None else env.axes or None
    env = attrs.evolve(env, axes=lay_out(axes, env.world))
    chosen = _device(env) if device is None else named_device(device, env)
    env = attrs.evolve(env, device=chosen)
    set_device(env)
    backend = backend or env.backend or choose_backend(env.device)
    env = attrs.evolve(env, backend=_join(env, backend, timeout))
    _report(env, reports or os.environ.get(REPORTS), timeout)
    if env.backend and len(env.axes) > 1:
        # Its groups are made by all ranks together, so not at a random moment.
        from accelx.comm import mesh

        for part in (env, rows_env(env), sums_env(env)):
            if part.axes:
                mesh(part)
        if env.backend != "fake":  # of `simulate`, where no other rank is
            _meet("/".join(f"{axis.name}={axis.size}" for axis in env.axes))
    return env


def _report(env: Env, folder: str | None, timeout: float | None) -> None:
    if env.backend is None or folder is None:
        return
    from accelx._torch import group_timeout
    from accelx.comm_hang import leave
    from accelx.comm_wire import group

    leave(env, folder, timeout or group_timeout(group(env, "connect")))


def _device(env: Env) -> str:
    if env.device != "cpu" or env.backend is not None:
        return env.device  # chosen by the user, or by an earlier connect
    return choose_device(probe(xla=_wants_xla()), env)


def _wants_xla() -> bool:
    from importlib.util import find_spec

    return "PJRT_DEVICE" in os.environ and find_spec("torch_xla") is not None


def _join(env: Env, backend: str, timeout: float | None) -> str | None:
    """Open the group, or take the one that is open; its backend, None without one."""
    import torch.distributed as dist

    if dist.is_initialized():
        return _backend_of_open(env)
    if env.world == 1:
        return None
    from accelx.comm_ring import forget_ring

    forget_ring()  # of a group that was closed by others
    limit = None if timeout is None else timedelta(seconds=timeout)
    store = _store(env, limit)
    dist.init_process_group(
        backend, store=store, rank=env.rank, world_size=env.world, timeout=limit
    )
    _meet("connect")
    atexit.register(_leave, env)
    return backend


def _leave(env: Env) -> None:
    close(env)
    rest()  # or Python would end under threads of torch


def _backend_of_open(env: Env) -> str:
    import torch.distributed as dist

    if (dist.get_rank(), dist.get_world_size()) != (env.rank, env.world):
        raise CollectiveError(
            f"connect wants a group of rank {env.rank} of {env.world}, but rank "
            f"{dist.get_rank()} of {dist.get_world_size()} is open already; write "
            "connect(Env(rank=..., world=...)) as the open one, or destroy it before"
        )
    return str(dist.get_backend())


def _store(env: Env, limit: timedelta | None) -> Any:
    """The store that the ranks meet in, under a prefix of this opening.

    Without it a second opening over the same store would read the first's addresses.
    """
    from accelx._torch import prefixed, rendezvous

    if env.rendezvous is None:
        raise CollectiveError(
            f"connect wants to know where the {env.world} ranks meet, but the Env has "
            'no rendezvous; write Env(..., rendezvous="tcp://host:port")'
        )
    store = _own_store(env, limit)
    if store is None:
        store = rendezvous(env.rendezvous, env.rank, env.world, limit)
    attempt = env.rendezvous.partition("?attempt=")[2] or "0"
    opening = store.add(f"accelx/{attempt}/{env.rank}", 1)
    return prefixed(f"accelx/{attempt}/{opening}", store)


def _own_store(env: Env, limit: timedelta | None) -> Any:
    """The server of ranks that meet on this machine, which torch would open to all."""
    where = urlsplit(env.rendezvous)
    if not env.main or where.hostname != "127.0.0.1" or _launcher_serves():
        return None
    if where.scheme != "tcp" or sys.platform == "win32":
        return None
    from accelx._torch import loopback_store

    return loopback_store(where.port or 0, env.world, limit)


def _launcher_serves() -> bool:
    """Whether torchrun or accelx.spawn serves the store, so that no rank does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _meet(where: str) -> None:
    """Wait until all are connected: one that leaves at once would break the others.

    torch does not: a group of gloo is made while others still answer its connections.
    """
    import torch.distributed as dist

    from accelx._torch import default_store

    store = default_store()
    if store.add(f"accelx/met/{where}", 1) == dist.get_world_size():
        store.set(f"accelx/all-met/{where}", "1")
    store.wait([f"accelx/all-met/{where}"])


@contextmanager
def lent(values: Mapping[str, str]) -> Generator[None]:
    """`values` in the environment for a library that asks there; undone at the end.

    With all else that the block, or what it calls, writes into the environment.
    """
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in {*before, *os.environ}:
            if name not in before:
                del os.environ[name]
            elif os.environ.get(name) != before[name]:
                os.environ[name] = before[name]


def close(env: Env) -> None:
    """Leave the other ranks: flush what was printed, forget the mesh, close the group.

    No barrier: a rank that failed waits for nobody. Safe to call twice, and called at
    exit for a group that `connect` opened.
    """
    import torch.distributed as dist

    from accelx.comm import forget_meshes

    sys.stdout.flush()
    sys.stderr.flush()
    forget_meshes()
    if not dist.is_initialized():
        return
    _say_goodbye(env, wait=env.main and not _failing())
    dist.destroy_process_group()


def _failing() -> bool:
    return sys.exc_info()[0] is not None or getattr(sys, "last_value", None) is not None


def _say_goodbye(env: Env, wait: bool) -> None:
    """The rank that serves the store leaves last: nobody talks to a closed one."""
    from accelx._torch import default_store, store_errors

    where = urlsplit(env.rendezvous or "")
    if where.scheme != "tcp" or _launcher_serves() or not _answers(where):
        return
    try:
        store = default_store()
        left = store.add("accelx/left", 1)
        deadline = time.monotonic() + GOODBYE
        while wait and left < env.world and time.monotonic() < deadline:
            time.sleep(0.002)
            left = store.add("accelx/left", 0)
    except store_errors():  # the store went with its rank or launcher, who failed
        return


def _answers(where: SplitResult) -> bool:
    """Whether the store is still served; torch's own client would log a dead one."""
    try:
        socket.create_connection((where.hostname or "", where.port or 0), 1.0).close()
    except OSError:
        return False
    return True
