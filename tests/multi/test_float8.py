"""fp8: refused where it cannot be had; and emulated on CPU ranks, what it computes."""

import copy
import sys
from functools import cache

import pytest
import torch
from torch import nn

import accelx as ax
from accelx import testing
from accelx.engines import float8
from tests.laws import training as t

pytestmark = pytest.mark.multi
DRAW = torch.Generator().manual_seed(1)
SIZES = torch.linspace(0.1, 5, 8)[:, None]  # rows differ, so a common scale is seen
DATA = [(torch.randn(8, 32, generator=DRAW) * SIZES,) for _ in range(3)]


def net():
    """Two Linears that can be in 8 bits, and a head of odd size."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()),
        nn.Linear(32, 1),
    )


def loss(model, batch):
    return model(batch[0]).square().mean()


def optimizer(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def emulated(env, kind="ddp", n=1):
    """The trace of a run whose Linears round to 8 bits."""
    tx = ax.chain(ax.shard_model(env, kind), ax.accumulate(n), ax.clip(10.0))
    state = ax.init(tx, net, optimizer)
    float8.convert(state.model, emulate=True)
    step, trace = ax.step(tx, loss), []
    for batch in DATA:
        state, out = step(state, t.part(env, batch))
        here = t.weights(state.model)
        trace.append(t.Step(float(out.loss), float(out.norm), here))
    return trace


def by_torchao(recipe):
    """A plain loop over a model that torchao has converted; None for none."""
    from torchao import float8 as ao

    def make():
        if recipe is None:
            return net()
        config = ao.Float8LinearConfig.from_recipe_name(recipe)
        object.__setattr__(config, "emulate", True)
        wanted = lambda module, name: name != "4"  # noqa: E731
        return ao.convert_to_float8_training(
            net(), config=config, module_filter_fn=wanted
        )

    return t.by_hand(make, loss, optimizer, DATA, 10.0, lambda k: 1.0)


@cache
def gaps():
    """How far runs on two ranks lie from torchao in one process, by recipe, kind, n."""
    judges = {name: by_torchao(name) for name in (float8.RECIPE, "tensorwise")}
    cases = [(float8.RECIPE, kind, n) for kind in ("ddp", "fsdp2") for n in (1, 2)]

    def rank(env):
        found = {}
        for case in [*cases, ("tensorwise", "ddp", 2)]:
            float8.RECIPE = case[0]
            run = emulated(env, *case[1:])
            found[case] = t.apart(judges[case[0]], run, env.rank, env.world)
        return found

    return testing.run(2)(rank)()


def test_one_process_computes_what_torchao_does():
    """The Linears are the user's own, and the numbers those of torchao's."""
    run = emulated(ax.Env())
    assert t.apart(by_torchao(float8.RECIPE), run) == 0
    assert t.apart(by_torchao(None), run) > 1e-3  # the control: something is rounded


def test_ranks_and_microbatches_change_no_number():
    """Rows are scaled by themselves; with one scale for all rows they are not."""
    for rank in gaps():
        for (recipe, *_), gap in rank.items():
            if recipe == float8.RECIPE:
                assert gap < 1e-6
            else:  # the control
                assert gap > 1e-3


def test_objects_classes_and_names_stay():
    """L8; the slot says which Linears, and why not the others."""
    model = net()
    before = dict(model.named_modules())
    kinds = {n: type(m) for n, m in before.items()}
    names = list(model.state_dict())
    done = float8.convert(model, emulate=True)
    assert dict(model.named_modules()) == before
    assert {n: type(m) for n, m in before.items()} == kinds
    assert list(model.state_dict()) == names
    assert done.names == ("0", "2")
    assert done.left == {"4": "is (1, 32), which 16 does not divide"}
    whole = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    assert "is the last" in float8.convert(whole, emulate=True).left["1"]
    packed = ax.quantize("int8")(net().requires_grad_(False))
    with pytest.raises(ax.PrecisionError, match=r"0 has weights of torch\.int8"):
        float8.convert(packed)


def test_a_copy_computes_with_its_own_weights():
    """A deep copy is none of the original's."""
    model = net()
    float8.convert(model, emulate=True)
    other = copy.deepcopy(model)
    x = DATA[0][0]
    assert torch.equal(other(x), model(x))
    other[0].weight.data.zero_()
    assert not torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    ("kind", "capability", "amd", "why"),
    [
        ("cpu", (0, 0), "", 'is "cpu"'),
        ("mps", (0, 0), "", 'is "mps"'),
        ("cuda", (8, 0), "", "is of 8.0"),  # A100
        ("cuda", (8, 6), "", "is of 8.6"),
        ("cuda", (8, 9), "", None),
        ("cuda", (9, 0), "", None),  # H200
        ("cuda", (10, 0), "", None),
        ("cuda", (9, 0), "gfx90a:sramecc+:xnack-", "is gfx90a"),  # MI250
        ("cuda", (9, 4), "gfx942:sramecc+:xnack-", None),  # MI300
    ],
)
def test_which_devices_have_it(kind, capability, amd, why):
    """By what the hardware has, not by its name."""
    found = float8.lacking(kind, capability, amd)
    assert found is None if why is None else why in found


def test_it_is_refused_before_a_model_is_made():
    """On this device, in any order, by kind, and where layers are cut."""
    env, made = ax.Env(), []
    precise, shard = ax.with_precision("fp8"), ax.shard_model(env)
    for tx in (precise, ax.chain(precise, shard), ax.chain(shard, precise)):
        with pytest.raises(ax.PrecisionError, match='"cpu"; write with_precision'):
            ax.init(tx, lambda: made.append(1) or net())
    for thing in (net(), nn.Identity):  # a module, and a class that makes one
        with pytest.raises(ax.PrecisionError, match='"cpu"; write with_precision'):
            ax.init(precise, thing)
    with pytest.raises(ax.PrecisionError, match='got "deepspeed"; write'):
        ax.init(ax.chain(precise, ax.shard_model(env, "deepspeed")), net)
    with pytest.raises(ax.OrderError, match="multiplies whole"):
        ax.chain(precise, ax.shard_tensors(env))
    with pytest.raises(ax.PrecisionError, match='write with_precision\\("fp8"\\)'):
        ax.with_precision("float8")
    assert not made


def test_without_torchao_the_extra_is_named(monkeypatch):
    """Where the device has it, and the package is not installed."""
    monkeypatch.setattr(float8, "lacking", lambda *args: None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ax.MissingExtraError, match=r"accelx\[quant\]"):
        ax.init(ax.with_precision("fp8"), net)


def test_the_chain_converts_where_the_device_has_it(monkeypatch):
    """The way of a GPU, with an emulated product: autocast, fork and all."""
    whole = float8.convert
    monkeypatch.setattr(float8, "lacking", lambda *args: None)
    monkeypatch.setattr(float8, "convert", lambda model: whole(model, emulate=True))
    tx = ax.chain(ax.with_precision("fp8"), ax.shard_model(ax.Env()))
    state = ax.init(tx, net, optimizer)
    assert state.slots["with_precision"].names == ("0", "2")
    step = ax.step(tx, loss)
    forked, out = step(ax.fork(state), DATA[0])
    went, same = step(state, DATA[0])
    plain = ax.init(ax.with_precision("bf16"), net, optimizer)
    _, half = ax.step(ax.with_precision("bf16"), loss)(plain, DATA[0])
    assert float(out.loss) == float(same.loss)
    assert t.same(t.weights(forked.model), t.weights(went.model))
    assert 1e-4 < abs(float(out.loss) - float(half.loss)) / float(half.loss) < 0.2
