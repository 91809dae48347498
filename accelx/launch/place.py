"""Where one rank stands in one attempt, and the variables by which it knows; pure."""

from __future__ import annotations

from pathlib import Path

import attrs

from accelx.env import REPORTS
from accelx.launch.plan import Plan


@attrs.frozen
class Place:
    """A rank's numbers, and the store that it meets the others in."""

    rank: int
    world: int
    local_rank: int
    port: int
    host: str = "127.0.0.1"
    node: int = 0
    nodes: int = 1
    attempt: int = 0  # the same on all nodes, and never twice
    interface: str = ""  # for gloo; empty: the environment or the plan has it


def alone(plan: Plan, port: int) -> list[Place]:
    """The places of ranks that are all on this machine and start once."""
    world = plan.num_ranks
    return [Place(rank, world, rank, port) for rank in range(world)]


def rank_variables(plan: Plan, place: Place) -> dict[str, str]:
    """The environment variables by which a rank knows where it stands."""
    made = {
        **plan.exports,
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(plan.num_ranks),
        "GROUP_RANK": str(place.node),
        "GROUP_WORLD_SIZE": str(place.nodes),
        "MASTER_ADDR": place.host,
        "MASTER_PORT": str(place.port),
        # torch's word for "the launcher serves the store": no rank opens a port for it
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        # Part of the prefix in that store, so not each node's own count of restarts.
        "TORCHELASTIC_RESTART_COUNT": str(place.attempt),
        "ACCELX_LAUNCHER": "accelx",
    }
    if plan.log_dir is not None:
        made[REPORTS] = str(Path(plan.log_dir).absolute())
    if place.interface:
        made["GLOO_SOCKET_IFNAME"] = place.interface
    if plan.elastic is not None:
        made["TORCHELASTIC_MAX_RESTARTS"] = str(plan.elastic.restarts)
        made["TORCHELASTIC_RUN_ID"] = plan.elastic.job_id
    return made
