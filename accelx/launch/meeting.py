"""Where the agents of a job meet: torch's rendezvous, and a store for each attempt.

torch joins nodes by its c10d rendezvous. What is added: the sockets listen on one
address, not on all; nodes of another job are refused; ranks of nodes may be given; and
each attempt's ranks meet in a new store, which the agent of node 0 serves.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from datetime import timedelta
from typing import Any, Literal

import attrs

from accelx import _torch_elastic as elastics
from accelx._torch import prefixed, store_errors
from accelx.errors import SpawnError
from accelx.launch.address import interface_of, is_loopback, listen, reach
from accelx.launch.elastic import Elastic

LOOPBACK = "127.0.0.1"
ANSWER = 60.0  # seconds that a store may take to answer
ECHO = 3.0  # seconds to wait for the node that failed first to say why
LEAVE = 10.0  # seconds that the node with the store waits for the others to leave
PROTOCOL = 1  # of what agents tell each other


@attrs.frozen
class Told:
    """What node 0 tells the others of an attempt."""

    host: str = LOOPBACK
    port: int = 0
    attempt: int = 0
    nodes: tuple[int, ...] = ()  # rank of each node, by its number in the rendezvous
    error: str = ""


class Meeting:
    """The nodes of a job, or the one: who is there, with which rank, and where to meet.

    torch's agent takes it for a rendezvous handler. Effects: sockets, those of one node
    on the loopback only.
    """

    def __init__(self, elastic: Elastic, libuv: bool) -> None:
        self._elastic, self._libuv = elastic, libuv
        self._served: Any = None  # this attempt's store, where this node serves it
        self._attempts = self._waiting = 0
        self._next_look = 0.0
        self._placed = False  # whether this node is one of the last attempt
        self._torch: Any = None
        self.told = Told()
        self.own = LOOPBACK  # this node's address, as the others reach it
        self.opened = ""  # what was opened to the network, for the user
        self.hosts = False  # whether the rendezvous is served here
        if elastic.rendezvous is not None:
            self._base = self._open(*elastic.rendezvous)
            _check_job(self._base, elastic)
            self._torch = _torchs(elastic, self._base, self.own)

    @property
    def interface(self) -> str:
        """The network interface for gloo; empty where it is not ours to say."""
        return interface_of(self.own) if self._elastic.picks_interface else ""

    def next_rendezvous(self) -> Any:
        """Wait for the other nodes of the next attempt."""
        self._served = None  # its port closes; what still talks to it was told to end
        self._waiting, self._placed = 0, False
        if self._torch is None:
            store, rank, world = self._serve(LOOPBACK, 1), 0, 1
            self.told = Told(port=store.port, attempt=self._attempts)
            self._attempts += 1
            store = prefixed("agents", store)
        else:
            made = self._torch.next_rendezvous()
            store, world = made.store, made.world_size
            self.told, self._placed = self._agree(store, made.rank, world), True
            if self.told.error:
                raise SpawnError(self.told.error)
            rank = self.told.nodes[made.rank]
        return elastics.met(store, rank, world, self.told.host, self.told.port)

    def blame(self, failure: dict[str, Any]) -> None:
        """Leave word of why this node's ranks failed, for nodes that only felt it."""
        if self._torch is not None and not failure["follows"]:
            with contextlib.suppress(*store_errors()):
                self._base.compare_set(self._key("cause"), "", json.dumps(failure))

    def cause(self) -> dict[str, Any] | None:
        """What another node has left word of; None if nothing comes."""
        if self._torch is None:
            return None
        deadline = time.monotonic() + ECHO
        with contextlib.suppress(*store_errors()):
            while not self._base.check([self._key("cause")]):
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.05)
            return json.loads(self._base.get(self._key("cause")))
        return None

    def say_well(self) -> None:
        """Leave word that the job has ended well, for nodes that were waiting."""
        if self._torch is not None:
            with contextlib.suppress(*store_errors()):
                self._base.set("accelx/well", "1")

    def ended_well(self) -> bool:
        """Whether one has left that word."""
        with contextlib.suppress(*store_errors()):
            return self._base.check(["accelx/well"])
        return False

    def leave(self) -> None:
        """Take this node off, so that the rest need not miss it first."""
        if self._torch is not None:
            elastics.leave(self._torch)

    def goodbye(self) -> None:
        """The node with the rendezvous leaves last: nobody talks to a closed one."""
        if self._torch is None:
            return
        with contextlib.suppress(*store_errors()):
            self._base.add(self._key("left") if self._placed else "accelx/unused", 1)
            deadline = time.monotonic() + LEAVE
            while self.hosts and self._others_stay() and time.monotonic() < deadline:
                time.sleep(0.05)

    def get_backend(self) -> str:
        """Its name."""
        return "c10d"

    def look(self) -> Literal["", "closed", "lost"]:
        """What has become of the nodes: the job was ended, or one is gone.

        torch's agent waits until ranks fail, which may never come; and one that was
        taken for gone would not notice a next attempt that others begin without it.
        Each look reads the state of all nodes, so it is taken every few seconds.
        """
        self._waiting = 0
        if self._torch is None or time.monotonic() < self._next_look:
            return ""
        self._next_look = time.monotonic() + max(1.0, self._elastic.beat / 2)
        self._waiting = self._torch.num_nodes_waiting()
        if self._torch.is_closed():
            return "closed"
        lost = elastics.size(self._torch) < len(self.told.nodes)
        return "lost" if lost else ""

    def num_nodes_waiting(self) -> int:
        """How many nodes wait for the next attempt, as `look` has seen."""
        return self._waiting

    def get_run_id(self) -> str:
        """The job's name."""
        return self._elastic.job_id

    def shutdown(self) -> bool:
        """End the job for all nodes."""
        return self._torch is None or self._torch.shutdown()

    def _others_stay(self) -> bool:
        """Whether nodes of the attempt, or some without a place, have not left yet."""
        left = self._base.add(self._key("left"), 0)
        unused = self._base.add("accelx/unused", 0)
        return left < len(self.told.nodes) or unused < elastics.spares(self._torch)

    def _key(self, name: str) -> str:
        return f"accelx/{name}/{self.told.attempt}"

    def _open(self, host: str, port: int) -> Any:
        """The store that agents meet in: served here, if the address is this node's."""
        wait = timedelta(seconds=ANSWER)
        door = listen(host, port)
        if door is None:
            self.own = reach(host, port, self._elastic.join_timeout)
            from torch.distributed import TCPStore

            return TCPStore(host, port, is_master=False, timeout=wait)
        shown = door.getsockname()[0]
        self.hosts = True
        store = self._server(door, None)
        self.own = reach(host, port, ANSWER)
        if not is_loopback(shown):
            self.opened = f"{shown}:{port}"
        return store

    def _serve(self, address: str, world: int | None) -> Any:
        """A new store on any port of that address; it ends when the next one begins."""
        self._served = self._server(listen_anywhere(address), world)
        return self._served

    def _server(self, door: socket.socket, world: int | None) -> Any:
        from torch.distributed import TCPStore

        host, port = door.getsockname()[:2]
        return TCPStore(
            *(host, port, world),
            is_master=True,
            timeout=timedelta(seconds=ANSWER),
            wait_for_workers=False,
            master_listen_fd=door.detach(),
            use_libuv=self._libuv,
        )

    def _agree(self, store: Any, number: int, world: int) -> Told:
        """What node 0 of the rendezvous has found and decided for this attempt."""
        wish = self._elastic.node_rank
        store.set(f"wish/{number}", str(number if wish is None else wish))
        if number == 0:
            wishes = [int(store.get(f"wish/{i}")) for i in range(world)]
            told = Told(nodes=tuple(wishes), error=_twice(wishes))
            if not told.error:
                served = self._serve(self.own, None)
                attempt = self._base.add("accelx/attempts", 1) - 1
                told = Told(self.own, served.port, attempt, tuple(wishes))
            store.set("told", json.dumps(attrs.asdict(told)))
        made: dict[str, Any] = json.loads(store.get("told"))
        made["nodes"] = tuple(made["nodes"])
        return Told(**made)


