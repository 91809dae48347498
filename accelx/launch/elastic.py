"""How many nodes a job has, where they meet, and how often it starts again; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import attrs

from accelx.env_slurm import first_host, port_of
from accelx.env_vars import Vars
from accelx.errors import SpawnError
from accelx.launch.settings import Choice
from accelx.launch.texts import Endpoint, Nodes

BEATS = 5  # heartbeats that a node may miss; torch sends each second one, at worst
FEWEST_BEATS = 4
BEAT = 2  # seconds between them; each rewrites the state that all nodes share,
CROWD = 16  # so of more than 32 nodes each beats once in nodes / 16 seconds
ALONE = ("rendezvous", "node_rank", "job_id", "last_call", "join_timeout", "lost_after")


@attrs.frozen
class Elastic:
    """What torch's elastic agent is told."""

    fewest: int = 1  # nodes
    most: int = 1
    restarts: int = 0
    node_rank: int | None = None  # None: as they come
    rendezvous: Endpoint | None = None  # None: one node meets nobody
    job_id: str = "job"
    last_call: float = 10.0  # seconds
    join_timeout: float = 600.0  # seconds
    beat: int = BEAT  # seconds between two heartbeats
    beats: int = BEATS  # so many missed: the node is gone
    picks_interface: bool = False  # whether gloo's network interface is left to us

    @property
    def nodes(self) -> str:
        """The fewest and the most, as they are written."""
        return str(Nodes(self.fewest, self.most))

    @property
    def agreed(self) -> dict[str, Any]:
        """What all nodes of a job must have been told alike."""
        numbered = self.node_rank is not None
        return {"job_id": self.job_id, "nodes": self.nodes, "numbered": numbered}


def decide_elastic(
    chosen: Mapping[str, Choice],
    ranks: int,
    target: str,
    environ: Mapping[str, str],
) -> tuple[Elastic | None, dict[str, Choice]]:
    """The job's nodes and restarts, and each setting as it turned out.

    None where one node starts its ranks once: no agent is needed then. `ranks` is the
    number on this node. Raises SpawnError for settings that contradict each other.
    """
    (fewest, most), nodes = _nodes(chosen, ranks)
    restarts = chosen["restarts"]
    said = {"nodes": nodes, "restarts": restarts}
    if most == 1:
        _refuse_unused(chosen)
        made = Elastic(restarts=restarts.value) if restarts.value else None
        return made, said | _unused(chosen)
    meeting = _rendezvous(chosen["rendezvous"], environ)
    beat, beats = _beats(chosen["lost_after"], most)
    job = _job(chosen["job_id"], target, environ)
    _check_node_rank(chosen["node_rank"], fewest, most)
    made = Elastic(
        fewest=fewest,
        most=most,
        restarts=restarts.value,
        node_rank=chosen["node_rank"].value,
        rendezvous=meeting.value,
        job_id=job.value,
        last_call=chosen["last_call"].value,
        join_timeout=chosen["join_timeout"].value,
        beat=beat,
        beats=beats,
        picks_interface=not environ.get("GLOO_SOCKET_IFNAME"),
    )
    lost = attrs.evolve(chosen["lost_after"], value=float(beat * beats))
    said |= {"rendezvous": meeting, "job_id": job, "lost_after": lost}
    names = ("node_rank", "last_call", "join_timeout")
    return made, said | {name: chosen[name] for name in names}


def beat_of(nodes: int) -> int:
    """Seconds between two heartbeats of one node, where there are so many."""
    return max(BEAT, nodes // CROWD)


def agent_variables() -> dict[str, str]:
    """What torch's agent finds in the environment of its own process.

    By default it has ranks meet in the store that it meets in itself, where addresses
    of the attempt before are still read: of six restarts, two hung or failed (torch
    2.13). So each attempt gets a store of its own.
    """
    return {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def _nodes(chosen: Mapping[str, Choice], ranks: int) -> tuple[Nodes, Choice]:
    nodes, least, most = (chosen[name] for name in ("nodes", "min_ranks", "max_ranks"))
    if least.value is None and most.value is None:
        made = nodes.value or Nodes(1, 1)
        return made, attrs.evolve(nodes, value=made)
    given = f"--min {least.value} --max {most.value}"
    if nodes.value is not None:
        came = f"{given} and --nodes {nodes.value}"
        _refuse("--nodes, or --min and --max", came, str(nodes.value))
    if least.value is None or most.value is None or least.value > most.value:
        _refuse("--min and --max ranks, the fewest and the most", given, "1:4")
    if least.value % ranks or most.value % ranks:
        ends = (math.ceil(value / ranks) for value in (least.value, most.value))
        wanted = f"--min and --max in whole nodes of {ranks} ranks"
        _refuse(wanted, given, str(Nodes(*ends)))
    made = Nodes(least.value // ranks, most.value // ranks)
    return made, Choice(made, f"{least.source}: {given}")


def _rendezvous(given: Choice, environ: Mapping[str, str]) -> Choice:
    if given.value is not None:
        return given
    found = Vars(environ)
    if host := first_host(found):
        meeting = Endpoint(host, port_of(found))
        return Choice(meeting, "environment: first host of SLURM's job")
    raise SpawnError(
        "several nodes want an address to meet at, the same on each, got none; write "
        "--rendezvous HOST:29400 with the name or address of the first node"
    )


def _job(given: Choice, target: str, environ: Mapping[str, str]) -> Choice:
    if given.value is not None:
        return given
    if number := environ.get("SLURM_JOB_ID"):
        return Choice(f"slurm-{number}", "environment: SLURM_JOB_ID")
    return Choice(target.replace("\\", "/").rpartition("/")[2], "default: the script's")


def _beats(lost_after: Choice, most: int) -> tuple[int, int]:
    if lost_after.value is None:
        return beat_of(most), BEATS
    beat = max(1, round(lost_after.value / BEATS))
    return beat, max(FEWEST_BEATS, math.ceil(lost_after.value / beat))


def _check_node_rank(given: Choice, fewest: int, most: int) -> None:
    if given.value is None:
        return
    if fewest != most:
        raise SpawnError(
            f"--node-rank wants a number of nodes that stays, got --node-rank "
            f"{given.value} and --nodes {fewest}:{most}; write --node-rank auto"
        )
    if given.value >= most:
        raise SpawnError(
            f"--node-rank counts {most} nodes from 0, got {given.value}; write "
            f"--node-rank {most - 1} for the last, or --node-rank auto on all"
        )


def _refuse_unused(chosen: Mapping[str, Choice]) -> None:
    """Of the command line; a file may serve other runs too."""
    for name in ALONE:
        if chosen[name].source == "command line" and chosen[name].value is not None:
            option = f"--{name.replace('_', '-')}"
            raise SpawnError(
                f"{option} is about several nodes, got one; write --nodes 2 beside it, "
                "or leave it out"
            )


def _unused(chosen: Mapping[str, Choice]) -> dict[str, Choice]:
    given = {name: chosen[name] for name in ALONE if chosen[name].source != "default"}
    return {
        name: Choice("not used", f"{choice.source}, but there is one node")
        for name, choice in given.items()
    }


def _refuse(wanted: str, came: str, nodes: str) -> NoReturn:
    raise SpawnError(f"wanted is {wanted}, got {came}; write --nodes {nodes}")
