"""What one of many ranks would hold and send in a step: shapes alone, no numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from accelx import _torch_simulate, _torch_stages, gradients
from accelx.cut import rows_in
from accelx.engines.options import SLICED
from accelx.engines.placed import engine_of
from accelx.env import close, connect
from accelx.env_axes import Axes
from accelx.env_part import rows_env
from accelx.errors import PlacementError
from accelx.passes.accumulate import accumulate
from accelx.records import Env, Loss, Transform
from accelx.run import init
from accelx.simulate_live import Live
from accelx.simulate_stages import SentOn, received, receiving, unheard
from accelx.simulate_wire import Kept, Sent, size_of
from accelx.state import State

__all__ = ["Simulated", "simulate"]
GIB = 2**30
ALONE = ("shard_model", "shard_tensors", "shard_experts", "shard_sequence")
UNTOLD = ("with_local_sgd", "with_diloco")  # whose ranks train apart


@attrs.frozen
class Simulated:
    """Bytes on one rank, and bytes that it sends in a step, by kind of collective."""

    rank: int
    world: int
    parameters: int  # numbers, of the whole model
    weights: int
    gradients: int
    optimizer: int
    activations: int  # what microbatches in flight keep for their backward passes
    received: int  # what stages receive into
    peak: int  # the most at a time, with what is gathered for a moment
    sent: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes that the rank holds at the end of a forward pass."""
        held = self.weights + self.gradients + self.optimizer
        return held + self.activations + self.received

    def __str__(self) -> str:
        held = ["weights", "gradients", "optimizer", "activations"]
        held += ["received"] if self.received else []
        lines = [
            f"{self.parameters / 1e9:.2f} B parameters, rank {self.rank} of "
            f"{self.world}; GiB on this rank, and sent by it in a step:"
        ]
        held += ["total", "peak"]
        lines += [f"  {name:<19}{getattr(self, name) / GIB:10.3f}" for name in held]
        lines += [f"  {n:<19}{size / GIB:10.3f} sent" for n, size in self.sent.items()]
        return "\n".join(lines)


