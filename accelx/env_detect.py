"""Which launcher started this process, and where it stands among the ranks."""

from __future__ import annotations

from collections.abc import Mapping

from accelx.records import Env


def detect(environ: Mapping[str, str]) -> Env:
    """Where this process stands, from a launcher's variables; pure."""
    world = int(environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Env()
    rank, local = int(environ["RANK"]), int(environ.get("LOCAL_RANK", 0))
    return Env(
        rank,
        world,
        local,
        int(environ.get("LOCAL_WORLD_SIZE", world)),
        int(environ.get("GROUP_RANK", 0)),
        int(environ.get("GROUP_WORLD_SIZE", 1)),
        launcher=environ.get("ACCELX_LAUNCHER", "torchrun"),
        rendezvous=f"tcp://{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}",
    )
