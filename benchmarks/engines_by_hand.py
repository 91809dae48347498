"""The step of benchmarks/engines.py by hand, in torch and DeepSpeed, and by peers.

Each function sets a model up and returns what makes some steps of it, and gives the
last loss of this rank, or None where it has none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

Run = Callable[[], Tensor | None]
MICROBATCHES = 8  # of a pipeline


class Work(NamedTuple):
    """How much there is to do."""

    width: int
    rows: int  # of all ranks together, for each of them
    steps: int  # of one round


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def net(work: Work) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(work.width) for _ in range(4)])


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def batch(work: Work, part: int, parts: int) -> list[Tensor]:
    """Rows and what they should give: this part of the rows of all ranks, `(n, w)`."""
    n = work.rows * dist.get_world_size()
    x = torch.randn(n, work.width, generator=torch.Generator().manual_seed(1))
    return [x.chunk(parts)[part], x.flip(1).chunk(parts)[part]]


def mean_square(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean()


def loop(work: Work, model, optim, rows: list[Tensor], backward=Tensor.backward) -> Run:
    """The loop that everybody writes."""
    x, y = rows

    def run() -> Tensor:
        for _ in range(work.steps):
            loss = mean_square(model(x), y)
            backward(loss)
            optim.step()
            optim.zero_grad()
        return loss.detach()

    return run


def ours(work: Work) -> list[Tensor]:
    """This rank's own rows."""
    return batch(work, dist.get_rank(), dist.get_world_size())


def fully_sharded(work: Work, mesh) -> Run:
    from torch.distributed.fsdp import fully_shard

    model = net(work)
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return loop(work, model, optimizer(model), ours(work))


def fsdp2(work: Work) -> Run:
    return fully_sharded(work, init_device_mesh("cpu", (dist.get_world_size(),)))


def hsdp(work: Work) -> Run:
    names = ("replicate", "shard")
    return fully_sharded(work, init_device_mesh("cpu", (2, 2), mesh_dim_names=names))


def cut(model: nn.Module, mesh) -> nn.Module:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def by_kind(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW takes many weights at once, of one kind: DTensors, and what is whole."""
    from torch.distributed.tensor import DTensor

    weights = list(model.parameters())
    apart = [p for p in weights if isinstance(p, DTensor)]
    whole = [p for p in weights if not isinstance(p, DTensor)]
    return torch.optim.AdamW([{"params": apart}, {"params": whole}], lr=1e-4)


def tensor(work: Work) -> Run:
    model = cut(net(work), init_device_mesh("cpu", (dist.get_world_size(),)))
    return loop(work, model, by_kind(model), batch(work, 0, 1))


def pipeline(work: Work, told: bool = False) -> Run:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank, world = dist.get_rank(), dist.get_world_size()
    size = 4 // world
    model = net(work)[rank * size : (rank + 1) * size]
    stage = PipelineStage(model, rank, world, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=mean_square)
    optim = optimizer(model)
    x, y = batch(work, 0, 1)

    def mean(losses: list[Tensor]) -> Tensor | None:
        return torch.stack(losses).mean().detach() if losses else None

    def run() -> Tensor | None:
        for _ in range(work.steps):
            losses: list[Tensor] = []
            given = (x,) if rank == 0 else ()
            wanted = {"target": y, "losses": losses} if rank == world - 1 else {}
            schedule.step(*given, **wanted)
            if told:
                loss = torch.zeros(()) if rank < world - 1 else mean(losses)
                dist.broadcast(loss, world - 1)
            optim.step()
            optim.zero_grad()
        return loss if told else mean(losses)

    return run


def pipeline_told(work: Work) -> Run:
    """That, with the loss on every rank, as `Out.loss` is."""
    return pipeline(work, told=True)


def zero(stage: int) -> Callable[[Work], Run]:
    def run(work: Work) -> Run:
        import deepspeed

        model = net(work)
        config = {
            "train_micro_batch_size_per_gpu": work.rows,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
            "steps_per_print": 1 << 62,
        }
        if stage < 3:  # which nobody asks for here
            config["zero_optimization"]["compute_grad_norm"] = False
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer(model), config=config
        )
        x, y = ours(work)

        def steps() -> Tensor:
            for _ in range(work.steps):
                loss = mean_square(engine(x), y)
                engine.backward(loss)
                engine.step()
            return loss.detach()

        return steps

    return run


def fabric(parallelize, data: int, make=optimizer) -> Callable[[Work], Run]:
    """Fabric's strategy of FSDP2 and tensors, which the user's function applies."""

    def run(work: Work) -> Run:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import TorchElasticEnvironment
        from lightning_fabric.strategies import ModelParallelStrategy

        world = dist.get_world_size()
        size = data or world
        strategy = ModelParallelStrategy(
            parallelize, size, world // size, timeout=timedelta(minutes=5)
        )
        lightning = Fabric(
            accelerator="cpu",
            devices=world,
            strategy=strategy,
            plugins=[TorchElasticEnvironment()],
        )
        lightning.launch()
        model = lightning.setup_module(net(work))
        optim = lightning.setup_optimizers(make(model))
        rows = ours(work) if size > 1 else batch(work, 0, 1)
        return loop(work, model, optim, rows, lightning.backward)

    return run


def fabric_fsdp2(model: nn.Module, mesh) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model:
        fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def fabric_tensor(model: nn.Module, mesh) -> nn.Module:
    return cut(model, mesh["tensor_parallel"])


def accelerate_zero(stage: int) -> Callable[[Work], Run]:
    def run(work: Work) -> Run:
        from accelerate import Accelerator, DeepSpeedPlugin

        os.environ["ACCELERATE_USE_CPU"] = "false"
        plugin = DeepSpeedPlugin(zero_stage=stage, gradient_clipping=0.0)
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": work.rows,
            # on CPU ranks it takes itself for the only one
            "train_batch_size": work.rows * dist.get_world_size(),
            "zero_allow_untested_optimizer": True,
        }
        accelerator = Accelerator(deepspeed_plugin=plugin)
        model = net(work)
        model, optim = accelerator.prepare(model, optimizer(model))
        return loop(work, model, optim, ours(work), accelerator.backward)

    return run


def accelerate_fsdp2(work: Work) -> Run:
    """Its FSDP2, which it wants a GPU for and on CPU ranks leaves out without a word.

    So it is told that it has it, as it would find by itself on a GPU.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    model = net(work)
    model, optim = accelerator.prepare(model, optimizer(model))
    return loop(work, model, optim, ours(work), accelerator.backward)
