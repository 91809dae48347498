"""What passes between stages, learnt by a run of the model on shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor, nn

from accelx import _torch, _torch_stages, dtypes, tree
from accelx.engines.stage_homes import Homes
from accelx.errors import LossError, PlacementError
from accelx.records import Precision
from accelx.saves.streams import now


class Through(BaseException):
    """The model was called: what the loss does with the output is done elsewhere."""


@attrs.frozen
class From:
    """In what a part returned: the leaf of its arguments that it handed through."""

    leaf: int


Kinds = tuple[tuple[torch.Size, torch.dtype], ...]


@attrs.frozen(eq=False)
class Crossing:
    """What a stage gets: leaves of its first module's arguments, and their like."""

    at: tuple[int, ...]
    like: tuple[Tensor, ...]  # shape and dtype, no numbers
    kinds: Kinds = attrs.field(init=False)  # those, which a fake takes 1 us to tell

    def __attrs_post_init__(self) -> None:
        kinds = tuple((one.shape, one.dtype) for one in self.like)
        object.__setattr__(self, "kinds", kinds)


@attrs.frozen(eq=False)
class Route:
    """The way of a batch of one shape through the model."""

    returned: Mapping[str, tuple[Any, ...]]  # of each part, call by call
    crossings: tuple[Crossing, ...]  # into stage 1, 2, ...
    output: Any  # what the model returned, on shapes alone


@attrs.define(eq=False)
class Way:
    """Who takes the calls of a model and of its parts just now, if anyone."""

    now: Any = None  # with `part` and `model`, as Trace has them
    outside: Callable[..., Any] = lambda call, *args, **kwargs: call(*args, **kwargs)
    in_loss: bool = False  # in a loss, and not in the model that it calls


def guide(model: nn.Module, homes: Homes, way: Way) -> None:
    """Lead calls of `model` and of its parts by `way`. Copies are not affected."""

    def root(call: Any, *args: Any, **kwargs: Any) -> Any:
        before, way.in_loss = way.in_loss, False
        try:
            if way.now is None:
                return way.outside(call, *args, **kwargs)
            return way.now.model(call, args, kwargs)
        finally:
            way.in_loss = before

    def part(name: str) -> Callable[..., Any]:
        def around(call: Any, *args: Any, **kwargs: Any) -> Any:
            if way.now is None:
                _astray(name)
            return way.now.part(name, call, args, kwargs)

        return around

    _torch_stages.around_call(model, root)
    for name in homes.units:
        _torch_stages.around_call(model.get_submodule(name), part(name))


def _astray(name: str) -> NoReturn:
    raise PlacementError(
        f"the model is cut into stages, which work together where the model itself is "
        f"called, but {name} was called by itself; write model(...)"
    )


@contextmanager
def led(way: Way, by: Any) -> Generator[None]:
    """Inside, `by` takes the calls of the model and of its parts."""
    before, way.now = way.now, by
    try:
        yield
    finally:
        way.now = before


@attrs.frozen(eq=False)
class Sketch:
    """A copy of the model with shapes and no numbers, to run on any rank."""

    model: nn.Module
    homes: Homes
    way: Way
    mode: Any  # which makes its tensors


def sketched(
    model: nn.Module, homes: Homes, device: str, computed: Precision | None = None
) -> Sketch:
    """The sketch of a model whose weights are all there yet.

    `computed`: the precision in which weights are gathered, where it is another one.
    """
    memo: dict[int, Any] = {}
    mode = _torch_stages.fake_mode()
    wide = None if computed is None else dtypes.dtype(computed.compute)

    def shape(tensor: Tensor, cast: bool) -> Tensor:
        dtype = wide if cast and wide and tensor.is_floating_point() else tensor.dtype
        with mode:
            return torch.empty(tensor.shape, dtype=dtype, device=device)

    for name, module in model.named_modules(remove_duplicate=False):
        ours = homes.of(name) is not None
        for p in module.parameters(recurse=False):
            memo.setdefault(id(p), nn.Parameter(shape(p, True), p.requires_grad))
        for b in module.buffers(recurse=False):
            if ours or b.is_meta:
                memo.setdefault(id(b), shape(b, False))
    sketch = Sketch(copy.deepcopy(model, memo), homes, Way(), mode)
    guide(sketch.model, homes, sketch.way)
    return sketch


