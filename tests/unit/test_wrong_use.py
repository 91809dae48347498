"""Wrong use says what was wanted, what came, and what to write instead."""

import re

import pytest
import torch
from torch import nn

import accelx as ax
from accelx import testing
from tests.laws import training as t

ENV = ax.Env()
SGD = torch.optim.SGD


def net():
    """A tiny model."""
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def sgd(model):
    """SGD over all of it."""
    return SGD(model.parameters(), 0.1)


def mean(model, batch):
    """A mean over rows."""
    return model(batch).square().mean()


def start(tx=ax.identity, model=net, optim=sgd):
    """A state."""
    return ax.init(tx, model, optim)


def take(loss, *args, tx=ax.identity):
    """One step."""
    return ax.step(tx, loss)(start(tx), *(args or (torch.ones(4, 2),)))


def placed_twice():
    """The same module in two states."""
    model = net()
    start(ax.shard_model(ENV), model)
    start(ax.shard_model(ENV), model)


def placed_plainly_twice():
    """The same module in two states that no pass placed."""
    model = net()
    start(model=model)
    start(model=model)


def spent():
    """A state used by two steps."""
    state = start()
    ax.step(ax.identity, mean)(state, torch.ones(4, 2))
    ax.step(ax.identity, mean)(state, torch.ones(4, 2))


def stale():
    """An optimizer over another model's weights."""
    other = net()
    start(optim=lambda m: sgd(other))


def half(model):
    """An optimizer of the first layer alone."""
    return SGD(model[0].parameters(), 0.1)


def twice(model):
    """Two optimizers of the same weights."""
    return [sgd(model), sgd(model)]


def wrapped(model):
    """A frozen rule of a user's own pass."""
    return ax.transform(
        "mine", before=model, rules=ax.Rules(excludes=("clip",), why="so")
    )


def keep(state, out):
    """An arrow that does nothing."""
    return state, out


