"""One stage at work on one microbatch: its own parts run, those of others do not."""

from __future__ import annotations

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
        self.output = self._filled(output, tree.leaves(output))
        if self.stage < self.homes.count - 1:
            if not self.sent:
                self._lost(self.homes.starts[self.stage])
            raise Through
        return self.output

    def part(self, name: str, call: Any, args: Any, kwargs: Any) -> Any:
        """A part's call."""
        number = self.counts.get(name, 0)
        self.counts[name] = number + 1
        if self.homes.units[name] != self.stage and name != self.next:
            result = self._recorded(name, number)
            if isinstance(result, Tensor):  # as mostly, and whatever was given
                return result
        with _torch_stages.Aside(_Between):
            return self._part(name, number, call, args, kwargs)

    def _part(self, name: str, number: int, call: Any, args: Any, kwargs: Any) -> Any:
        given = tree.leaves((args, kwargs))
        if name == self.first and not number:
            self._receive(given)
        now = list(map(self._now, given)) if self.known else given
        if name == self.next and not number:
            self._send(name, now)
        if self.homes.units[name] != self.stage:
            return self._returned(name, number, now)
        args, kwargs = self._filled((args, kwargs), given)
        self._whole(name, now)
        result = call(*args, **kwargs)
        self._whole(name, tree.leaves(result))
        return result

    def _filled(self, whole: Any, leaves: list[Any]) -> Any:
        """A tree with what was received in it; the same one where nothing was."""
        if self.known and any(id(leaf) in self.known for leaf in leaves):
            return tree.unflatten(whole, map(self._now, leaves))
        return whole

    def _now(self, leaf: Any) -> Any:
        """A leaf, or the numbers that were received in its place."""
        return self.known.get(id(leaf), leaf)

    def _receive(self, given: list[Any]) -> None:
        crossing = self.route.crossings[self.stage - 1]
        for i, tensor in zip(crossing.at, self.received, strict=True):
            self.known[id(given[i])] = tensor
            self.held.append(given[i])

    def _send(self, name: str, given: list[Any]) -> None:
        crossing = self.route.crossings[self.stage]
        leaves = tuple(given[i] for i in crossing.at)
        self._whole(name, leaves)
        for leaf, like in zip(leaves, crossing.like, strict=True):
            if (leaf.shape, leaf.dtype) != (like.shape, like.dtype):
                raise PlacementError(
                    f"stage {self.stage} was to hand {like.dtype} "
                    f"{tuple(like.shape)} to {name}, but has {leaf.dtype} "
                    f"{tuple(leaf.shape)}; let shapes and dtypes in forward depend on "
                    "those of its arguments alone"
                )
        self.sent = leaves

    def _whole(self, name: str, leaves: Any) -> None:
        """Refuse numbers of another stage that did not come along."""
        odd = [leaf for leaf in leaves if _torch_stages.is_fake(leaf)]
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

    def _returned(self, name: str, number: int, given: list[Any]) -> Any:
        def one(leaf: Any) -> Any:
            return given[leaf.leaf] if isinstance(leaf, From) else leaf

        recorded = self._recorded(name, number)
        return tree.map_leaves(one, recorded, lambda leaf: isinstance(leaf, From))

    def _lost(self, name: str) -> NoReturn:
        raise PlacementError(
            f"forward took another way than for the first batch of this shape: {name} "
            "was called otherwise; let which modules run depend on shapes alone, or "
            "leave shard_stages out"
        )


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
        if any(map(_torch_stages.is_fake, given)):
            now = [self.known.get(id(leaf), leaf) for leaf in given]
            if any(map(_torch_stages.is_fake, now)):  # only a shape comes of it
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