def route(sketch: Sketch, call: Callable[[nn.Module], Any], device: str) -> Route:
    """The way that `call(model)` takes: a loss, or the model on some arguments.

    Nothing is computed that depends on a weight. Raises LossError where the model is
    not called once, PlacementError where it cannot be cut so.
    """
    trace, before = Trace(sketch.homes, sketch.mode), now(device)
    try:
        with torch.no_grad(), _Written(), led(sketch.way, trace):
            call(sketch.model)
    except Through:
        pass
    except _torch_stages.fake_errors() as error:
        raise PlacementError(
            "each stage runs the model's forward with numbers of its own part alone, "
            "but a branch of it asks for a number that another part computes "
            f"({error}); take that out of forward, or into one module"
        ) from error
    if not trace.called:
        raise LossError(
            "the loss wants to call the model once, which its stages compute together, "
            "but it returned without; write model(...) in the loss"
        )
    if not torch.equal(before, now(device)):
        raise LossError(
            "random numbers were drawn outside the modules that stages hold, where "
            "ranks would each draw others; draw them with the rows of the batch "
            "(ax.sample_rng), or in a module"
        )
    return trace.finished()


def ran(sketch: Sketch, call: Callable[[nn.Module], Any]) -> dict[str, float]:
    """The parts that `call(model)` runs, in their order, and operations of each.

    Blocks of the stages' lists are parts of their own where they stand beside starts.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    tally = _Tally(counter)
    try:
        with torch.no_grad(), counter, led(sketch.way, tally):
            call(sketch.model)
    except _torch_stages.fake_errors() as error:
        raise PlacementError(
            "shard_stages(sample=...) runs the model's forward on shapes alone, but a "
            f"part of it asks for numbers ({error}); leave the sample out, and name "
            'modules in split="layers.2"'
        ) from error
    return tally.costs


@attrs.define(eq=False)
class _Tally:
    """A run on shapes that counts what each part costs."""

    counter: Any
    costs: dict[str, float] = attrs.field(factory=dict)

    def model(self, call: Any, args: Any, kwargs: Any) -> Any:
        """The model's own call."""
        return call(*args, **kwargs)

    def part(self, name: str, call: Any, args: Any, kwargs: Any) -> Any:
        """A part's call."""
        before = self.counter.get_total_flops()
        self.costs.setdefault(name, 0.0)
        result = call(*args, **kwargs)
        self.costs[name] += self.counter.get_total_flops() - before
        return result


