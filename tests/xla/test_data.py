"""Batches, random numbers and checkpoints of runs on XLA."""

import random

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax
from accelx.rows import rows_of
from tests.laws import training as t

ROWS = torch.arange(88.0).reshape(22, 4).sin()


def loader(workers=0):
    """22 rows in batches of 8, the last one short."""
    data = TensorDataset(ROWS)
    return DataLoader(data, batch_size=8, shuffle=True, num_workers=workers)


def made():
    """A small model with dropout, the same on every call."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 4))


def loss(model, batch):
    """A mean over rows."""
    return model(batch[0]).square().mean()


def run(env, kind, stop, *passes, start=None, model=made):
    """A state after `stop` steps, with the losses on the way."""
    tx = ax.chain(ax.shard_loader(env, seed=2), ax.shard_model(env, kind), *passes)
    state = ax.init(tx, model, lambda m: torch.optim.AdamW(m.parameters(), 1e-2))
    step, losses = ax.step(tx, loss), []
    for batch in ax.feed(tx, loader(), start=state, stop=stop):
        state, out = step(state, batch)
        losses.append(float(out.loss))
    return state, losses


def everything(state):
    """Weights and moments, on the CPU."""
    from accelx.saves.memory import host

    found = {n: host(p) for n, p in state.model.named_parameters()}
    for n, p in state.model.named_parameters():
        held = state.optim.state[p].items()
        found |= {f"{n}.{k}": host(torch.as_tensor(v)) for k, v in held}
    return found


def without_dropout():
    """The same model, whose steps are those of the CPU."""
    model = made()
    model[2] = nn.Identity()
    return model


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_arrive_on_the_devices(env, workers):
    """In the order of the CPU, with their marks, rows divided over the devices."""
    from torch_xla.distributed import spmd

    from accelx._xla import devices, host

    there = list(ax.feed(ax.shard_loader(env, seed=2), loader(workers), stop=4))
    here = list(ax.feed(ax.shard_loader(ax.Env(), seed=2), loader(), stop=4))
    for (x,), (y,) in zip(there, here, strict=True):
        assert x.device.type == "xla"
        assert rows_of(x).total == len(y)
        assert torch.equal(host(x), y)
    if devices() > 1:
        shards = spmd.wrap_if_sharded(there[0][0]).local_shards
        assert [len(shard.data) for shard in shards] == [8 // devices()] * devices()


def test_seed_reaches_the_devices(env):
    """`ax.seed` starts their numbers; torch.manual_seed alone does not."""
    from accelx._xla import host

    def drawn(start):
        start(7)
        return host(torch.rand(5, device="xla"))

    first = drawn(lambda n: ax.seed(env, n))
    assert torch.equal(first, drawn(lambda n: ax.seed(env, n)))
    assert not torch.equal(first, drawn(torch.manual_seed))  # the control


def test_a_run_that_is_gone_on_with_is_the_one_that_was_not(env, tmp_path):
    """To the bit, dropout's numbers too (L6)."""
    ax.seed(env, 3)
    whole, losses = run(env, "xla", 6)
    ax.seed(env, 3)
    run(env, "xla", 3, ax.save_state(env, tmp_path, every=3))
    ax.seed(env, 99)
    resumed, rest = run(env, "xla", 6, ax.load_state(env, tmp_path))
    assert rest == losses[3:]
    assert t.same(everything(resumed), everything(whole))
    ax.seed(env, 99)
    _, other = run(env, "xla", 6)
    assert other[3:] != losses[3:]  # the control: other numbers are another run


@pytest.mark.parametrize("wait", [True, False])
def test_what_xla_saved_the_cpu_loads_and_back(env, tmp_path, wait):
    """Weights and moments to the bit, and the run goes on as that of the CPU (L5)."""
    cpu = ax.Env()
    there, _ = run(env, "xla", 3, model=without_dropout)
    there = saved(env, there, tmp_path / "a", wait)
    here, _ = run(
        cpu, "ddp", 3, ax.load_state(cpu, tmp_path / "a"), model=without_dropout
    )
    assert t.same(everything(here), everything(there))
    here = saved(cpu, here, tmp_path / "b", wait)
    back, _ = run(
        env, "xla", 3, ax.load_state(env, tmp_path / "b"), model=without_dropout
    )
    assert t.same(everything(back), everything(here))
    assert {p.device.type for p in back.model.parameters()} == {"xla"}
    goes_on = ax.load_state(env, tmp_path / "b")
    _, rest = run(env, "xla", 6, goes_on, model=without_dropout)
    _, judge = run(cpu, "ddp", 6, model=without_dropout)
    assert rest == pytest.approx(judge[3:], abs=1e-6)
    _, other = run(env, "xla", 6, model=lambda: made())
    assert other[3:] != pytest.approx(judge[3:], abs=1e-6)  # the control


def saved(env, state, folder, wait):
    """`state` after it has been saved, by a chain that saves each step."""
    from accelx.saves.saver import Saver

    saver = Saver(env, str(folder), wait=wait)
    saver.save(state, {}, wait)
    saver.background.join()
    return state


def test_saving_compiles_nothing(env, tmp_path, compilations):
    """Slices are put together in the host's memory; .cpu() is the control."""
    from accelx._xla import cut, devices

    state, _ = run(env, "xla", 2)
    cut(wait=True)
    before = compilations()
    saved(env, state, tmp_path, True)
    assert compilations() == before
    state.model[0].weight.detach().cpu()
    assert (compilations() > before) == (devices() > 1)


def test_weights_go_out_and_come_in(env, tmp_path):
    """`export` writes what lies on devices, and `load_weights` reads it onto them."""
    state, _ = run(env, "xla", 2)
    ax.export((env, state), tmp_path / "out")
    tx = ax.chain(ax.shard_model(env, "xla"), ax.load_weights(tmp_path / "out"))
    random.seed(5)

    def blank():
        with torch.device("meta"):
            return made()

    fresh = ax.init(tx, blank)
    kept = everything(state)
    from accelx._xla import host

    for name, p in fresh.model.named_parameters():
        assert torch.equal(host(p), kept[name])
    assert not torch.equal(made()[0].weight, kept["0.weight"])  # the control
