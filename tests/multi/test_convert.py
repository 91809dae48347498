"""What several ranks of other tools saved goes on under ddp and fsdp2."""

import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp as fsdp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import accelx as ax
from accelx import testing
from tests.importing import (
    GOLDEN,
    SAVED,
    batch,
    by_hand,
    halving,
    loss,
    make,
    momentum,
    single,
)
from tests.laws.training import part, quiet_views

pytestmark = [
    pytest.mark.multi,
    quiet_views,
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
    ),
]
FSDP = GOLDEN / "accelerate-1.15" / "fsdp"


def goes_on(env, source, out, kind, optim, schedule, only=None):
    """Import on rank 0, load on all; each loss."""
    if env.main:
        ax.import_state(str(source), str(out), make, optim, trust=True, step=SAVED)
    ax.barrier(env)
    passes = [ax.with_schedule(schedule)] if schedule else []
    load = ax.load_state(env, str(out), only=only)
    tx = ax.chain(ax.shard_model(env, kind, "inner"), *passes, load)
    state = ax.init(tx, make, optim)
    step, losses = ax.step(tx, loss), []
    for k in range(SAVED, SAVED + 4):
        state, out_ = step(state, part(env, (batch(k),))[0])
        losses.append(float(out_.loss))
    return losses


def judge(folders, optim, schedule):
    """torch alone: dcp.load into a model of one process, and its next losses."""
    model = make()
    optimizer = optim(model)
    by_hand(model, optimizer, None, 0, 1)  # so that there is state to load into
    optimizer.zero_grad()
    model_at, optim_at, key = folders
    saved = {"model": model.state_dict()}
    dcp.load(saved, checkpoint_id=model_at)
    held = {key: get_optimizer_state_dict(model, optimizer)}
    dcp.load(held, checkpoint_id=optim_at)
    model.load_state_dict(saved["model"])
    set_optimizer_state_dict(model, optimizer, held[key])
    scheduler = schedule(optimizer) if schedule else None
    if scheduler is not None:
        scheduler.load_state_dict(torch.load(FSDP / "scheduler.bin"))
        for group, rate in zip(
            optimizer.param_groups, scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = rate
    return by_hand(model, optimizer, scheduler, SAVED)


FSDP2 = GOLDEN / "dcp" / "fsdp2"
RUNS = {  # source, where torch finds model and optimizer, optimizer, schedule
    "dcp": (FSDP2, (FSDP2, FSDP2, "optim"), momentum, None),
    "accelerate": (
        FSDP,
        (FSDP / "pytorch_model_fsdp_0", FSDP / "optimizer_0", "optimizer"),
        single,
        halving,
    ),
}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", RUNS)
def test_what_two_ranks_of_fsdp2_saved_goes_on(tmp_path, name, kind):
    """Slices of two ranks give torch's own next losses, on two ranks of either kind."""
    source, folders, optim, schedule = RUNS[name]
    wanted = judge(folders, optim, schedule)
    run = testing.run(2)(goes_on)
    for losses in run(source, tmp_path / "all", kind, optim, schedule):
        assert losses == pytest.approx(wanted, abs=1e-5)
    control = run(source, tmp_path / "part", kind, optim, None, "model.**")
    assert control[0] != pytest.approx(wanted, abs=1e-5)


def sharded(env, folder):
    """Save slices of two ranks as safetensors; the weights in full."""
    model = make()
    fsdp.fully_shard(model.inner)
    state = model.inner.state_dict()
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(state, storage_writer=writer)
    return {name: tensor.full_tensor() for name, tensor in state.items()}


def test_slices_in_safetensors_are_put_together(tmp_path):
    """Two ranks' files make whole weights; without one of them they do not."""
    full = testing.run(2)(sharded)(tmp_path / "in")[0]
    inner = make().inner
    report = ax.import_state(str(tmp_path / "in"), str(tmp_path / "out"), inner)
    assert report.tensors == len(full)
    loaded = torch.nn.Linear(4, 4)
    ax.init(ax.load_state(ax.Env(), report.url, only="model.**"), loaded)
    assert all(torch.equal(t, full[n]) for n, t in loaded.state_dict().items())
    first, last = sorted((tmp_path / "in").glob("*.safetensors"))
    for file, said in ((last, "here"), (first, "cover")):
        shutil.move(file, tmp_path / "away")
        with pytest.raises(ax.CheckpointError, match=said):
            ax.import_state(str(tmp_path / "in"), str(tmp_path / "out"), inner)
        shutil.move(tmp_path / "away", file)