class _Written(_torch.DispatchMode):
    """Refuses to write what a part computed into a tensor that is none of a part's."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _torch.mutates(func):
            into = _torch.written(func, args, kwargs)
            fake = _torch_stages.is_fake
            given = tree.leaves((args, kwargs))
            if any(map(fake, given)) and not all(map(fake, into)):
                raise PlacementError(
                    f"forward writes by {_torch.name_of(func)} what a part computed "
                    "into a tensor that it made itself, which other stages would have "
                    "without; make it of the parts' results: torch.cat, torch.stack"
                )
        return func(*args, **kwargs)


@attrs.define(eq=False)
class Trace:
    """A run on shapes that notes what each part returns, and what crosses."""

    homes: Homes
    mode: Any  # which makes tensors of a shape and no numbers
    called: bool = False
    reached: int = 0  # the stage that the run is in
    returned: dict[str, list[Any]] = attrs.field(factory=dict)
    crossings: list[Crossing] = attrs.field(factory=list)
    output: Any = None

    def model(self, call: Any, args: Any, kwargs: Any) -> Any:
        """The model's own call; leaves the loss when it is over."""
        once(self.called, kwargs)
        self.called = True
        self.output = call(*args, **kwargs)
        raise Through

    def part(self, name: str, call: Any, args: Any, kwargs: Any) -> Any:
        """A part's call."""
        starts = self.homes.starts
        if name in starts and starts.index(name) >= self.reached:
            self._enter(name, args, kwargs)
        home = self.homes.units[name]
        if home != self.reached:
            raise PlacementError(
                f"{name} belongs to stage {home}, but forward calls it in stage "
                f"{self.reached}, after {self._last()}; register modules in the order "
                "in which they run, give shard_stages a sample=..., or name other "
                "modules in split"
            )
        given = tree.leaves((args, kwargs))
        noted, result = self._noted(call(*args, **kwargs), given)
        self.returned.setdefault(name, []).append(noted)
        return result

    def _noted(self, result: Any, given: list[Any]) -> tuple[Any, Any]:
        """What a part returned, with leaves that were given to it as such; for use.

        What no weight made, such as a mask, has numbers in its own stage alone, too.
        """
        places = {id(leaf): i for i, leaf in enumerate(given)}

        def bare(leaf: Any) -> Any:
            own = isinstance(leaf, Tensor) and id(leaf) not in places
            if not own or _torch_stages.is_fake(leaf):
                return leaf
            size, stride = leaf.shape, leaf.stride()
            dtype, device = leaf.dtype, leaf.device
            with self.mode:  # which knows no tensor of a simulated rank
                return torch.empty_strided(size, stride, dtype=dtype, device=device)

        def one(leaf: Any) -> Any:
            mine = isinstance(leaf, Tensor) and id(leaf) in places
            return From(places[id(leaf)]) if mine else leaf

        result = tree.map_leaves(bare, result)
        return tree.map_leaves(one, result), result

    def _last(self) -> str:
        return self.homes.starts[self.reached - 1] if self.reached else "the start"

    def _enter(self, name: str, args: Any, kwargs: Any) -> None:
        stage = self.homes.starts.index(name) + 1
        if stage != self.reached + 1:
            skipped = self.homes.starts[self.reached]
            raise PlacementError(
                f"{name} begins stage {stage}, but forward calls it before {skipped}, "
                f"which begins stage {self.reached + 1}; name them in the order in "
                "which they run"
            )
        given = tree.leaves((args, kwargs))
        at = tuple(i for i, leaf in enumerate(given) if _torch_stages.is_fake(leaf))
        if not at:
            raise PlacementError(
                f"{name} begins stage {stage}, but is given nothing that the stage "
                "before has computed; name in split a module that is called with its "
                "results"
            )
        self.reached = stage
        self.crossings.append(Crossing(at, tuple(given[i] for i in at)))

    def finished(self) -> Route:
        """The route, once every stage was reached."""
        if self.reached < len(self.homes.starts):
            missing = self.homes.starts[self.reached]
            raise PlacementError(
                f"{missing} begins stage {self.reached + 1}, but forward does not call "
                "it for this batch; name in split modules that are always called"
            )
        returned = {name: tuple(calls) for name, calls in self.returned.items()}
        return Route(returned, tuple(self.crossings), self.output)


def once(called: bool, kwargs: Any) -> None:
    """Refuse a second call of the model by one loss, and one with a cache."""
    if kwargs.get("past_key_values") is not None:
        raise PlacementError(
            "a cache of keys and values is of the layers of one stage, and lengths are "
            "read from it on all of them; write use_cache=False, or load the weights "
            "into a model that is whole"
        )
    if called:
        raise LossError(
            "the loss wants to call the model once where it is cut into stages, but it "
            "calls it again; join both inputs into one call (torch.cat), or leave "
            "shard_stages out"
        )
