"""What torch's elastic agent and rendezvous leave to be overridden or read, named once.

Written for torch 2.13; the names are the same in 2.9.
"""

# Private names are what this file is for.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import time
from typing import Any, Literal, Protocol

State = Literal["HEALTHY", "SUCCEEDED", "FAILED", "AGAIN"]


class Hands(Protocol):
    """Who has the processes of one node."""

    def start(self, group: Any, left: int) -> None:
        """Start the workers of `group`; `left` restarts are allowed after this one."""
        ...

    def stop(self) -> None:
        """End them, if they run, and return when they have ended."""
        ...

    def state(self, group: Any) -> State:
        """How they are. AGAIN has them start again without counting it."""
        ...


def agent(
    hands: Hands, meeting: Any, *, name: str, num_ranks: int, restarts: int
) -> Any:
    """torch's agent for one node: it decides, `hands` does.

    `meeting` takes the place of torch's rendezvous handler.
    """
    from torch.distributed.elastic.agent.server.api import (
        RunResult,
        SimpleElasticAgent,
        WorkerSpec,
        WorkerState,
    )

    class Agent(SimpleElasticAgent):
        """The four methods that torch documents as to be written."""

        def _start_workers(self, worker_group: Any) -> dict[int, Any]:
            hands.start(worker_group, self._remaining_restarts)
            return {w.local_rank: w.local_rank for w in worker_group.workers}

        def _stop_workers(self, worker_group: Any, *_: Any, **__: Any) -> None:
            hands.stop()

        def _shutdown(self, *_: Any, **__: Any) -> None:
            hands.stop()

        def _monitor_workers(self, worker_group: Any) -> RunResult:
            state = hands.state(worker_group)
            if state == "AGAIN":
                restart: Any = self._restart_workers  # its decorator hides arguments
                restart(worker_group)
                state = "HEALTHY"
            well = worker_group.workers if state == "SUCCEEDED" else ()
            values = {w.global_rank: None for w in well}
            return RunResult(state=WorkerState[state], return_values=values)

    spec = WorkerSpec(
        role="accelx",
        local_world_size=num_ranks,
        rdzv_handler=meeting,
        entrypoint=name,
        max_restarts=restarts,
        monitor_interval=0.1,
    )
    # In seconds; `hands` says SUCCEEDED when all nodes have, so nobody waits long.
    return Agent(spec, exit_barrier_timeout=30)


def rendezvous(store: Any, where: str, job: str, own: str, **settings: int) -> Any:
    """torch's c10d rendezvous over `store`, for a node whose address is `own`.

    `settings` are min_nodes, max_nodes, and seconds as torch names them.
    """
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import (
        C10dRendezvousBackend,
    )
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    made = RendezvousParameters("c10d", where, job, local_addr=own, **settings)
    return create_handler(store, C10dRendezvousBackend(store, job), made)


def met(store: Any, rank: int, world: int, host: str, port: int) -> Any:
    """The outcome of a rendezvous, as torch's agent takes it."""
    from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

    return RendezvousInfo(store, rank, world, RendezvousStoreInfo(host, port))


def errors() -> tuple[type[Exception], type[Exception], type[Exception]]:
    """What a rendezvous raises when it was closed, came too late, or is gone."""
    from torch.distributed.elastic import rendezvous

    return (
        rendezvous.RendezvousClosedError,
        rendezvous.RendezvousTimeoutError,
        rendezvous.RendezvousConnectionError,
    )


def size(handler: Any) -> int:
    """How many nodes the rendezvous counts in this attempt, as last read.

    0 where this node is not one of them: it was taken for dead, or left.
    """
    with handler._heartbeat_lock:
        nodes = handler._state_holder.state.participants
        return len(nodes) if handler._this_node in nodes else 0


def spares(handler: Any) -> int:
    """How many nodes wait for a place, as last read."""
    with handler._heartbeat_lock:
        state = handler._state_holder.state
        return len(state.wait_list) + len(state.redundancy_list)


def leave(handler: Any) -> None:
    """Take this node off the rendezvous at once.

    By itself it only stops its heartbeats, and the others wait until they miss them.
    """
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
        _RendezvousExitOp,
    )

    handler._stop_heartbeats()
    handler._op_executor.run(_RendezvousExitOp(), time.monotonic() + 5)
