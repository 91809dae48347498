"""What ranks measure of the network between them, each on its own side."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from accelx import comm
from accelx.env import close, connect
from accelx.env_detect import detect
from accelx.launch.caller import collect
from accelx.records import Env

SIZES = (4 * 2**10, 256 * 2**10, 4 * 2**20, 64 * 2**20)  # bytes of an all_reduce
REPEATS = 5
PINGS = 20
PEERS = 16  # whose ports a rank tries, the next ones round the circle
WAIT = 5.0  # seconds for a connection
HELLO = b"accelx"


def ranks(
    environ: Mapping[str, str], n: int, timeout: float
) -> list[dict[str, Any]] | None:
    """What each rank measured, in rank order.

    Where a launcher has started several processes, this is one of them, and all but
    rank 0 get None; else `n` are started on this machine. Raises SpawnError if they do
    not come to an end.
    """
    if detect(environ).world == 1:
        return collect(measure, (timeout,), n, timeout)
    each = measure(timeout, gathered=True)
    return each if isinstance(each, list) else None


def measure(timeout: float, gathered: bool = False) -> Any:
    """Connect, measure, leave: this rank's findings, or everyone's on rank 0."""
    began = time.perf_counter()
    env = connect(timeout=timeout)
    took = time.perf_counter() - began
    try:
        mine = {"rank": env.rank, "connect": took, **measured(env)}
        each = comm.gather_objects(env, mine) if gathered else []
    finally:
        close(env)
    if gathered:
        return each if env.main else None
    return mine


def measured(env: Env) -> dict[str, Any]:
    """All measurements, in one order on every rank."""
    address = towards(env.rendezvous)
    return {
        "world": env.world,
        "launcher": env.launcher,
        "backend": env.backend,
        "device": env.device,
        "node": env.node,
        **name(),
        "address": address,
        "ports": ports(env, address),
        "clock": clock(env),
        "all_reduce": [all_reduce(env, size) for size in SIZES] if env.backend else [],
    }


def towards(url: str | None) -> str:
    """The address of this machine on the way to where the ranks meet."""
    where = urlsplit(url or "")
    host = where.hostname or "127.0.0.1"
    try:
        family = socket.getaddrinfo(host, where.port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family[0], socket.SOCK_DGRAM) as way:
            way.connect(family[4])  # sends nothing: the system only chooses a way
            return way.getsockname()[0]
    except OSError:
        return "127.0.0.1"


def name() -> dict[str, Any]:
    """The name of this host, and what the system makes of it."""
    host = socket.gethostname()
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        return {"host": host, "resolves": [], "why": str(error)}
    return {"host": host, "resolves": sorted({str(a[4][0]) for a in found}), "why": ""}


def ports(env: Env, address: str) -> list[dict[str, Any]]:
    """Which other ranks this one cannot open a connection to, and why."""
    server = socket.create_server((address, 0), family=_family(address))
    port = server.getsockname()[1]
    serving = threading.Thread(target=_serve, args=(server,), daemon=True)
    serving.start()
    try:
        each = comm.gather_objects(env, (address, port))
        peers = [
            (env.rank + i) % env.world for i in range(1, min(env.world, PEERS + 1))
        ]
        failed = [
            {"to": peer, "address": f"{each[peer][0]}:{each[peer][1]}", "why": why}
            for peer in peers
            if (why := _reach(*each[peer]))
        ]
        comm.barrier(env)  # before anyone stops serving
        return failed
    finally:
        server.close()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _serve(server: socket.socket) -> None:
    while True:
        try:
            there, _ = server.accept()
        except OSError:  # closed: the end
            return
        with there:
            there.sendall(HELLO)


def _reach(address: str, port: int) -> str:
    """Why there is no answer; empty if there is."""
    try:
        with socket.create_connection((address, port), WAIT) as there:
            there.settimeout(WAIT)
            got = there.recv(len(HELLO), socket.MSG_WAITALL)
    except OSError as error:
        return str(error)
    return "" if got == HELLO else "something else answers there"


def clock(env: Env) -> dict[str, float]:
    """Seconds that this rank's clock is ahead of rank 0's, and of one way to it."""
    if not env.backend:
        return {"ahead": 0.0, "latency": 0.0}
    import torch.distributed as dist

    beside = env.backend != "gloo"
    group: Any = dist.new_group(backend="gloo") if beside else None
    mine = {"ahead": 0.0, "latency": 0.0}
    for other in range(1, env.world):
        if env.main:
            _answer(other, group)
        elif env.rank == other:
            mine = _ping(group)
        comm.barrier(env)
    if beside:
        dist.destroy_process_group(group)
    return mine


def _answer(other: int, group: Any) -> None:
    import torch
    import torch.distributed as dist

    for _ in range(PINGS):
        now = torch.zeros(1, dtype=torch.float64)
        dist.recv(now, other, group)
        now[0] = time.time()
        dist.send(now, other, group)


def _ping(group: Any) -> dict[str, float]:
    """By the quickest of several round trips, of which each way is taken as half."""
    import torch
    import torch.distributed as dist

    each = list[tuple[float, float]]()
    for _ in range(PINGS):
        there = torch.zeros(1, dtype=torch.float64)
        left = time.time()
        dist.send(there, 0, group)
        dist.recv(there, 0, group)
        back = time.time()
        each.append((back - left, (left + back) / 2 - there.item()))
    trip, ahead = min(each)
    return {"ahead": ahead, "latency": trip / 2}


def all_reduce(env: Env, size: int) -> dict[str, Any]:
    """Median seconds of an all_reduce of `size` bytes on this rank's device."""
    import torch
    import torch.distributed as dist

    from accelx.comm_wire import wire_device

    device = wire_device(env)
    tensor = torch.ones(size // 4, device=device)
    took = list[float]()
    for _ in range(REPEATS + 1):
        tensor.fill_(1)
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if str(device) != "cpu":
            torch.accelerator.synchronize()
        took.append(time.perf_counter() - began)
    right = bool((tensor == env.world).all())
    return {"bytes": size, "seconds": statistics.median(took[1:]), "right": right}
