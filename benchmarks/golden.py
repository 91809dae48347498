"""Writes tests/golden, with Accelerate 1.15.0 and torch 2.13 on CPU ranks.

    python -m benchmarks.golden accelerate-1.15/plain
    python -m benchmarks.golden accelerate-1.15/bin
    torchrun --nproc-per-node 2 -m benchmarks.golden accelerate-1.15/ddp
    torchrun --nproc-per-node 2 -m benchmarks.golden fsdp2

The tests read what lies here and need no Accelerate. Of `bin` and `ddp` only the files
that differ from those of `plain` are kept.
"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from tests.importing import (
    GOLDEN,
    SAVED,
    batch,
    grouped,
    halving,
    loss,
    make,
    momentum,
    single,
)


class Mine:
    """An object that save_state pickles."""

    def state_dict(self):
        return {"seen": 3}

    def load_state_dict(self, state):
        pass


def prepared(out, safe):
    """One process or DDP, by Accelerator.save_state."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = make()
    optimizer = grouped(model)
    scheduler = halving(optimizer)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    accelerator.register_for_checkpointing(Mine())
    for k in range(SAVED):
        rows = batch(k).chunk(accelerator.num_processes)[accelerator.process_index]
        accelerator.backward(loss(model, rows))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.save_state(out, safe_serialization=safe)


class Ranks:
    """What Accelerate's functions for FSDP ask of an Accelerator, on CPU ranks."""

    num_processes = 2
    is_fsdp2 = True

    def __init__(self):
        self.process_index = dist.get_rank()
        self.is_main_process = self.process_index == 0


def sharded(optim):
    """Two ranks of FSDP2 after the updates."""
    model = make()
    fully_shard(model.inner)
    fully_shard(model)
    optimizer = optim(model)
    scheduler = halving(optimizer) if optim is single else None
    for k in range(SAVED):
        loss(model, batch(k).chunk(2)[dist.get_rank()]).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
    return model, optimizer, scheduler


def fsdp2():
    """Both forms of Accelerate's, and one of torch alone."""
    from accelerate import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer

    PartialState(cpu=True)
    model, optimizer, scheduler = sharded(single)
    for form, name in (("SHARDED", "fsdp"), ("FULL", "fsdp-full")):
        out = str(GOLDEN / "accelerate-1.15" / name)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, state_dict_type=f"{form}_STATE_DICT"
        )
        save_fsdp_model(plugin, Ranks(), model, out)
        save_fsdp_optimizer(plugin, Ranks(), optimizer, model, out)
        if dist.get_rank() == 0:
            torch.save(scheduler.state_dict(), f"{out}/scheduler.bin")
    model, optimizer, _ = sharded(momentum)
    state = {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer),
        "epoch": 2,
    }
    dcp.save(state, checkpoint_id=GOLDEN / "dcp" / "fsdp2")


if __name__ == "__main__":
    if sys.argv[1] == "fsdp2":
        dist.init_process_group("gloo")
        fsdp2()
    else:
        prepared(str(GOLDEN / sys.argv[1]), not sys.argv[1].endswith("bin"))
