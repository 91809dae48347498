"""One process on a GPU trains as one process on the CPU does."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax


def network():
    """A small regression network, the same on every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def data(rows=40):
    """A small regression problem, the same on every call."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 8, generator=draw)
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


def loss(model, batch):
    """Mean squared error."""
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


def train(env, *passes, steps=6, lr=0.1):
    """Parameters (on the CPU) and reports after some steps of plain SGD."""
    tx = ax.chain(ax.shard_loader(env, seed=0), ax.shard_model(env), *passes)
    state = ax.init(tx, network, lambda m: torch.optim.SGD(m.parameters(), lr))
    step, outs = ax.step(tx, loss), []
    for batch in ax.feed(tx, DataLoader(data(), batch_size=8), stop=steps):
        state, out = step(state, batch)
        outs.append(out)
    flat = [p.detach().float().cpu().flatten() for p in state.model.parameters()]
    return torch.cat(flat), outs


def test_connect_takes_the_gpu(env):
    """With a GPU on the machine, one process gets it and opens no group."""
    assert env.device == "cuda:0"
    assert not torch.distributed.is_initialized()


def test_a_run_on_the_gpu_is_the_run_on_the_cpu(env):
    """Same samples, same updates, up to the rounding of another processor."""
    there, _ = train(env)
    here, _ = train(ax.Env())
    other, _ = train(ax.Env(), lr=0.11)
    torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-4)
    assert (there - other).abs().max() > 1e-3  # the control: another run is told apart


def test_batches_arrive_on_the_gpu(env):
    """`feed` moves what the loader gives to the rank's device."""
    tx = ax.shard_loader(env, seed=0)
    x, y = next(iter(ax.feed(tx, DataLoader(data(), batch_size=8))))
    assert (x.device, y.device) == (torch.device("cuda:0"),) * 2


def test_accumulating_on_the_gpu_changes_no_number(env):
    """Microbatches give the whole batch's parameters."""
    whole, _ = train(env)
    cut, _ = train(env, ax.accumulate(3))
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_low_precision_trains_near_full_precision(env, kind):
    """Autocast on the GPU moves the parameters, by little more than its rounding."""
    full, _ = train(env)
    low, outs = train(env, ax.with_precision(kind))
    gap = (low - full).abs().max()
    assert 0 < gap < 0.05  # zero would mean that nothing was cast
    assert all(torch.isfinite(torch.as_tensor(out.loss)) for out in outs)


def test_the_norm_before_clipping_is_that_of_the_cpu(env):
    """`Out.norm` is the true norm, on the device, whatever the limit."""
    _, there = train(env, ax.clip(0.01))
    _, here = train(ax.Env(), ax.clip(0.01))
    assert there[0].norm.device.type == "cuda"
    torch.testing.assert_close(there[0].norm.cpu(), here[0].norm, rtol=1e-4, atol=0)
