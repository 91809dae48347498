"""Whether all ranks are about to do the same, asked before each operation.

Over a gloo group of its own, on the CPU: 16 bytes a rank while they agree. Where a rank
does not come, those that wait leave word in the store of who has: a collective that has
timed out could not tell.
"""

from __future__ import annotations

import time
from datetime import timedelta
from hashlib import blake2b
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import attrs

from accelx.comm_ring import ring
from accelx.comm_wire import dist, group, grouped
from accelx.errors import CollectiveError

if TYPE_CHECKING:
    from accelx.comm_ring import Tell, Told
    from accelx.records import Env

DIGEST = 16  # bytes that tell whether ranks agree
LOOK = 0.25  # seconds between two looks at the store, while a rank has not come
LAST_WORDS = 1.0  # seconds for ranks to say that they had come, when one has left
MARGIN = 60.0  # seconds that the group itself waits longer


def enter(env: Env, timeout: float | None) -> None:
    """From now on compare each operation of ours; every rank of `env` must say so."""
    from accelx._torch import group_timeout

    if env.world > 1:
        limit = timeout or group_timeout(group(env, "with_lockstep"))
        ring().check = Lockstep(limit, dist().group.WORLD).check


@attrs.define(eq=False)
class Side:
    """The side group beside one group of the training."""

    group: Any
    number: int = 0  # of operations compared
    met: float = attrs.field(factory=time.monotonic)  # when all last came
    last: str = "nothing yet"  # what all did last


@attrs.define(eq=False)
class Lockstep:
    """Ranks that compare; `timeout` is in seconds."""

    timeout: float
    world: Any  # the process group of all
    sides: dict[str, Side] = attrs.field(factory=dict[str, Side])

    def check(self, env: Env, name: str, at: str, tell: Tell) -> None:
        """Return when every rank is about to do this. Raises CollectiveError on all."""
        if dist().group.WORLD is not self.world:  # closed by others, and another open
            ring().check = None
            return
        ours = group(env, name)
        side = self.sides.get(ours.group_name)
        if side is None:
            side = self.sides[ours.group_name] = Side(_beside(ours, self.timeout))
        side.number += 1
        told = _told(name, at, tell)
        digest = _digest(told)
        key = f"accelx/lockstep/{side.group.group_name}/{side.number}"
        meeting = _Meeting(env, side, self.timeout, key, f"{name} at {at}")
        digests = meeting.hold(digest)
        if any(one != digest for one in digests):
            each: list[Any] = [None] * env.world
            dist().all_gather_object(each, told, group=side.group)
            raise CollectiveError(parted(each, side.last))
        side.last, side.met = meeting.said, time.monotonic()


def _beside(ours: Any, timeout: float) -> Any:
    return dist().new_group(
        dist().get_process_group_ranks(ours),
        timeout=timedelta(seconds=timeout + MARGIN),
        backend="gloo",
        use_local_synchronization=True,  # a part's other ranks are not asked
    )


def _told(name: str, at: str, tell: Tell) -> Told:
    file, _, line = at.rpartition(":")
    # folders may be others on another machine
    told = {"call": (name, name), "line": (f"{PurePath(file).name}:{line}", at)}
    try:
        return told | tell()
    except Exception as error:  # told to the other ranks, which would wait for ever
        said = f"{type(error).__name__}: {error}"
        return told | {"tree": (said, said)}


def _digest(told: Told) -> bytes:
    text = repr([(part, must) for part, (must, _) in told.items()])
    return blake2b(text.encode(), digest_size=DIGEST).digest()


def parted(each: list[Told], last: str) -> str:
    """What ranks are told that were about to do different things; pure."""
    calls = [f"{told['call'][1]} at {told['line'][1]}" for told in each]
    says = ", ".join(f"{call} on {who}" for call, who in grouped(calls).items())
    if len({(told["call"][0], told["line"][0]) for told in each}) > 1:
        what, remedy = says, "look for a branch on the rank around one of them"
    else:
        part = next(p for told in each for p in told if _differs(each, p))
        shown = [told[part][1] if part in told else "missing" for told in each]
        ranks = ", ".join(f"{text} on {who}" for text, who in grouped(shown).items())
        what = f"of {calls[0]} the {part} is {ranks}"
        remedy = "bring the same on every rank"
    return (
        f"with_lockstep wants every rank to do the same, but {what}; {remedy} (the "
        f"last that all did was {last})"
    )


def _differs(each: list[Told], part: str) -> bool:
    return (
        len({told.get(part, ("", ""))[0] if part in told else None for told in each})
        > 1
    )


@attrs.define(eq=False)
class _Meeting:
    """One operation that every rank is to come to."""

    env: Env
    side: Side
    timeout: float
    key: str  # in the store
    said: str  # what this rank is about to do

    def hold(self, digest: bytes) -> list[bytes]:
        """Every rank's digest. Raises CollectiveError where one does not come."""
        import torch

        mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self.env.world)]
        # What those who gave up on this rank have sent may still arrive.
        late = time.monotonic() - self.side.met > self.timeout / 2
        if late and (verdict := self._look()[1]):
            raise CollectiveError(verdict)
        try:
            work = dist().all_gather(every, mine, group=self.side.group, async_op=True)
            came = self._came(work)
        except RuntimeError as error:
            raise self._error("has left the run", LAST_WORDS) from error
        if not came:
            raise self._error(f"has not come after {self.timeout:g} s", 0.0)
        return [one.numpy().tobytes() for one in every]

    def _came(self, work: Any) -> bool:
        """Whether all have come; False once this rank, or another, has given up."""
        end = time.monotonic() + self.timeout
        look = timedelta(seconds=min(LOOK, self.timeout))
        while True:
            try:
                work.wait(look)
                return True
            except RuntimeError:
                if work.is_completed():  # it failed; else only the look is over
                    raise
            if self._look()[1] or time.monotonic() > end:
                return False

    def _error(self, how: str, wait: float) -> CollectiveError:
        """The error that all who have come raise, of those who have not.

        Waits so many seconds for others to say that they had come.
        """
        from accelx import _torch

        end = time.monotonic() + wait
        missing, verdict = self._look()
        while missing and not verdict and time.monotonic() < end:
            time.sleep(0.02)
            missing, verdict = self._look()
        text = absent(missing, how, self.said, self.side.last)
        try:
            store = _torch.default_store()
            first = store.compare_set(f"{self.key}/verdict", "", text)
        except _torch.store_errors():
            return CollectiveError(text)
        return CollectiveError(first.decode())

    def _look(self) -> tuple[list[int], str]:
        """Leave word that this rank has come; who has not, and the verdict if any."""
        from accelx import _torch

        others = [r for r in range(self.env.world) if r != self.env.rank]
        verdict = f"{self.key}/verdict"
        try:
            store = _torch.default_store()
            store.set(f"{self.key}/{self.env.rank}", self.said)
            missing = [r for r in others if not store.check([f"{self.key}/{r}"])]
            said = store.get(verdict).decode() if store.check([verdict]) else ""
        except _torch.store_errors():  # it went with the one that served it
            return others, ""
        return missing, said


def absent(missing: list[int], how: str, said: str, last: str) -> str:
    """What ranks are told that wait for others; pure."""
    named = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
    who = named if missing else "one of them"
    return (
        f"with_lockstep wants every rank in {said}, but {who} {how}; the last that all "
        f"did was {last}: look at what {who} does after it, or give it more time, "
        "with_lockstep(timeout=...)"
    )
