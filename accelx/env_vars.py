"""How a launcher's variables are read and checked, and what an error shows of them."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from accelx.errors import DetectError
from accelx.records import Env

PREFIXES = (
    *("ACCELX_LAUNCHER", "CLOUD_TPU_TASK_ID", "GROUP_", "JOB_COMPLETION_INDEX"),
    *("LOCAL_", "MASTER_", "MPI_LOCAL", "MV2_COMM_WORLD_", "NODE_RANK"),
    *("OMPI_COMM_WORLD_", "PET_", "PJRT_DEVICE", "PMI_", "RANK", "ROLE_"),
    *("SLURM_", "SM_CURRENT_HOST", "SM_HOSTS", "SM_NUM_GPUS", "TORCHELASTIC_"),
    *("TPU_WORKER_", "WORLD_SIZE"),
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@attrs.frozen
class Vars:
    """A mapping of variables; an empty value is as good as none."""

    environ: Mapping[str, str]

    def get(self, name: str) -> str | None:
        """The value, or None."""
        return self.environ.get(name) or None

    def some(self, *names: str) -> bool:
        """Whether any of these is set."""
        return any(self.get(name) is not None for name in names)

    def int(self, name: str, default: int | None = None) -> int | None:
        """The value as an integer; DetectError if it is none."""
        text = self.get(name)
        if text is None:
            return default
        try:
            return int(text)
        except ValueError:
            raise fail(
                self, f"{name}={text} is no integer", f"set {name} to an integer"
            ) from None

    def ints(self, *names: str) -> list[int]:
        """The values of variables that must all be set; DetectError if one is not."""
        values = [self.int(name) for name in names]
        missing = [name for name in names if self.int(name) is None]
        if missing:
            wanted = ", ".join(missing)
            raise fail(
                self,
                f"{wanted} {'is' if len(missing) == 1 else 'are'} missing",
                f"set {wanted} too, or unset the others to run one process",
            )
        return [value for value in values if value is not None]

    def loopback(self) -> bool:
        """Whether the ranks meet on this machine."""
        return self.get("MASTER_ADDR") in LOOPBACK


def fail(found: Vars, what: str, remedy: str) -> DetectError:
    """The error for variables that cannot be read, with every one that was found."""
    shown = ", ".join(
        f"{name}={value}"
        for name, value in sorted(found.environ.items())
        if name.startswith(PREFIXES)
    )
    return DetectError(
        f"cannot tell where this process stands: {what}; {remedy}; found {shown}"
    )


def place(
    found: Vars, rank: int, world: int, local: int, size: int, node: int | None = None
) -> Env:
    """The Env of these numbers, checked; `node` follows from them where not told."""
    for name, value, end in (
        ("rank", rank, world),
        ("local rank", local, size),
        ("ranks on this node less one", size - 1, world),
    ):
        if not 0 <= value < end:
            raise fail(
                found,
                f"{name} {value} is not in 0 to {end - 1}",
                "count ranks from 0 and start every one of them",
            )
    nodes = -(-world // size)
    if node is None:
        node = found.int("NODE_RANK")
    return Env(
        rank,
        world,
        local,
        size,
        _node(rank, local, size, nodes) if node is None else node,
        nodes if node is None else max(nodes, node + 1),
    )


def _node(rank: int, local: int, size: int, nodes: int) -> int:
    """The node of a rank, where nodes are filled one after another, or else in turn."""
    if rank % size == local:
        return rank // size
    return rank % nodes if rank // nodes == local else min(rank // size, nodes - 1)


def placed(
    found: Vars, env: Env, launcher: str, host: str | None = None, port: int = 29500
) -> Env:
    """`env` with its launcher, and where its ranks meet: MASTER_ADDR, else `host`."""
    if env.node >= env.nodes:
        raise fail(
            found,
            f"node {env.node} is not in 0 to {env.nodes - 1}",
            "count nodes from 0",
        )
    env = attrs.evolve(env, launcher=launcher)
    if launcher in ("openmpi", "mvapich", "pmi", "slurm"):
        _agree(found, env)
    if env.world == 1:
        return env
    return attrs.evolve(env, rendezvous=url(found, env, host, port))


def _agree(found: Vars, env: Env) -> None:
    """Refuse RANK and WORLD_SIZE, written by hand, that are not the launcher's."""
    rank, world = found.int("RANK", env.rank), found.int("WORLD_SIZE", env.world)
    if (rank, world) != (env.rank, env.world):
        raise fail(
            found,
            f"RANK and WORLD_SIZE say rank {rank} of {world}, but {env.launcher} says "
            f"rank {env.rank} of {env.world}",
            "unset RANK, WORLD_SIZE and LOCAL_RANK",
        )


def url(found: Vars, env: Env, host: str | None, port: int) -> str:
    """The address of the store that the ranks meet in."""
    told = found.get("MASTER_ADDR")
    host = told or host or ("127.0.0.1" if env.local_world == env.world else None)
    if host is None:
        raise fail(
            found,
            f"{env.nodes} nodes have no address to meet at",
            "set MASTER_ADDR to the host of rank 0, and MASTER_PORT",
        )
    if told and env.launcher in ("torchrun", "accelx", "kubernetes"):
        [port] = found.ints("MASTER_PORT")
    port = found.int("MASTER_PORT", port) or 0
    if not 0 < port < 2**16:
        raise fail(found, f"port {port} is not in 1 to 65535", "set MASTER_PORT")
    shown = f"[{host}]" if ":" in host else host
    attempt = found.int("TORCHELASTIC_RESTART_COUNT") or 0
    return f"tcp://{shown}:{port}" + (f"?attempt={attempt}" if attempt else "")
