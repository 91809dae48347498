"""One stage at work on one microbatch: its own parts run, those of others do not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from accelx import _torch_stages, tree
from accelx.engines.stage_homes import Homes
from accelx.engines.stage_route import From, Route, Through, once
from accelx.errors import PlacementError


@attrs.define(eq=False)
class Walk:
    """A run of the whole forward in which the parts of one stage compute.

    Parts of other stages return at once what has the right shape and no numbers; the
    first module of the stage is given what was received, and what the first module of
    the next would be given is what is sent.
    """

    homes: Homes
    route: Route
    stage: int
    received: tuple[Tensor, ...]
    sent: tuple[Tensor, ...] = ()
    called: bool = False
    output: Any = None
    counts: dict[str, int] = attrs.field(factory=dict)
    known: dict[int, Tensor] = attrs.field(factory=dict)  # id of a fake -> its numbers
    held: list[Any] = attrs.field(factory=list)  # fakes whose ids are in use
    first: str | None = attrs.field(init=False)  # the part that is given what came
    next: str | None = attrs.field(init=False)  # that which gets what is sent

    def __attrs_post_init__(self) -> None:
        starts, stage = self.homes.starts, self.stage
        self.first = starts[stage - 1] if stage else None
        self.next = starts[stage] if stage < len(starts) else None

    def model(self, call: Any, args: Any, kwargs: Any) -> Any:
        """The model's own call; but in the last stage it is the end of the loss."""
        once(self.called, kwargs)
        self.called = True
        with _Between(self.known):
            output = call(*args, **kwargs)
        if self.next is not None:
            if not self.sent:
                self._lost(self.next)
            raise Through
        self.output = self._filled(output, tree.leaves(output))
        return self.output

    def part(self, name: str, call: Any, args: Any, kwargs: Any) -> Any:
        """A part's call."""
        number = self.counts.get(name, 0)
        self.counts[name] = number + 1
        if self.homes.units[name] != self.stage:
            return self._other(name, number, args, kwargs)
        one = not kwargs and len(args) == 1 and isinstance(args[0], Tensor)
        given = args if one else tree.leaves((args, kwargs))
        if name == self.first and not number:
            self._receive(given)
        if _faked(given):
            now = tuple(map(self._now, given))
            self._whole(name, now)
            args, kwargs = (now, {}) if one else self._filled((args, kwargs), given)
        result = _torch_stages.without(_Between, call, args, kwargs)
        if type(result) is not Tensor:  # as it mostly is: then it has numbers
            self._whole(name, tree.leaves(result))
        return result

    def _other(self, name: str, number: int, args: Any, kwargs: Any) -> Any:
        """What a part of another stage returned when its shapes were learnt."""
        recorded = self._recorded(name, number)
        sends = name == self.next and not number
        if not sends and isinstance(recorded, Tensor):  # whatever was given
            return recorded
        now = [self._now(leaf) for leaf in tree.leaves((args, kwargs))]
        if sends:
            _torch_stages.without(_Between, self._send, (name, now), {})
        return recorded if isinstance(recorded, Tensor) else _returned(recorded, now)

    def _filled(self, whole: Any, leaves: list[Any]) -> Any:
        """A tree with what was received in it; the same one where nothing was."""
        if self.known and any(id(leaf) in self.known for leaf in leaves):
            return tree.unflatten(whole, map(self._now, leaves))
        return whole

    def _now(self, leaf: Any) -> Any:
        """A leaf, or the numbers that were received in its place."""
        return self.known.get(id(leaf), leaf)

    def _receive(self, given: Sequence[Any]) -> None:
        crossing = self.route.crossings[self.stage - 1]
        for i, tensor in zip(crossing.at, self.received, strict=True):
            self.known[id(given[i])] = tensor
            self.held.append(given[i])

    def _send(self, name: str, given: list[Any]) -> None:
        crossing = self.route.crossings[self.stage]
        leaves = tuple(given[i] for i in crossing.at)
        self._whole(name, leaves)
        for leaf, (shape, dtype) in zip(leaves, crossing.kinds, strict=True):
            if leaf.shape != shape or leaf.dtype != dtype:
                raise PlacementError(
                    f"stage {self.stage} was to hand {dtype} {tuple(shape)} to {name}, "
                    f"but has {leaf.dtype} {tuple(leaf.shape)}; let shapes and dtypes "
                    "in forward depend on those of its arguments alone"
                )
        self.sent = leaves

    def _whole(self, name: str, leaves: Any) -> None:
        """Refuse numbers of another stage that did not come along."""
        odd = _faked(leaves)
        if odd:
            raise PlacementError(
                f"{name} uses a tensor of shape {tuple(odd[0].shape)} of another stage "
                f"than stage {self.stage}: only what the first module of a stage is "
                "called with comes along; give it to that module too, or split "
                "elsewhere. A weight of two stages is a parameter of modules in both: "
                "head.weight = embed.weight"
            )

    def _recorded(self, name: str, number: int) -> Any:
        calls = self.route.returned.get(name, ())
        if number >= len(calls):
            self._lost(name)
        return calls[number]

    def _lost(self, name: str) -> NoReturn:
        raise PlacementError(
            f"forward took another way than for the first batch of this shape: {name} "
            "was called otherwise; let which modules run depend on shapes alone, or "
            "leave shard_stages out"
        )


def _faked(leaves: Iterable[Any]) -> list[Any]:
    """Those that have a shape and no numbers."""
    known = _torch_stages.is_fake
    return [one for one in leaves if type(one) is not Tensor and known(one)]


def _returned(recorded: Any, given: list[Any]) -> Any:
    """What a part returned, with what it was given and handed through."""

    def one(leaf: Any) -> Any:
        return given[leaf.leaf] if isinstance(leaf, From) else leaf

    return tree.map_leaves(one, recorded, lambda leaf: isinstance(leaf, From))


class _Between(TorchFunctionMode):
    """What forward computes between parts: with numbers where they were received."""

    def __init__(self, known: dict[int, Tensor]) -> None:
        super().__init__()
        self.known = known

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tree.leaves((args, kwargs))
        if _faked(given):
            now = [self.known.get(id(leaf), leaf) for leaf in given]
            if _faked(now):  # only a shape comes of it
                now = [_bare(leaf) for leaf in now]
            args, kwargs = tree.unflatten((args, kwargs), now)
        return func(*args, **kwargs)


def _bare(leaf: Any) -> Any:
    tracked = isinstance(leaf, Tensor) and leaf.requires_grad
    return leaf.detach() if tracked and not _torch_stages.is_fake(leaf) else leaf


def stand_ins(route: Route, stage: int, device: str) -> tuple[Tensor, ...]:
    """What is sent in place of results that failed, so that no rank waits for ever."""
    return tuple(
        torch.zeros(like.shape, dtype=like.dtype, device=device)
        for like in route.crossings[stage].like
    )
