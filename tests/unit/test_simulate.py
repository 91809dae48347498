"""What a simulated rank holds and sends, against closed forms and a real run."""

from functools import cache

import pytest
import torch
import torch._dynamo  # optimizers import it when first made: here, not in each rank
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
from torch import nn

import accelx as ax
from accelx import _torch_simulate
from accelx.simulate import simulate
from accelx.testing import run
from tests.laws import training as t

# torch says it where shapes are taken of tensors that have a gradient
quiet_shapes = pytest.mark.filterwarnings("ignore:The .grad attribute of:UserWarning")
pytestmark = [t.quiet_views, quiet_shapes]
WIDTH, DEEP, ROWS = 64, 3, 4
EACH = 8 * WIDTH * WIDTH  # numbers of a block
FLOAT = 4


class Block(nn.Module):
    """Two Linears with nothing else to hold."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def made():
    return nn.Sequential(*(Block() for _ in range(DEEP)))


def loss(model, x):
    return model(x).square().mean()


def adam(model):
    return torch.optim.AdamW(model.parameters(), 1e-3)


def chains(kind, tensor=False, **options):
    def chained(env):
        place = ax.shard_model(env, kind, blocks="*", **options)
        plan = {"*.up": "column", "*.down": "row"}
        return ax.chain(place, ax.shard_tensors(env, plan)) if tensor else place

    return chained


CASES = {  # name: (chain, world, axes)
    "fsdp2": (chains("fsdp2"), 64, None),
    "hsdp": (chains("hsdp"), 64, "replicate=4,shard=16"),
    "tensor": (chains("ddp", tensor=True), 8, "tensor=8"),
    "both": (chains("fsdp2", tensor=True), 64, "shard=8,tensor=8"),
    "ddp": (chains("ddp"), 64, None),
    "half": (chains("ddp", hook="bf16"), 64, None),
}


def alone(env):
    """Every case, simulated in a process that has no group of its own."""
    rows = torch.zeros(ROWS, WIDTH)
    return {
        name: simulate(chained, made, adam, loss, rows, world=world, axes=axes)
        for name, (chained, world, axes) in CASES.items()
    }


@cache
def found():
    """A group of one process is none."""
    return run(1)(alone)()[0]


def test_weights_and_what_is_sent_follow_closed_forms():
    """Slices of a world's size; a gather of all twice, a reduction, sums of a layer."""
    plans = found()
    count = DEEP * EACH
    for name, plan in plans.items():
        slices = {"hsdp": 16, "ddp": 1, "half": 1}.get(name, plan.world)
        assert plan.parameters == count
        assert plan.weights == plan.gradients == count * FLOAT // slices
        assert 2 * plan.weights <= plan.optimizer < 2 * plan.weights + 1000
    whole = count * FLOAT
    assert plans["fsdp2"].sent == {
        "gathered": 2 * whole * 63 // 64,
        "reduced, in slices": whole * 63 // 64,
    }
    assert plans["hsdp"].sent == {
        "gathered": 2 * whole * 15 // 16,
        "reduced, in slices": whole * 15 // 16,
        "reduced": 2 * (whole // 16) * 3 // 4,
    }
    sums = (2 * DEEP - 1) * 2 * (ROWS * WIDTH * FLOAT) * 7 // 8  # not to the input
    assert plans["tensor"].sent == {"reduced": sums}
    inside = whole // 8  # what eight ranks hold together of a rank's layers
    assert plans["both"].sent == {
        "gathered": 2 * inside * 7 // 8,
        "reduced, in slices": inside * 7 // 8,
        "reduced": sums,
    }
    assert plans["ddp"].sent == {"reduced": 2 * whole * 63 // 64}
    assert plans["half"].sent == {"reduced": whole * 63 // 64}
    assert "rank 0 of 64" in str(plans["both"])


def real(env):
    """What a real rank holds after a step, and what one forward pass keeps."""
    env = ax.connect(env)
    tx = chains("fsdp2")(env)
    state = ax.init(tx, made, adam)
    state, _ = ax.step(tx, loss)(state, torch.zeros(ROWS, WIDTH))
    weights = sum(p.to_local().nbytes for p in state.model.parameters())
    moments = [m for s in state.optim.state.values() for m in s.values()]
    own = [m.to_local() if hasattr(m, "to_local") else m for m in moments]
    return weights, sum(m.nbytes for m in own)


def copies(env):
    """The same of ddp; and what its buckets take, but for the loss that travels too."""
    env, sizes = ax.connect(env), []
    tx = chains("ddp")(env)
    state = ax.init(tx, made, adam)

    def reduce(_, bucket):
        sizes.append(bucket.buffer().nbytes)
        work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0] / env.world)

    state.slots["shard_model"].handle.ddp.register_comm_hook(None, reduce)
    state, _ = ax.step(tx, loss)(state, torch.zeros(ROWS, WIDTH))
    weights = sum(p.nbytes for p in state.model.parameters())
    moments = [m.nbytes for s in state.optim.state.values() for m in s.values()]
    return weights, sum(moments), sum(sizes) - FLOAT


def two(env, kind):
    rows = torch.zeros(ROWS, WIDTH)
    plan = simulate(chains(kind), made, adam, loss, rows, world=2, rank=1)
    sent = (plan.sent["reduced"],) if kind == "ddp" else ()
    return plan.weights, plan.optimizer, *sent


def test_a_real_rank_holds_what_the_simulated_one_does():
    """Weights and moments to the byte, on two ranks over gloo; of ddp, what is sent."""
    assert run(2)(real)() == run(1)(two)("fsdp2") * 2
    assert run(2)(copies)() == run(1)(two)("ddp") * 2


def test_activations_are_what_autograd_keeps():
    """The judge counts what the hand-written forward pass saves for its backward."""
    model, kept = made(), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model, torch.zeros(ROWS, WIDTH))
    wanted = sum(size for at, size in kept.items() if at not in own)
    plans = found()
    assert plans["fsdp2"].activations == plans["ddp"].activations == wanted
    assert plans["tensor"].activations < wanted