CASES = {
    "an optimizer object": (
        lambda: start(optim=sgd(net())),
        ax.PlacementError,
        ["function", "a SGD object", "lambda m: SGD(m.parameters(), ...)"],
    ),
    "no optimizer": (
        lambda: start(optim=lambda m: m),
        ax.PlacementError,
        ["returned Sequential", "lambda m: AdamW(m.parameters()"],
    ),
    "an optimizer with a closure": (
        lambda: start(optim=lambda m: torch.optim.LBFGS(m.parameters())),
        ax.PlacementError,
        ["LBFGS", "closure", "AdamW"],
    ),
    "a stale optimizer": (
        stale,
        ax.PlacementError,
        ["4 parameters", "not of the placed model", "lambda m: AdamW(m.parameters())"],
    ),
    "weights that no optimizer moves": (
        lambda: start(optim=half),
        ax.UnusedParameterError,
        ["no optimizer moves 2", "1.weight, 1.bias", "requires_grad_(False)"],
    ),
    "weights that two optimizers move": (
        lambda: start(optim=twice),
        ax.PlacementError,
        ["0.weight", "two optimizers", "give each parameter to one"],
    ),
    "a spent state": (spent, ax.SpentStateError, ["step 0", "ax.fork(state)"]),
    "a wrong order": (
        lambda: ax.chain(ax.clip(1.0), ax.with_precision("fp16")),
        ax.OrderError,
        [
            "clip must come after loss_scale, because a scaled loss",
            "written: chain(clip(1.0), with_precision('fp16'))",
            "works:   chain(with_precision('fp16'), clip(1.0))",
        ],
    ),
    "the same twice": (
        lambda: ax.chain(ax.accumulate(2), ax.clip(1.0), ax.accumulate(3)),
        ax.OrderError,
        [
            "accumulate may stand in a chain only once, because",
            "works:   chain(accumulate(2), clip(1.0))",
        ],
    ),
    "passes that exclude each other": (
        lambda: ax.chain(ax.clip(1.0), wrapped(keep)),
        ax.OrderError,
        ["mine cannot be combined with clip, because so", "works:   clip(1.0)"],
    ),
    "no transform in a chain": (
        lambda: ax.chain(ax.clip(1.0), keep),
        TypeError,
        ["the function keep as argument 2", 'transform("name", before=function)'],
    ),
    "a factory in a chain": (
        lambda: ax.chain(ax.accumulate),
        TypeError,
        ["the function accumulate as argument 1", "accumulate(4)"],
    ),
    "a transform called that does nothing alone": (
        lambda: ax.clip(1.0)(net()),
        TypeError,
        ["clip(1.0) was called on a Sequential", "put it in a chain"],
    ),
    "an unknown precision": (
        lambda: ax.with_precision("fp4"),
        ax.PrecisionError,
        ["'fp32', 'bf16', 'fp16'", "got 'fp4'", 'with_precision("bf16")'],
    ),
    "an unknown kind": (
        lambda: ax.shard_model(ENV, "fsdp"),
        ax.PlacementError,
        ["'ddp', 'fsdp2'", "got 'fsdp'", "write 'fsdp2'"],
    ),
    "an unknown answer to unused": (
        lambda: ax.shard_model(ENV, unused="ignore"),
        ax.PlacementError,
        ["unused", "'error', 'allow'", "got 'ignore'", "write 'allow'"],
    ),
    "a module placed twice": (
        placed_twice,
        ax.PlacementError,
        ["this Sequential has been placed already", "new module", "ax.fork(state)"],
    ),
    "a module in two plain states": (
        placed_plainly_twice,
        ax.PlacementError,
        ["this Sequential has been placed already", "ax.fork(state)"],
    ),
    "a mesh of another size": (
        lambda: ax.connect(ENV, axes={"replicate": 2, "shard": 3}),
        ValueError,
        ["replicate=2", "shard=3", "1"],
    ),
    "a loss by row": (
        lambda: take(lambda m, x: m(x).square()),
        ax.LossError,
        ["scalar", "(4, 1)", "loss.mean()", "ax.Mean("],
    ),
    "a loss that is a number": (
        lambda: take(lambda m, x: mean(m, x).item()),
        ax.LossError,
        ["scalar tensor", "got float", "return loss"],
    ),
    "a loss that returns nothing": (
        lambda: take(lambda m, x: None),
        ax.LossError,
        ["got NoneType", "return loss"],
    ),
    "three things from a loss": (
        lambda: take(lambda m, x: (mean(m, x), 1, 2)),
        ax.LossError,
        ["(either, aux)", "got tuple"],
    ),
    "a Mean of rows": (
        lambda: take(lambda m, x: ax.Mean(m(x), 4)),
        ax.LossError,
        ["total of a Mean", "(4, 1)", "ax.Mean(losses.sum(), mask.sum())"],
    ),
    "a batch without a length": (
        lambda: take(lambda m, x: m.weight.sum(), {"n": 4}, tx=ax.accumulate(2)),
        ax.DataError,
        ["accumulate", "no tensor with a dimension", "leave accumulate out"],
    ),
    "tensors of two lengths": (
        lambda: take(mean, [torch.ones(4, 2), torch.ones(3)], tx=ax.accumulate(2)),
        ax.DataError,
        ["4 rows", "[0][1]", "(3,)", "close over it"],
    ),
    "aux that does not add up": (
        lambda: take(lambda m, x: (mean(m, x), {"lr": 0.1}), tx=ax.accumulate(2)),
        ax.LossError,
        ["aux['lr']", "float", "ax.Mean(total, weight)"],
    ),
    "a model on meta": (
        lambda: start(ax.shard_model(ENV), nn.Linear(2, 1, device="meta")),
        ax.PlacementError,
        ["meta device", "lambda: Linear(...)"],
    ),
    "a model on another device": (
        lambda: start(ax.shard_model(attr(device="cuda:1")), elsewhere()),
        ax.PlacementError,
        ["device is cuda:1", "weights on cuda:0", "leave it on the CPU"],
    ),
    "blocks that are none": (
        lambda: start(ax.shard_model(ENV, blocks="layer.*")),
        ValueError,
        ["blocks='layer.*' matches no module of Sequential", "'0'", "'layers.*'"],
    ),
    "no model": (
        lambda: start(ax.shard_model(ENV), 3),
        TypeError,
        ["torch.nn.Module or a function", "got int", "lambda: Net(...)"],
    ),
    "a function that makes no model": (
        lambda: start(ax.shard_model(ENV), lambda: "net"),
        TypeError,
        ["returned str", "lambda: Net(...)"],
    ),
    "ranks without a group": (
        lambda: start(ax.shard_model(ax.Env(world=2))),
        ax.PlacementError,
        ["2 ranks", "no process group", "connect()"],
    ),
    "no microbatch": (lambda: ax.accumulate(0), ValueError, ["at least 1", "got 0"]),
    "half a microbatch too many": (
        lambda: ax.accumulate(2.5),
        ValueError,
        ["whole", "got 2.5"],
    ),
    "a norm of zero": (lambda: ax.clip(0.0), ValueError, ["got 0.0", "clip(1.0)"]),
    "a norm of nan": (lambda: ax.clip(float("nan")), ValueError, ["got nan"]),
    "a limit below zero": (lambda: ax.clip_value(-1.0), ValueError, ["got -1.0"]),
    "a curve that ends before it starts": (
        lambda: ax.warmup_cosine(10, 5),
        ValueError,
        ["warmup=10", "total=5", "warmup_cosine(200, 10_000)"],
    ),
    "a pass with a name that is none": (
        lambda: ax.transform("my pass", before=keep),
        ValueError,
        ["identifier", "'my pass'", "transform('my_pass', ...)"],
    ),
    "a pass that does nothing": (
        lambda: ax.transform("mine"),
        ValueError,
        ["no function", "transform('mine', before=function)"],
    ),
    "a rule without a reason": (
        lambda: ax.Rules(after=("clip",), why=" "),
        ValueError,
        ["why", "write the reason"],
    ),
    "one optimizer of two": (
        lambda: start(optim=lambda m: [sgd(m[0]), sgd(m[1])]).optim,
        ValueError,
        ["2 optimizers", "state.optimizers[i]"],
    ),
    "a group that takes nothing": (
        lambda: ax.param_groups(net(), {"head.*": {}, "**": {}}),
        ValueError,
        ["['head.*'] take no parameter", "0.weight"],
    ),
    "a weight that no group takes": (
        lambda: ax.param_groups(net(), {"*.bias": {}}),
        ValueError,
        ["'0.weight'", '"**": {}'],
    ),
    "a criterion for a loss": (
        lambda: take(nn.MSELoss()),
        TypeError,
        ["ax.step wants loss(model, *batch)", "MSELoss", "criterion(model(batch[0])"],
    ),
    "no function for a loss": (
        lambda: ax.grads(ax.identity, 3),
        TypeError,
        ["ax.grads wants a function loss(model, *batch)", "got int", "def loss("],
    ),
    "an optimizer class": (
        lambda: start(optim=SGD),
        ax.PlacementError,
        ["got the class SGD", "lambda m: SGD(m.parameters(), lr=...)"],
    ),
    "a step without an optimizer": (
        lambda: ax.step(ax.identity, mean)(start(optim=None), torch.ones(4, 2)),
        ax.PlacementError,
        ["ax.step wants an optimizer", "lambda m: AdamW(", "ax.measure"],
    ),
    "a state of another chain": (
        lambda: ax.step(ax.with_schedule(abs), mean)(start(), torch.ones(4, 2)),
        ax.PlacementError,
        ["wants a slot 'with_schedule'", "no slots", "another chain", "the same tx"],
    ),
    "a rate below zero": (
        lambda: take(
            mean, tx=ax.with_schedule(lambda step: 1 - step if step else -0.5)
        ),
        ValueError,
        ["factor of at least 0", "got -0.5 for step 0", "max(0.0, ...)"],
    ),
    "a rate that is no number": (
        lambda: take(mean, tx=ax.with_schedule(lambda step: float("nan"))),
        ValueError,
        ["got nan for step 0"],
    ),
    "a part of a run to warm up in": (
        lambda: ax.warmup_cosine(0.1, 200),
        ValueError,
        ["counts updates", "warmup=0.1", "round(0.1 * 200)"],
    ),
    "rows for a measure": (
        lambda: ax.measure(ax.identity, lambda m, x: m(x))(start(), torch.ones(4, 2)),
        ax.LossError,
        ["scalars", "shape (4, 1)", "ax.Mean(", "ax.gather_rows"],
    ),
    "a text for a measure": (
        lambda: ax.measure(ax.identity, lambda m, x: "ok")(start(), torch.ones(4, 2)),
        ax.LossError,
        ["scalars", "got 'ok'"],
    ),
    "no seed": (lambda: ax.seed(ENV, None), ValueError, ["integer", "got None"]),
    "batches in place of a loader": (
        lambda: ax.feed(ax.identity, [torch.ones(4, 2)]),
        ax.DataError,
        ["batch size", "dataset list alone", "batch_size=None if each item"],
    ),
    "a generator in place of a loader": (
        lambda: ax.feed(ax.identity, iter([torch.ones(4, 2)])),
        ax.DataError,
        ["got the list_iterator alone", "IterableDataset"],
    ),
    "a batch cut over ranks that the model is not on": (
        lambda: take(mean, t.part(ax.Env(world=2), [torch.ones(4, 2)])[0]),
        ax.PlacementError,
        ["2 of 4 rows", "ranks would train apart", 'shard_model(env, "ddp")'],
    ),
}


