"""What an installation must be able to do, held to a closed form or to torch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelx import comm
from accelx.env_device import widest
from accelx.equivalences import trace
from accelx.equivalences.compare import Settings
from accelx.equivalences.report import Layout
from accelx.passes.load_state import load_state
from accelx.passes.save_state import save_state
from accelx.passes.shard_loader import shard_loader
from accelx.passes.shard_model import shard_model
from accelx.records import Env, Mean
from accelx.rng import seed
from accelx.rows import rows_of
from accelx.run import feed, init, step
from accelx.transform import chain

STEPS = 3
ITEMS, BATCH = 23, 5  # a short batch at the end
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def wanted(what: str, fine: bool, got: object) -> None:
    """Raise AssertionError where something is not so."""
    if not fine:
        raise AssertionError(f"wanted {what}, got {got}")


def collectives(env: Env) -> None:
    """Sums, means, largest values, rows and objects are those of a closed form."""
    w, r = env.world, env.rank
    mine = torch.full((3,), float(r + 1), device=env.device)
    total = comm.reduce(env, mine, "sum").tolist()
    wanted("the sum of ranks", total == [w * (w + 1) / 2] * 3, total)
    top = comm.reduce(env, {"x": mine}, "max")["x"].tolist()
    wanted("the largest", top == [float(w)] * 3, top)
    mean = comm.reduce(env, Mean(float(r), r + 1.0))
    share = (mean.total, mean.weight)
    wanted("a Mean that adds up", share == (w * (w - 1) / 2, w * (w + 1) / 2), share)
    rows = comm.gather(env, torch.arange(r + 1, device=env.device)).tolist()
    wanted("all ranks' rows", rows == [i for k in range(w) for i in range(k + 1)], rows)
    told = comm.broadcast(env, {"from": "rank 0"} if env.main else None)
    wanted("what rank 0 has", told == {"from": "rank 0"}, told)
    names = comm.gather_objects(env, f"rank {r}")
    wanted("each rank's object", names == [f"rank {k}" for k in range(w)], names)
    comm.barrier(env)


def _net() -> nn.Module:
    # its end is no view, which torch would warn of
    inner = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)
    return nn.Sequential(*inner, nn.Tanh())


def _optim(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), 1e-2)


def _loss(model: nn.Module, batch: Any) -> Mean:
    device = next(model.parameters()).device
    x, mask = (part.to(device) for part in batch)
    each = model(x).square().mean(-1) * mask
    return Mean(each.sum(), mask.sum())


def _build() -> tuple[Any, Any, Any, Any]:
    mask = (torch.rand(7, 3) < 0.5).float()
    mask[:, 0] = 1
    return _net, _optim, _loss, (torch.randn(7, 3, 6), mask)


def _equal(env: Env, kind: str, micro: int) -> None:
    dtype = widest(env.device)
    judged = trace.judge(Env(), _build, STEPS, dtype)
    tol = TOLERANCE[dtype]
    settings = Settings(STEPS, tol, dtype, None, None, 0.0)
    layout = Layout(env.world, kind, micro)
    found = trace.partings(env, layout, _build, judged, settings)
    far = trace.firsts(found, tol)
    wanted("the run of one process", not far, "; ".join(map(str, far)))


def loader(env: Env) -> None:
    """Every sample once over the ranks, in an order that goes on from any step."""
    data = TensorDataset(torch.arange(ITEMS))
    made = DataLoader(data, batch_size=BATCH, shuffle=True)
    tx = shard_loader(env, seed=3)

    def seen(start: int) -> list[list[int]]:
        batches = list[list[int]]()
        for (x,) in feed(tx, made, start):
            marked = rows_of(x)
            here = x[: marked.rows] if marked else x
            batches.append(comm.gather(env, here).tolist())
        return batches

    every = seen(0)
    flat = [i for batch in every for i in batch]
    wanted("each sample once", sorted(flat) == list(range(ITEMS)), flat)
    wanted("another order than the dataset's", flat != list(range(ITEMS)), flat)
    late = seen(2)
    wanted("the same batches from step 2", late == every[2:], late)


def checkpoints(env: Env) -> None:
    """What one placing saves another loads, to the bit, step and optimizer included."""
    made = tempfile.mkdtemp(prefix="accelx-test-") if env.main else None
    folder = comm.broadcast(env, made)
    try:
        _saved_and_loaded(env, folder)
        comm.barrier(env)  # before rank 0 removes it
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _saved_and_loaded(env: Env, folder: str) -> None:
    batch = _build()[3]

    def state(kind: str, number: int) -> tuple[Any, Any]:
        seed(env, number)
        tx = chain(shard_model(env, kind))
        return init(tx, _net, _optim), step(tx, _loss)

    first, update = state("ddp", 1)
    first, _ = update(first, batch)
    save_state(env, folder)(first)
    kind = "fsdp2" if env.world > 1 else "ddp"
    second = load_state(env, folder)(state(kind, 2)[0])
    wanted("step 1", second.step == 1, second.step)
    for (name, one), (_, other) in zip(first.trained, second.trained, strict=True):
        same = torch.equal(_whole(one), _whole(other))
        wanted(f"{name} as it was saved", same, "another")


def _whole(tensor: Any) -> Any:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


CHECKS: Mapping[str, Callable[[Env], None]] = {
    "collectives": collectives,
    "ddp equals one process": lambda env: _equal(env, "ddp", 1),
    "fsdp2 equals one process": lambda env: _equal(env, "fsdp2", 1),
    "microbatches equal one batch": lambda env: _equal(env, "ddp", 3),
    "loader": loader,
    "save and load": checkpoints,
}