def opened(env):
    with pytest.raises(ax.PlacementError, match="a process of its own"):
        simulate(chains("fsdp2"), made, adam, loss, torch.zeros(1, WIDTH), world=8)


def unplaced(env):
    return ax.identity


def apart(env):
    return ax.chain(ax.shard_model(env), ax.with_local_sgd(env, 2))


REFUSED = {  # words of the error: (chain, axes)
    "got no shard_model": (unplaced, None),
    "got 'deepspeed'": (chains("deepspeed", stage=3), None),
    "XLA wants one process": (chains("xla"), None),
    "got with_local_sgd": (apart, None),
    "got hook='powersgd'": (chains("ddp", hook="powersgd"), None),
    "got ranks that share rows": (chains("ddp"), "data=4,sequence=2"),
}


def refused(env):
    for words, (chained, axes) in REFUSED.items():
        with pytest.raises(ax.PlacementError, match=words):
            simulate(
                *(chained, made, adam, loss, torch.zeros(1, WIDTH)), world=8, axes=axes
            )
    rows = torch.zeros(1, WIDTH)
    with pytest.raises(ax.PlacementError, match="asks for a number"):
        simulate(chains("fsdp2"), made, adam, looking, rows, world=8)
    return torch.distributed.is_initialized()


def looking(model, x):
    return loss(model, x) * float(x.sum())


def test_what_nothing_would_answer_is_refused():
    """And the group that was opened for it is closed again."""
    assert run(1)(refused)() == [False]


def test_an_open_group_is_left_alone():
    """It would be taken for the simulated one."""
    run(2)(opened)()


def test_a_torch_whose_collectives_want_numbers_is_refused(monkeypatch):
    """Before a group is opened."""
    monkeypatch.setattr("accelx._torch_simulate.knows_shapes", lambda: False)
    with pytest.raises(ax.AccelxError, match=r"got 2\.\d+.*pip install -U torch"):
        simulate(chains("fsdp2"), made, adam, loss, torch.ones(1, WIDTH), world=2)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("length", [0, 1, 5, 7, 12, 13])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_a_shape_are_made_once_and_are_torchs_own(length, dim):
    """As many, of the same shapes and strides as torch cuts; two tensors at most."""
    size = [3, 4]
    size[dim] = length
    wanted = torch.chunk(torch.zeros(size), 5, dim)
    with _torch_simulate.numberless():
        empty = torch.zeros(size)
    with _torch_simulate.alike():
        found = torch.chunk(empty, 5, dim)
        apart = torch.chunk(torch.zeros(8), 4)
    assert [(x.shape, x.stride()) for x in found] == [
        (x.shape, x.stride()) for x in wanted
    ]
    if length:
        assert len(set(map(id, found))) == len({x.shape for x in wanted})
    assert len(set(map(id, apart))) == 4  # with numbers in them
    assert len(set(map(id, torch.chunk(empty, 5, dim)))) == len(found)  # as before