def attr(**fields):
    """An Env with other fields."""
    return ax.Env(**fields)


def elsewhere():
    """A module that says that its weights are on a GPU, on a machine without one."""

    class Far(nn.Linear):
        def parameters(self, recurse=True):
            weight = nn.Parameter(torch.ones(1))
            return iter(
                [type("W", (), {"device": torch.device("cuda:0")})(), weight][:1]
            )

    return Far(2, 1)


@pytest.mark.parametrize("name", CASES)
def test_the_message_says_what_came_and_what_to_write(name):
    """Each part of the message is there, with the user's own values."""
    call, kind, words = CASES[name]
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    for word in words:
        assert word in text, text
    assert len(text) < 600


def test_errors_are_of_one_tree():
    """Whatever is raised on purpose is an AccelxError, or Python's own for its kind."""
    own = [kind for _, kind, _ in CASES.values() if kind not in (TypeError, ValueError)]
    assert all(issubclass(kind, ax.AccelxError) for kind in own)
    assert all(issubclass(kind, ValueError | RuntimeError) for kind in own)


def test_control_right_use_raises_nothing():
    """The helpers above make a state and a step where nothing is wrong."""
    _, out = take(mean, tx=ax.chain(ax.shard_model(ENV), ax.accumulate(2)))
    assert out.stepped


@pytest.mark.multi
def test_wrong_use_over_ranks():
    """Uneven trees, a mesh of the wrong size, and a mean that drifts, on all ranks."""

    def rank(env):
        found = {}
        cases = {
            "trees": (
                lambda: ax.reduce(env, [torch.ones(2)] * (1 + env.rank), "sum"),
                ax.CollectiveError,
            ),
            "axes": (
                lambda: start(ax.shard_model(env, "fsdp2", blocks="9")),
                ValueError,
            ),
            "scalar": (
                lambda: start(ax.shard_model(env, "fsdp2"), Scalar()),
                ax.PlacementError,
            ),
        }
        for name, (call, kind) in cases.items():
            with pytest.raises(kind) as error:
                call()
            found[name] = str(error.value)
        return found

    for found in testing.run(2)(rank)():
        assert "rank" in found["trees"]
        assert "matches no module" in found["axes"]
        assert re.search(r"but scale has none.*torch.zeros\(1\)", found["scalar"])


class Scalar(nn.Module):
    """A model with a weight that has no dimension."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale
