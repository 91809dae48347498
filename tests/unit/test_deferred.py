"""A model built without holding all of it has the numbers of calling the function."""

import gc

import numpy as np
import pytest
import torch
from torch import nn

from accelx import deferred, testing
from accelx.deferred import build
from tests.laws import training as t

BUDGET = 4096  # bytes: less than most models here


class Odd(nn.Module):
    """Every way to fill a weight that this file's author could think of."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(9, 9) for _ in range(4)])
        first, second, third, fourth = (layer.weight for layer in self.layers)
        nn.init.trunc_normal_(first, std=0.02, a=-0.01, b=0.01)
        nn.init.orthogonal_(second)
        nn.init.kaiming_normal_(third)
        self.sparse = nn.Parameter(torch.empty(8, 8))
        nn.init.sparse_(self.sparse, 0.5)
        self.dirac = nn.Parameter(nn.init.dirac_(torch.empty(4, 4, 3)))
        with torch.no_grad():
            fourth.copy_(first + second.T)  # of two others
            fourth[2:4].mul_(torch.tensor(3.0))  # in part, in place
            fourth.view(-1)[5:9] = 7.0  # through a view
            third.data.add_(third.data.flip(0))  # of itself
        self.tie = first
        self.scaled = nn.Parameter(torch.randn(5) * 0.1 + torch.arange(5))
        self.swapped = nn.Parameter(torch.randn(6, 2).T.contiguous())
        self.narrow = nn.Parameter(torch.randn(6).to(torch.float16))
        self.whole = nn.Parameter(torch.randint(9, (4,)), requires_grad=False)
        self.kept = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.numpy = nn.Parameter(torch.from_numpy(torch.ones(3).numpy() * 2))
        self.register_buffer("rope", 1.0 / 1e4 ** (torch.arange(0, 8, 2).float() / 8))
        self.register_buffer("mask", torch.tril(torch.ones(5, 5)).bool(), False)
        self.register_buffer("perm", torch.randperm(7))
        self.rates = [x.item() for x in torch.linspace(0, 1, 4)]
        self.layers[0].bias.data = torch.randn(9)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))


def manual_seed_inside():
    """A function that seeds in the middle."""
    one = nn.Linear(5, 5)
    torch.manual_seed(11)
    return nn.Sequential(one, nn.Linear(5, 5))


def forked_inside():
    """A function that forks the generator, and one that has its own."""
    with torch.random.fork_rng(devices=[]):
        one = nn.Linear(5, 5)
    two = nn.Linear(5, 5)
    with torch.no_grad():
        two.weight.normal_(generator=torch.Generator().manual_seed(3))
    return nn.Sequential(one, two)


FACTORIES = {
    "odd": Odd,
    "net": lambda: t.Net(),
    "seeded": manual_seed_inside,
    "forked": forked_inside,
    "layers": lambda: nn.Sequential(
        nn.MultiheadAttention(8, 2),
        nn.Conv2d(2, 3, 3),
        nn.LSTM(3, 4),
        nn.BatchNorm1d(4),
        nn.TransformerEncoderLayer(8, 2),
        nn.Embedding(10, 7, padding_idx=2),
    ),
}


def tensors(model):
    """Every weight and buffer under each of its names."""
    params = model.named_parameters(remove_duplicate=False)
    return dict([*params, *model.named_buffers(remove_duplicate=False)])


@pytest.mark.parametrize("budget", [1, BUDGET, deferred.BUDGET])
@pytest.mark.parametrize("name", FACTORIES)
def test_numbers_are_those_of_calling_the_function(name, budget):
    """To the bit, in any order, and the generator is left where calling leaves it."""
    make = FACTORIES[name]
    torch.manual_seed(7)
    wanted, after = tensors(make()), torch.get_rng_state()
    torch.manual_seed(7)
    model, recorder = build(make, budget)
    assert torch.equal(torch.get_rng_state(), after)
    found = tensors(model)
    assert found.keys() == wanted.keys()
    for key in reversed(found):
        full = recorder.full(found[key])
        assert torch.equal(full, wanted[key]), key
        assert full.dtype == wanted[key].dtype
    assert torch.equal(torch.get_rng_state(), after)


def test_plain_attributes_are_computed_for_real():
    """What the function reads from a tensor is there at once."""
    model, _ = build(Odd, 1)
    assert model.rates == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert model.tie is model.layers[0].weight


READS = {
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy().tolist(),
    "array": lambda x: np.asarray(x).tolist(),
    "item": lambda x: x[0].item(),
    "iteration": lambda x: [float(y) for y in x],
    "writing": lambda x: x.numpy().fill(3.0),
}


@pytest.mark.parametrize("read", READS)
def test_weights_are_read_by_whatever_means(read):
    """Data that was let go is there for NumPy, lists, and who writes past torch."""
    found = []

    def make():
        first = torch.randn(50)
        later = nn.Linear(50, 50)
        found.append(READS[read](first))
        more = nn.Linear(50, 50)
        found.append(first.tolist())
        return nn.Sequential(later, more, nn.ParameterList([first, first * 2]))

    torch.manual_seed(0)
    wanted = tensors(make())
    torch.manual_seed(0)
    model, recorder = build(make, 1)
    assert found[:2] == found[2:]
    for key, value in tensors(model).items():
        assert torch.equal(recorder.full(value), wanted[key]), key


def held(recorder):
    """Bytes of weights that are in memory."""
    return sum(s.nbytes() for s in recorder._storages.values())


def test_memory_stays_within_the_budget_and_the_largest_weight():
    """While building, afterwards, and while each weight is made again."""
    largest = 30 * 30 * 4
    high = []

    class Watched(deferred.Recorder):
        def __torch_dispatch__(self, *args, **kwargs):
            out = super().__torch_dispatch__(*args, **kwargs)
            high.append(held(self))
            return out

    watched = Watched(BUDGET)
    with watched:
        model = nn.Sequential(*[nn.Linear(30, 30) for _ in range(40)])
    total = sum(p.numel() * 4 for p in model.parameters())
    assert total > 15 * (BUDGET + largest)
    assert max(high) <= BUDGET + 2 * largest
    assert held(watched) <= BUDGET
    for p in model.parameters():
        watched.full(p)
        assert held(watched) <= BUDGET


def test_control_a_large_budget_holds_everything():
    """The measure sees weights that are kept."""
    model, recorder = build(lambda: nn.Linear(100, 100))
    assert held(recorder) >= 100 * 100 * 4
    assert torch.equal(recorder.full(model.weight), model.weight)


@pytest.mark.multi
def test_fsdp2_from_a_function_never_holds_the_whole_model(monkeypatch):
    """Each rank has its slices, and on the way little more than the budget."""
    monkeypatch.setattr(deferred, "BUDGET", BUDGET)
    monkeypatch.setattr(build, "__defaults__", (BUDGET,))
    size, depth = 256, 24

    def make():
        torch.manual_seed(5)
        return nn.Sequential(*[nn.Linear(size, size) for _ in range(depth)])

    def resident():
        kept, kinds = {}, {torch.Tensor, nn.Parameter}
        for x in gc.get_objects():
            dense = type(x) in kinds and x.layout is torch.strided
            if dense and x.device.type == "cpu":
                storage = x.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
        return sum(kept.values())

    def rank(env):
        import accelx as ax
        from accelx.engines import fsdp

        before, calls, high = resident(), [], []
        slow = fsdp._made

        def watching(*args):
            calls.append(out := slow(*args))
            if len(calls) in (3, depth, 2 * depth):  # looking takes a while
                high.append(resident() - before)
            return out

        monkeypatch.setattr(fsdp, "_made", watching)
        state = ax.init(ax.shard_model(env, "fsdp2", blocks="*"), make)
        mine = sum(t.local(p).numel() * 4 for p in state.model.parameters())
        wanted = [p.detach() for p in make().parameters()]
        assert len(high) == 3
        found = [t.whole(p) for p in state.model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        return mine, max(high)

    weight = size * size * 4
    total = depth * (weight + size * 4)
    for mine, high in testing.run(4)(rank)():
        assert mine == total / 4
        states = 2 * depth * 5056  # of the generator, before each weight
        assert high <= mine + BUDGET + 2 * weight + states
        assert high < total / 2