def listen_anywhere(address: str) -> socket.socket:
    """A socket on any free port of one address of this machine."""
    door = listen(address, 0)
    if door is None:
        raise SpawnError(
            f"this node's own address, {address}, cannot be listened on; write "
            "--rendezvous with an address of the network that the nodes share"
        )
    return door


def _torchs(elastic: Elastic, store: Any, own: str) -> Any:
    return elastics.rendezvous(
        *(store, str(elastic.rendezvous), elastic.job_id, own),
        min_nodes=elastic.fewest,
        max_nodes=elastic.most,
        join_timeout=max(1, round(elastic.join_timeout)),
        last_call_timeout=max(1, round(elastic.last_call)),
        keep_alive_interval=elastic.beat,
        keep_alive_max_attempt=elastic.beats,
    )


def _check_job(store: Any, elastic: Elastic) -> None:
    """Refuse to join a job that is not this one. The first node says which it is."""
    own = {"protocol": PROTOCOL, **elastic.agreed}
    found = json.loads(store.compare_set("accelx/job", "", json.dumps(own)))
    for key, value in own.items():
        if found.get(key) != value:
            raise SpawnError(
                f"the nodes of a job are started alike, but {key} is {found.get(key)!r}"
                f" at {elastic.rendezvous} and {value!r} here; "
                f"{_mend(key, found)}"
            )


def _mend(key: str, found: dict[str, Any]) -> str:
    if key == "job_id":
        return (
            "give this job a --rendezvous of its own, such as another port, or write "
            f"--job-id {found.get(key)} to join that one"
        )
    return {
        "nodes": f"write --nodes {found.get('nodes')}, or --job-id if another is meant",
        "numbered": "write --node-rank K on all nodes, or on none",
    }.get(key, "use one version of accelx on all nodes")


def _twice(wishes: list[int]) -> str:
    """An error where two nodes have the same rank; empty where none have."""
    for rank in wishes:
        if wishes.count(rank) > 1:
            return (
                f"each node wants a rank of its own, but {wishes.count(rank)} nodes "
                f"were started with --node-rank {rank}; write 0 to {len(wishes) - 1}, "
                "each once, or --node-rank auto on all"
            )
    return ""
