"""Where this process stands, and the one effect that joins it to the other ranks."""

from __future__ import annotations

import atexit
import os
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import attrs

from accelx.env_axes import Axes, lay_out
from accelx.env_detect import detect
from accelx.env_device import choose_backend, choose_device, probe, set_device
from accelx.errors import CollectiveError

if TYPE_CHECKING:
    from accelx.records import Env

__all__ = ["close", "connect", "detect"]

GOODBYE = 10.0  # seconds that the rank with the store waits for the others to leave


def connect(
    env: Env | None = None,
    *,
    axes: Axes | None = None,
    device: str | None = None,
    backend: str | None = None,
    timeout: float | None = None,
) -> Env:
    """Join this process to the other ranks; the Env returned says where it stands.

    `env` is by default what `detect` finds in the environment. `axes` names the axes of
    the mesh: `"replicate=2,shard=-1"`, a mapping, or a tuple of Axis; by default one
    axis "data". `device` and `backend` are by default the best that this machine has.
    `timeout` in seconds is how long a collective may wait.

    Effects: sets torch's current device; with several ranks opens torch's process group
    (or takes the one that is open, if it has as many ranks) and closes it at exit. One
    process opens none. Writes no environment variable. Again is the same as once.
    Raises ValueError for axes that do not multiply to the world.
    """
    env = detect(os.environ) if env is None else env
    axes = axes if axes is not None else env.axes or None
    env = attrs.evolve(env, axes=lay_out(axes, env.world))
    env = attrs.evolve(env, device=device or _device(env))
    set_device(env.device)
    if env.world == 1:
        return env
    backend = backend or env.backend or choose_backend(env.device)
    env = attrs.evolve(env, backend=backend)
    _join(env, timeout)
    if len(env.axes) > 1:  # its groups are made together, so not at a random moment
        from accelx.comm import mesh

        mesh(env)
    return env


def _device(env: Env) -> str:
    if env.device != "cpu" or env.backend is not None:
        return env.device  # chosen by the user, or by an earlier connect
    return choose_device(probe(xla=_wants_xla()), env)


def _wants_xla() -> bool:
    from importlib.util import find_spec

    return "PJRT_DEVICE" in os.environ and find_spec("torch_xla") is not None


def _join(env: Env, timeout: float | None) -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        _check_open(env)
        return
    limit = None if timeout is None else timedelta(seconds=timeout)
    store = _store(env, limit)
    dist.init_process_group(
        env.backend, store=store, rank=env.rank, world_size=env.world, timeout=limit
    )
    _meet(env)
    atexit.register(close, env)


def _check_open(env: Env) -> None:
    import torch.distributed as dist

    if (dist.get_rank(), dist.get_world_size()) != (env.rank, env.world):
        raise CollectiveError(
            f"connect wants a group of rank {env.rank} of {env.world}, but rank "
            f"{dist.get_rank()} of {dist.get_world_size()} is open already; write "
            "connect(Env(rank=..., world=...)) as the open one, or destroy it before"
        )


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
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not env.main or where.hostname != "127.0.0.1" or served:
        return None
    if where.scheme != "tcp" or sys.platform == "win32":
        return None
    from accelx._torch import loopback_store

    return loopback_store(where.port or 0, env.world, limit)


def _meet(env: Env) -> None:
    """Wait until all are connected: one that leaves at once would break the others."""
    from accelx._torch import default_store

    store = default_store()
    if store.add("accelx/met", 1) == env.world:
        store.set("accelx/all-met", "1")
    store.wait(["accelx/all-met"])


def close(env: Env) -> None:
    """Leave the other ranks: flush what was printed, forget the mesh, close the group.

    No barrier: a rank that failed is not waited for. Safe to call twice, and called at
    exit for a group that `connect` opened.
    """
    import torch.distributed as dist

    from accelx.comm import forget_meshes

    sys.stdout.flush()
    sys.stderr.flush()
    forget_meshes()
    if env.world == 1 or not dist.is_initialized():
        return
    if not _failing():
        _say_goodbye(env)
    dist.destroy_process_group()


def _failing() -> bool:
    return sys.exc_info()[0] is not None or getattr(sys, "last_value", None) is not None


def _say_goodbye(env: Env) -> None:
    """The rank that serves the store leaves last: nobody talks to a closed one."""
    from accelx._torch import default_store, store_errors

    if not (env.rendezvous or "").startswith("tcp://"):
        return
    try:
        store = default_store()
        left = store.add("accelx/left", 1)
        deadline = time.monotonic() + GOODBYE
        while env.main and left < env.world and time.monotonic() < deadline:
            time.sleep(0.002)
            left = store.add("accelx/left", 0)
    except store_errors():  # the store went with its rank or launcher, who failed
        return
