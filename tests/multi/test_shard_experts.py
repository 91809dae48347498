"""Experts on ranks of their own make the run of one process."""

import tempfile
from functools import cache

import pytest
import torch
import torch._dynamo  # optimizers import it when first made: here, not in each rank
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
import transformers
from torch import nn
from torch.nn import functional as F

import accelx as ax
from accelx.env_part import rows_env
from accelx.testing import run
from tests.laws import training as t

pytestmark = [
    pytest.mark.multi,
    t.quiet_views,
    pytest.mark.filterwarnings("ignore:While redistributing:UserWarning"),
]
ENV = ax.Env()
WIDTH, COUNT, TOKENS = 6, 4, 11


class Experts(nn.Module):
    """One expert a row, each with a weight and a bias."""

    def __init__(self, count=COUNT):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, WIDTH, WIDTH) / 2)
        self.bias = nn.Parameter(torch.randn(count, WIDTH) / 2)

    def forward(self, tokens, index, weights):
        each = torch.einsum("tw,tkwv->tkv", tokens, self.weight[index])
        return (torch.tanh(each + self.bias[index]) * weights[..., None]).sum(1)


class Choosing(Experts):
    """Leaves out what counts little."""

    def forward(self, tokens, index, weights):
        return super().forward(tokens, index, weights * (weights > 0.3))


class Block(nn.Module):
    """A router, and the experts that it chooses two of."""

    def __init__(self):
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, COUNT)
        self.experts = Experts()

    def forward(self, x):
        flat = self.norm(x).flatten(0, -2)
        weights, index = self.router(flat).softmax(-1).topk(2)
        return x + self.experts(flat, index, weights).view_as(x)


class Net(nn.Module):
    """Two blocks, and a head that is the table."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def made():
    torch.manual_seed(3)
    return Net().double()


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=TOKENS + 1,  # which two ranks divide
        max_position_embeddings=16,
    )
    config._experts_implementation = "eager"  # the other has no float64
    return transformers.MixtralForCausalLM(config).double()


def logits(model, batch):
    found = model(input_ids=batch[0]).logits
    each = F.cross_entropy(
        found.flatten(0, 1), batch[0].roll(-1, 1).flatten(), reduction="none"
    )
    return ax.Mean((each * batch[1].flatten()).sum(), batch[1].sum())


def adam(model):
    return torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-6)


def train(env, tx, model, loss, optim, split=t.even):
    """The trace of a run; weights are joined from all ranks."""
    state, trace = ax.init(tx, model, optim), []
    step = ax.step(tx, loss)
    for batch in t.batches():
        state, out = step(state, t.part(rows_env(env), batch, split))
        named = state.model.named_parameters(remove_duplicate=False)
        weights = {n: t.whole(p).clone() for n, p in named}
        trace.append(t.Step(float(out.loss), float(out.norm), weights))
    return trace


CASES = {  # name: (kind, microbatches, given, split)
    "ddp": ("ddp", 2, "module", t.even),
    "ddp-function": ("ddp", 1, "function", t.lopsided),
    "fsdp2": ("fsdp2", 1, "module", t.lopsided),
    "fsdp2-function": ("fsdp2", 3, "function", t.even),
}


BOTH = "expert=2,tensor=2"
PLAN = {"layers.*.router": "column_gather"}


def chained(env, kind, n, experts="layers.*.experts", plan=PLAN):
    plan = "auto" if experts == "auto" else plan
    cut = "tensor" in [axis.name for axis in env.axes]
    return ax.chain(
        ax.shard_experts(env, experts),
        ax.shard_tensors(env, plan) if cut else ax.identity,
        ax.shard_model(env, kind, blocks="layers.*" if experts != "auto" else None),
        ax.accumulate(n),
        ax.clip(t.LIMIT),
        ax.with_schedule(t.curve),
    )


@cache
def judges():
    """The runs of one process, by hand."""
    mixed = t.by_hand(made, t.masked, t.grouped, t.batches())
    return mixed, t.by_hand(mixtral, logits, adam, t.batches())


def gaps(env, axes, *left):
    """How far each case that is not `left` out lies from the run of one process."""
    env, found = ax.connect(env, axes=axes), {}
    judge, whole = judges()
    for name, (kind, n, given, split) in CASES.items():
        if name in left:
            continue
        tx = chained(env, kind, n)
        model = made if given == "function" else made()
        found[name] = t.apart(judge, train(env, tx, model, t.masked, t.grouped, split))
    tx = chained(env, "fsdp2", 1, "auto")
    found["mixtral"] = t.apart(whole, train(env, tx, mixtral, logits, adam))
    return found


def held(env, axes):
    """How many experts this rank holds, and the size of its slices."""
    env = ax.connect(env, axes=axes)
    state = ax.init(chained(env, "fsdp2", 1), made, t.grouped)
    weight = state.model.layers[0].experts.weight
    same = isinstance(state.model.layers[0].experts, Experts)
    return tuple(weight.shape), t.local(weight).numel(), same


def kept(env, folder, axes):
    """The gaps of a step from what others saved, of a fork and of a measure.

    Of three tokens a row, so that two ranks with the same rows cannot halve them.
    """
    env, data = ax.connect(env, axes=axes), [[x[:, :3] for x in b] for b in t.batches()]
    parts = [t.part(rows_env(env), batch) for batch in data]
    tx = chained(env, "fsdp2", 1)
    alone = ax.chain(ax.clip(t.LIMIT), ax.with_schedule(t.curve))
    state, step = ax.init(tx, made, t.grouped), ax.step(tx, t.masked)
    state, _ = step(state, parts[0])
    ax.save_state(env, f"{folder}/dealt")(state)
    forked, _ = step(ax.fork(state), parts[1])
    state, out = step(state, parts[1])
    ax.barrier(env)
    loading = ax.chain(alone, ax.load_state(ENV, f"{folder}/dealt"))
    one = ax.init(loading, made(), t.grouped)
    one, single = ax.step(loading, t.masked)(one, data[1])
    mean = ax.reduce(env, ax.measure(tx, t.masked)(state, parts[2]))
    exact = ax.measure(loading, t.masked)(one, data[2])
    if env.main:
        ax.save_state(ENV, f"{folder}/single")(one)
    ax.barrier(env)
    back = ax.init(
        ax.chain(tx, ax.load_state(env, f"{folder}/single")), made(), t.grouped
    )

    def gap(one, two):
        pairs = zip(one.model.parameters(), two.model.parameters(), strict=True)
        return max(float((t.whole(a) - t.whole(b)).abs().max()) for a, b in pairs)

    return {
        "fork": gap(state, forked),
        "loss": abs(float(out.loss) - float(single.loss)),
        "norm": abs(float(out.norm) - float(single.norm)),
        "back": gap(back, one),
        "measure": abs(float(mean.value) - float(exact.value)),
    }


def refused(env):
    """The errors of what does not go together."""
    env = ax.connect(env, axes="expert=2")
    said = []
    for place, experts in (
        (ax.shard_model(env), "layers.*.router"),
        (ax.shard_model(env), "auto"),
        (ax.shard_model(env, hook="bf16"), "layers.*.experts"),
    ):
        with pytest.raises(ax.PlacementError) as caught:
            ax.init(ax.chain(place, ax.shard_experts(env, experts)), made(), adam)
        said.append(str(caught.value))
    tx = ax.chain(ax.shard_model(env), ax.shard_experts(env, Experts))
    with pytest.raises(ax.PlacementError) as caught:
        ax.init(tx, nn.Sequential(Experts(3)), adam)
    said.append(str(caught.value))
    model = made()
    model.layers[0].experts.__class__ = Choosing
    with pytest.raises(ax.PlacementError) as caught:
        train(env, tx, model, t.masked, t.grouped)
    return [*said, str(caught.value)]


def on_two(env, folder):
    return gaps(env, "expert=2"), kept(env, folder, "expert=2"), refused(env)


def test_two_ranks_hold_two_experts_each():
    """Every loss, norm and weight after every step; saves, forks, measures."""
    judges()  # before the fork
    for found, saved, said in run(2, timeout=150)(on_two)(tempfile.mkdtemp()):
        assert found.pop("mixtral") < 2e-6  # its router computes in float32
        assert max(found.values()) < 1e-10, found
        assert max(saved.values()) < 1e-10, saved
        words = [
            "forward(tokens, index, weights)",
            "has none",
            "hook=",
            "deals the 3 experts",
            "something else of weights",
        ]
        assert [w in s for w, s in zip(words, said, strict=True)] == [True] * 5, said


def stepped(env, turned=False, plan=PLAN):
    """What a first step says of tokens that ranks with the same rows turn, or not."""
    env = ax.connect(env, axes=BOTH)
    tx, model = chained(env, "ddp", 1, plan=plan), made()

    def behind(module, args, out):
        return out.roll(env.rank % 2, -1) if turned else None

    model.embed.register_forward_hook(behind)
    with pytest.raises(ax.PlacementError) as caught:
        train(env, tx, model, t.masked, t.grouped)
    return str(caught.value)


def shared(env):
    """What is said of tokens that differ, and, as a control, of a gradient's shares.

    And of tokens that do not differ, and of slices over more neighbours than have the
    same experts.
    """
    own = PLAN | {"layers.*.experts": "partial"}
    said = [stepped(env, turned=True), stepped(env, plan=own)]
    with pytest.MonkeyPatch.context() as patch:
        name = "accelx.engines.experts_tokens.share"
        patch.setattr(name, lambda near, x: x.tensor_split(near.world)[near.rank])
        said.append(stepped(env))
    env = ax.connect(env, axes="data=2,expert=2")
    place = ax.shard_model(env, "fsdp2", reshard_after_forward=4)
    with pytest.raises(ax.PlacementError) as caught:
        ax.init(ax.chain(place, ax.shard_experts(env, Experts)), made(), adam)
    return [*said, str(caught.value)]


def on_four(env, folder):
    axes, beside = "data=2,expert=2", (BOTH, "ddp-function", "fsdp2")
    found = gaps(env, axes), gaps(env, *beside)
    saved = kept(env, f"{folder}/data", axes), kept(env, f"{folder}/tensor", BOTH)
    held_by = held(env, "data=-1,expert=2"), held(env, BOTH)
    return found, saved, held_by, shared(env)


def test_four_ranks_hold_each_expert_twice_or_in_slices():
    """Beside a data axis, whose ranks have the same experts, or a tensor axis."""
    judges()  # before the fork
    for found, saved, held_by, said in run(4, timeout=200)(on_four)(tempfile.mkdtemp()):
        for one in found:
            assert one.pop("mixtral") < 2e-6  # its router computes in float32
            assert max(one.values()) < 1e-10, found
        assert max(gap for one in saved for gap in one.values()) < 1e-10, saved
        shape, mine = (COUNT, WIDTH, WIDTH), COUNT * WIDTH * WIDTH // 4
        assert held_by == ((shape, mine, True), (shape, mine, True))
        assert "want the same tokens" in said[0]
        assert "their tokens are the same" in said[1]
        assert "want one gradient" in said[2]
        assert "over 4 ranks, but they are cut in 2" in said[3]


def undivided(env):
    """A run whose experts' gradients count each rank of the axis once more."""
    env = ax.connect(env, axes="expert=2")
    judge = t.by_hand(made, t.masked, t.grouped, t.batches())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelx.engines.experts.divide", lambda *given: None)
        tx = chained(env, "ddp", 1)
        return t.apart(judge, train(env, tx, made(), t.masked, t.grouped))


def test_control_gradients_of_experts_that_count_twice_are_seen():
    """The comparison sees a factor of the axis."""
    assert min(run(2)(undivided)()) > 1e-3


def test_experts_that_do_not_fit_are_refused_on_one_process_too():
    """Before the cluster; and an axis elsewhere at once."""
    tx = ax.chain(ax.shard_model(ENV), ax.shard_experts(ENV, "layers.*.router"))
    with pytest.raises(ax.PlacementError, match=r"got forward\(input\)"):
        ax.init(tx, made, adam)
    with pytest.raises(ax.PlacementError, match="wants shard_model in the chain"):
        ax.init(ax.shard_experts(ENV), made, adam)
    axes = (ax.Axis("expert", 2), ax.Axis("data", 2))
    with pytest.raises(ax.PlacementError, match=r'write .*"data=...,expert=2"'):
        ax.shard_experts(ax.Env(world=4, axes=axes))
    axes = (ax.Axis("tensor", 2), ax.Axis("expert", 2))
    with pytest.raises(ax.PlacementError, match=r'write .*"expert=2,tensor=2"'):
        ax.shard_experts(ax.Env(world=4, axes=axes))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda m: setattr(m, "all", nn.Parameter(torch.ones(6))), r"all \(6,\); st"),
        (lambda m: setattr(m, "one", nn.Parameter(torch.ones(()))), r"one \(\); stack"),
        (lambda m: m.register_buffer("by", torch.ones(4)), "buffer by .*all 4 experts"),
    ],
)
def test_what_is_not_dealt_out_with_the_weights_is_refused(given, words):
    """A weight of all experts, and a buffer with a row for each of them."""
    model = made()
    given(model.layers[0].experts)
    tx = ax.chain(ax.shard_model(ENV), ax.shard_experts(ENV, Experts))
    with pytest.raises(ax.PlacementError, match=words):
        ax.init(tx, model, adam)


def test_a_plan_that_cuts_experts_is_refused_on_one_process_too():
    """With the name; one that says that tokens are cut is not."""
    place = ax.chain(ax.shard_model(ENV), ax.shard_experts(ENV, Experts))
    told = {"layers.*.experts": "column"}
    with pytest.raises(ax.PlacementError, match=r"'column' of layers.0.experts, whose"):
        ax.init(ax.chain(place, ax.shard_tensors(ENV, told)), made, adam)
    told = {"layers.*.experts": "partial"}
    ax.init(ax.chain(place, ax.shard_tensors(ENV, told)), made, adam)