def simulate(
    chained: Callable[[Env], Transform],
    model: Callable[[], nn.Module],
    optim: Callable[[Any], Any],
    loss: Loss,
    *args: Tensor,
    world: int,
    axes: Axes | None = None,
    rank: int = 0,
) -> Simulated:
    """What rank `rank` of `world` would hold and send, found in one process on a CPU.

    `chained` makes the transform of an Env, as the program does; `args` are this rank's
    part of a batch. The model is placed and runs forward and backward as on a cluster,
    over a process group that sends nothing and tensors that have no numbers: 70 B
    parameters take no memory. A loss that looks at numbers (`float(x)`) cannot be
    simulated.

    Effects: opens torch's process group and closes it. torch remembers meshes, so a
    second simulation wants another process: `accelx.testing.run(1)` is one. Raises
    PlacementError where a group is open, a pass cannot be placed, or torch is too old.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        raise PlacementError(
            "simulate wants a process without a process group, but one is open; run it "
            "in a process of its own, before connect"
        )
    if not _torch_simulate.knows_shapes():
        raise PlacementError(
            "simulate wants a torch whose collectives run on tensors without numbers, "
            f"got {torch.__version__}; write pip install -U torch (2.13 has them)"
        )
    _torch_simulate.fake_group(rank, world)
    env = Env(rank=rank, world=world, backend="fake")
    try:
        env = connect(env, axes=axes, device="cpu")
        tx = chained(env)
        _possible(tx)
        return _simulated(env, tx, model, optim, loss, args)
    except _torch_stages.fake_errors() as error:
        raise PlacementError(
            "simulate wants a model and a loss that run on shapes alone, but one of "
            f"them asks for a number ({error}); leave float(x), x.item() and branches "
            "on values out of what is simulated"
        ) from error
    finally:
        close(env)


def _possible(tx: Transform) -> None:
    """Refuse what sends from C++ or from other libraries, which nothing answers."""
    odd = [name for name in UNTOLD if tx.find(name) is not None]
    got = odd[0] if odd else _unanswered(tx)
    if got is not None:
        raise PlacementError(
            "simulate wants weights in slices, cut inside layers or in copies that are "
            f'reduced at each step, got {got}; write shard_model(env, "fsdp2"), or '
            "leave that out"
        )


def _unanswered(tx: Transform) -> str | None:
    """What of shard_model cannot be simulated."""
    placing = tx.find("shard_model")
    if placing is None:
        return "no shard_model"
    if placing.kind in SLICED or _laid(tx):
        return None
    if placing.kind != "ddp":
        return repr(placing.kind)
    if placing.hook not in (None, "bf16", "fp16"):
        return f"hook={placing.hook!r}"
    alike = rows_env(placing.env).world < placing.env.world
    return 'ranks that share rows under "ddp"' if alike else None


def _laid(tx: Transform) -> bool:
    """Whether ranks have parts of a copy, which are not placed by DDP."""
    parts = [tx.find("shard_tensors"), tx.find("shard_experts")]
    stages = tx.find("shard_stages")
    inside = any(one is not None and one.over.world > 1 for one in parts)
    return inside or (stages is not None and stages.ranks > 1)


def _copied(tx: Transform) -> Transform | None:
    """The chain of one copy, whose gradients DDP would send from C++; else None."""
    if tx.find("shard_model").kind != "ddp" or _laid(tx):
        return None
    passes = [
        accumulate(p.spec.n).passes[0] if p.name == "shard_stages" else p
        for p in tx
        if p.name not in ALONE
    ]
    return Transform(tuple(passes))


def _simulated(
    env: Env,
    tx: Transform,
    model: Callable[[], nn.Module],
    optim: Callable[[Any], Any],
    loss: Loss,
    args: tuple[Any, ...],
) -> Simulated:
    with _torch_simulate.numberless() as mode:
        whole = model()
        args = tuple(mode.from_tensor(one) for one in args)
    count = sum(p.numel() for p in whole.parameters())
    copy, wire = _copied(tx), tx.find("shard_model").hook and 2  # bytes of a number
    tx = tx if copy is None else copy
    with _torch_simulate.alike():
        state = init(tx, whole, optim)
    own = [_torch_simulate.own_of(p) for p in state.model.parameters()]
    placed_on, engine = gradients.env_of(state), engine_of(state)
    staged = engine.through is not None
    engine = unheard(engine) if staged else engine
    inner = gradients.unreduced(tx, loss, engine, placed_on)
    kept, live = Kept(own), Live(mode)
    resizing = _torch_simulate.resizing(live.resized, kept.resized)
    counting = SentOn(live) if staged else Sent(live)
    with kept.hooks, resizing, counting as sent, receiving(live, kept):
        grown = [] if copy is None else _bucketed(state)
        state, _ = inner(state, args, rows_in(args, placed_on.world))
        if staged:  # it reduces once, when all microbatches are through
            engine.settle(state, 1.0)
    for p in grown:
        p.grad = p.grad if _torch_simulate.touched(p.grad) else None
    grads = [p.grad for _, p in state.trained if p.grad is not None]
    own_grads = size_of([_torch_simulate.own_of(grad) for grad in grads])
    if copy is not None:
        size = own_grads if wire is None else wire * sum(g.numel() for g in grads)
        sent.bytes["reduced"] += 2 * size * (env.world - 1) // env.world
    moments = sum(_moments(optimizer) for optimizer in state.optimizers)
    return Simulated(
        *(env.rank, env.world, count, size_of(own)),
        gradients=own_grads,
        optimizer=moments,
        activations=kept.most,
        received=received(state) if staged else 0,
        peak=size_of(own) + moments + live.most,
        sent=dict(sent.bytes),
    )


def _bucketed(state: State) -> list[Any]:
    """Weights that have gradients before there are any, as DDP's buckets do."""
    every = [p for _, p in state.trained]
    for p in every:
        p.grad = torch.zeros_like(p)
    return every


def _moments(optimizer: Any) -> int:
    """Bytes of an optimizer's state, after a step over one weight of each kind."""
    alike: dict[Any, list[Any]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p.grad is not None:
                local = _torch_simulate.own_of(p)
                key = (number, p.dtype, tuple(p.shape), tuple(local.shape))
                alike.setdefault(key, []).append(p)
    for _, *rest in alike.values():
        for p in rest:
            p.grad = None
    optimizer.step()
    total = 0
    for first, *rest in alike.values():
        values = optimizer.state[first].values()
        held = [_torch_simulate.own_of(v) for v in values if isinstance(v, Tensor)]
        total += size_of(held) * (1 + len(rest))
    return total
