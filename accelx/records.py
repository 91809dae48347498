"""The records that all else is a function of: data only, frozen, equal by value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from torch import Tensor


def code(name: str, record: attrs.AttrsInstance) -> str:
    """The call that makes `record`: its required fields, and those not at default."""
    parts: list[str] = []
    for field in attrs.fields(type(record)):
        if not field.repr:
            continue
        value = getattr(record, field.name)
        if field.default is attrs.NOTHING and not field.kw_only:
            parts.append(_literal(value))
        elif value != field.default:
            parts.append(f"{field.name}={_literal(value)}")
    return f"{name}({', '.join(parts)})"


def _literal(value: object) -> str:
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)  # functions and classes print as their name
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    return repr(value)


class _Coded:
    """Prints a record as the code that makes it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return code(type(self).__name__, self)  # type: ignore[arg-type]


def _positive(_: object, field: attrs.Attribute[int], value: int) -> None:
    if value < 1:
        raise ValueError(
            f"{field.name} must be at least 1, got {value}; write 1 or more"
        )


@attrs.frozen(repr=False)
class Axis(_Coded):
    """One named axis of the mesh of ranks."""

    name: str
    size: int = attrs.field(validator=_positive)


@attrs.frozen(repr=False)
class Env(_Coded):
    """Where this process stands. Without live handles: hashes, compares, pickles.

    `Env()` is one CPU process by itself. `alone` is true inside `on_main`, where a
    collective would wait for ever and therefore raises.
    """

    rank: int = 0  # 0 .. world - 1
    world: int = attrs.field(default=1, validator=_positive)  # ranks in all
    local_rank: int = 0  # 0 .. local_world - 1, on this node
    local_world: int = attrs.field(default=1, validator=_positive)  # ranks on this node
    node: int = 0
    nodes: int = attrs.field(default=1, validator=_positive)
    device: str = "cpu"  # such as "cuda:3"
    backend: str | None = None  # of torch.distributed; None where there is no group
    axes: tuple[Axis, ...] = ()  # outermost first; sizes multiply to `world`
    launcher: str = "none"  # what `detect` recognised
    rendezvous: str | None = None  # init_method of torch.distributed
    alone: bool = False
    whole: tuple[Axis, ...] = ()  # of a part made by `along`: the axes of all ranks

    @property
    def main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def check_env(name: str, env: object) -> None:
    """Refuse what is no Env where one was forgotten."""
    if not isinstance(env, Env):
        raise TypeError(
            f"{name} wants an Env first, got {type(env).__name__}; write "
            f"env = ax.connect(), then ax.{name}(env)(thing) or ax.{name}(env) in a "
            "chain"
        )


@attrs.frozen(repr=False, eq=False)
class Mean(_Coded):
    """A mean as numerator and denominator, so that it is taken once, over everything.

    `total` and `weight` are scalars (0-dim tensors or numbers): the sum over samples or
    tokens, and their number. Means add: over microbatches, ranks and batches.
    """

    total: Tensor | float
    weight: Tensor | float

    @classmethod
    def of(cls, mean: Tensor | float, weight: Tensor | float) -> Mean:
        """The Mean of something that is already a mean over `weight` items."""
        return cls(mean * weight, weight)

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> Tensor | float:
        """total / weight; nan where nothing was counted."""
        if isinstance(self.weight, (int, float)) and self.weight == 0:
            return self.total * float("nan")
        return self.total / self.weight


@attrs.frozen
class Out:
    """What one step reports."""

    # (), global mean over every row or token of the step. Inside a `backward` arrow it
    # is this rank's: a mean over `weight` rows, or a Mean.
    loss: Tensor | float
    weight: Tensor | float  # (), rows or tokens that the mean was taken over
    norm: Tensor | None = None  # (), float32: true global 2-norm before clipping
    stepped: bool = False  # whether the optimizers moved
    skipped: str | None = None  # why not
    aux: Any = None  # what the loss returned beside the loss
    # seconds of this process: "grads", "update"; a GPU may still be at work then. And
    # "data", where the batch is one of `feed`: waited for since the step before
    times: Mapping[str, float] = attrs.field(factory=dict, eq=False)
    # waits for loss, weight and aux, where they are still on their way from other ranks
    late: Late | None = attrs.field(default=None, repr=False, eq=False)

    def __getattr__(self, name: str) -> Any:
        # Reached only for a field that `owing` took away.
        if name not in _LATE or self.late is None:
            raise AttributeError(f"Out has no attribute {name!r}")
        for field, value in zip(_LATE, self.late(), strict=True):
            object.__setattr__(self, field, value)
        object.__setattr__(self, "late", None)
        return getattr(self, name)


_LATE = ("loss", "weight", "aux")
Late = Callable[[], tuple[Any, Any, Any]]


def owing(late: Late, **fields: Any) -> Out:
    """A report whose loss, weight and aux are waited for when they are first read."""
    out = Out(0.0, 0.0, late=late, **fields)
    for field in _LATE:
        object.__delattr__(out, field)
    return out


def amend(out: Out, **fields: Any) -> Out:
    """`attrs.evolve(out, **fields)` that does not wait for what is on its way."""
    if out.late is None:
        return attrs.evolve(out, **fields)
    kept = {"norm": out.norm, "stepped": out.stepped, "skipped": out.skipped}
    return owing(out.late, **{**kept, "times": out.times, **fields})


def timed(out: Out, waited: float) -> Out:
    """`out`, which nobody has read yet, with the seconds that its data took."""
    # written into it: a new one takes 0.6 us, and a step has few to give
    _write_times(out, {"data": waited})
    return out


_write_times = vars(Out)["times"].__set__
_write_stepped = vars(Out)["stepped"].__set__


def made_in(out: Out, times: Mapping[str, float]) -> Out:
    """`moved(out, times)` of one that nobody has read yet: written into it."""
    _write_stepped(out, True)
    _write_times(out, times)
    return out


def moved(out: Out, times: Mapping[str, float]) -> Out:
    """The report of a step that was made."""
    if out.late is not None:
        return amend(out, stepped=True, times=times)
    # written out: attrs.evolve takes 4 us, and a step has few to give
    return Out(out.loss, out.weight, out.norm, True, None, out.aux, times)


def _reasoned(_: object, __: object, why: str) -> None:
    if not why.strip():
        raise ValueError(
            "a rule must say why it holds, got an empty `why`; write the reason"
        )


@attrs.frozen(repr=False)
class Rules(_Coded):
    """An order rule of a pass, and why it holds. Names are names of passes."""

    after: tuple[str, ...] = ()  # these may not come later in the chain
    excludes: tuple[str, ...] = ()  # these may not be in the chain
    once: bool = False  # the pass may stand in a chain only once
    why: str = attrs.field(kw_only=True, validator=_reasoned)


@attrs.frozen(repr=False)
class Precision(_Coded):
    """Which dtype each thing has: "fp64" "fp32" "bf16" "fp16", or None to leave it be.

    `param`: trainable weights, and with them gradients and optimizer state. `compute`:
    matrix products, here "fp8" too. `reduce`: gradients on the wire. `output`: what the
    model returns (None: whatever `compute` made). `buffer`: floating-point buffers.
    """

    param: str | None = None
    compute: str | None = None
    reduce: str | None = None
    output: str | None = None
    buffer: str | None = None


Loss = Callable[..., Any]  # (model, *args) -> Tensor | Mean | (either, aux)
Arrow = Callable[["Any", Out], "tuple[Any, Out]"]  # (State, Out) -> (State, Out)


def _rules(value: Rules | tuple[Rules, ...]) -> tuple[Rules, ...]:
    return (value,) if isinstance(value, Rules) else tuple(value)


@attrs.frozen(eq=False)
class Pass:
    """One named stage of work: a spec that is looked at, and arrows that do something.

    Two passes are equal when their names and specs are: the arrows follow from those.
    """

    name: str
    spec: Any  # frozen record; printed, compared, looked up
    place: Callable[[Any, Transform], Any] | None = None  # (State, Transform) -> State
    start: Callable[[Any, Transform], Any] | None = None  # the same, optimizers exist
    feed: Callable[[Any], Any] | None = None  # Loader -> Loader
    forward: Callable[[Loss], Loss] | None = None
    backward: Callable[..., Any] | None = None  # (Grads, Engine) -> Grads
    before: Arrow | None = None  # gradients are whole, update not made
    after: Arrow | None = None  # update made
    # (State, Transform) -> State, once, every slot open: what was saved comes back
    restore: Callable[[Any, Transform], Any] | None = None
    # (State, Out | None) -> the same: the step is over, or skipped, or (None) was a
    # batch of `measure`. Looks, saves, leaves; what it sees is what the next step gets
    done: Callable[[Any, Out | None], tuple[Any, Out | None]] | None = None
    alone: Callable[[Any], Any] | None = (
        None  # what `transform(x)` does without a chain
    )
    rules: tuple[Rules, ...] = attrs.field(default=(), converter=_rules)
    neutral: bool = False  # leaves the run that one process makes, up to rounding (L4)
    derived: bool = False  # comes with the pass before it, which prints for both

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pass):
            return NotImplemented
        return (self.name, self.spec) == (other.name, other.spec)

    def __hash__(self) -> int:
        return hash(self.name)


@attrs.frozen(repr=False)
class Transform:
    """A tuple of passes, made by `chain`, `transform` and the factories of passes."""

    passes: tuple[Pass, ...] = ()

    def find(self, name: str) -> Any:
        """The spec of the first pass called `name`, or None."""
        return next((p.spec for p in self.passes if p.name == name), None)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __call__(self, thing: Any) -> Any:
        """What this transform does to `thing` by itself, without a chain."""
        alone = [p.alone for p in self.passes if p.alone is not None]
        if len(self.passes) != 1 or not alone:
            raise TypeError(
                f"{self!r} was called on a {type(thing).__name__}, but only "
                "shard_model, shard_loader and their like act alone; put it in a chain "
                "and give that to ax.init, ax.feed and ax.step"
            )
        return alone[0](thing)

    def brief(self) -> str:
        """As it is written in a program: each Env by the name `env`."""
        text = repr(self)
        for one in self.passes:
            if hasattr(one.spec, "env"):
                text = text.replace(repr(one.spec.env), "env")
        return text

    def __repr__(self) -> str:
        shown = [repr(p.spec) for p in self.passes if not p.derived]
        if not shown:
            return "identity"
        return shown[0] if len(shown) == 1 else f"chain({', '.join(shown)})"


@attrs.frozen
class Engine:
    """How a placed model goes backward and updates. Vary it with `attrs.evolve`."""

    name: str
    backward: Callable[..., None]
    """(state, scalar, scale): add scale * the gradient of the sum over ranks."""
    settle: Callable[[Any, Tensor | float], None]
    """(state, scale): make gradients whole over ranks and multiply them by scale."""
    update: Callable[[Any], None]
    """(state): step every optimizer and drop the gradients."""
    clip: Callable[[Any, float | None], Tensor]
    """(state, limit): the global 2-norm, (); scale gradients to limit if beyond."""
    quiet: Callable[[Any], Any]
    """(state): a context in which backward passes do not communicate."""
    carry: Callable[[Any], Any] | None = None
    """(state): a scalar leaf whose gradient is reduced with the others, or None. What
    `backward` is given as (..., leaf, value) comes out there as its mean over ranks.
    """
    through: Callable[..., Any] | None = None
    """(loss, weighed): what goes forward and backward in place of one call of the loss,
    (state, args, rows) -> (state, Out), or None. `weighed` is that of gradients.py.
    """
    handles: frozenset[str] = frozenset()  # names of passes that it does itself
    drop: Callable[[Any], None] | None = None
    """(state): let go of gradients that make no update; None where they are p.grad."""
