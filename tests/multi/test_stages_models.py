"""Stages of transformers' own models, in half precision, and steps that are skipped."""

import math
from functools import cache

import pytest
import torch
import torch.distributed.pipelining  # ranks are forked: once here, not once in each
from torch import nn
from torch.nn import functional as F

import accelx as ax
from accelx import testing
from accelx.env_part import rows_env
from accelx.rows import mark
from tests.laws import training as t

tf = pytest.importorskip("transformers")
pytestmark = [pytest.mark.multi, t.quiet_views]
STEPS, WORDS = 10, 23


def gpt2():
    """A tiny GPT-2, its head tied to the embedding of the first stage."""
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    size = {"vocab_size": WORDS, "n_embd": 16, "n_head": 2, "n_layer": 2}
    config = tf.GPT2Config(**size, **off, **ends, n_positions=8)
    return tf.GPT2LMHeadModel(config).double()


def llama():
    """A tiny Llama with grouped queries, its head untied."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = tf.LlamaConfig(
        **size, vocab_size=WORDS, intermediate_size=24, num_key_value_heads=1
    )
    return tf.LlamaForCausalLM(config).double()


MODELS = {"gpt2": (gpt2, "transformer.h.1"), "llama": (llama, "balanced")}


def batches():
    """Ids and ragged masks, four rows each."""
    draw = torch.Generator().manual_seed(7)
    for k in range(STEPS):
        ids = torch.randint(WORDS, (4, 6), generator=draw)
        yield ids, (torch.arange(6) < torch.tensor([[6], [2 + k % 4], [4], [3]])).long()


def loss(model, ids, mask):
    """A mean over real tokens."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return ax.Mean((each * mask[:, 1:]).sum(), mask[:, 1:].sum())


def trained(env, name):
    """Losses of ten steps, weights, and what the model says next."""
    make, split = MODELS[name]
    tx = ax.chain(ax.shard_stages(env, split, 2), ax.shard_model(env), ax.clip(1.0))
    state = ax.init(tx, make, lambda m: torch.optim.AdamW(m.parameters(), 1e-2))
    step, losses = ax.step(tx, loss), []
    for batch in batches():
        state, out = step(state, *batch)
        losses.append(float(out.loss))
    with ax.evaluating(state) as model:
        said = model.generate(
            torch.tensor([[3, 1], [2, 2]]),
            attention_mask=torch.ones(2, 2, dtype=torch.long),
            max_new_tokens=3,
            do_sample=False,
            use_cache=False,
            pad_token_id=0,
        )
    weights = {n: p.detach().clone() for n, p in state.model.named_parameters()}
    return losses, weights, said.tolist()


@cache
def by_two():
    """Both models on two ranks."""
    return testing.run(2, axes="stage=2", timeout=90)(
        lambda env: {name: trained(env, name) for name in MODELS} | skips(env)
    )()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_is_cut_as_it_is(name):
    """Ten steps and a greedy text are those of one process, its forward as it is."""
    losses, weights, said = trained(ax.Env(), name)
    for rank in by_two():
        got, ours, told = rank[name]
        assert got == pytest.approx(losses, abs=1e-10)
        assert len(ours) < len(weights)
        assert max((w - weights[n]).abs().max() for n, w in ours.items()) < 1e-10
        assert told == said


def test_control_ten_steps_move_the_losses():
    """The comparison sees a model that has not learnt."""
    losses = by_two()[0]["llama"][0]
    assert min(abs(one - losses[0]) for one in losses[1:]) > 1e-3


def scaled(model, x, factor):
    """A Mean whose total is `factor` times a sum, and whose weight is 0 for 0."""
    total = model(x).square().sum() * factor
    return ax.Mean(total, torch.tensor(float(factor != 0) * len(x)))


def skips(env):
    """A step, one without a weight, one that is not finite, and one more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    tx = ax.chain(
        ax.shard_stages(env, "2", 2),
        ax.shard_model(env),
        ax.clip(1.0),
        ax.with_ema(0.9),
    )
    state = ax.init(tx, model, lambda m: torch.optim.SGD(m.parameters(), 0.1))
    step, found = ax.step(tx, scaled), []
    for factor in (1.0, 0.0, math.inf, 1.0):
        before = [p.detach().clone() for p in state.model.parameters()]
        state, out = step(state, torch.ones(4, 3), factor)
        after = list(state.model.parameters())
        moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        found.append((out.stepped, moved, out.skipped, state.step, state.skipped))
    return {"skips": found}


def test_ranks_skip_a_step_together():
    """Without a token, and with a norm that is no number: no stage moves."""
    first, second = (rank["skips"] for rank in by_two())
    assert first == second == skips(ax.Env())["skips"]
    assert [one[:2] for one in first] == [
        (True, True),
        *[(False, False)] * 2,
        (True,) * 2,
    ]
    assert first[1][2] == "no row or token has a weight"
    assert "norm is nan" in first[2][2] or "norm is inf" in first[2][2]


class Chain(nn.Module):
    """Blocks in a row; torch's LayerNorm on CPUs takes no half weights."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.last(x)


def halved(env, kind, precision):
    """Losses of a few steps in a precision."""
    names = {axis.name for axis in env.axes}
    rows = ax.along(env, "data") if "data" in names else ax.Env()
    stages, half = ax.shard_stages(env, "layers.1", 2), ax.with_precision(precision)
    either = (stages, half) if kind == "ddp" else (half, stages)
    blocks = None if kind == "ddp" else "layers.*"
    tx = ax.chain(ax.shard_model(env, kind, blocks=blocks), *either)
    torch.manual_seed(0)
    state = ax.init(tx, Chain(), lambda m: torch.optim.AdamW(m.parameters(), 1e-2))
    step = ax.step(tx, lambda model, x: model(x).float().square().mean())
    draw, losses = torch.Generator().manual_seed(2), []
    for _ in range(4):
        x = torch.randn(8, 6, generator=draw)
        low, high = t.even(8, rows.rank, rows.world)
        state, out = step(state, mark(x[low:high], high - low, 8))
        assert out.stepped, out.skipped
        losses.append(float(out.loss))
    return losses


@cache
def in_half():
    """Each kind and precision on two stages of two ranks; and tokens over ranks."""
    grid = [(kind, p) for kind in ("ddp", "fsdp2") for p in ("bf16", "fp16")]
    return testing.run(4, axes="data=2,stage=2", timeout=90)(
        lambda env: (
            {case: halved(env, *case) for case in grid}
            | {"long": long(ax.connect(env, axes="stage=2,sequence=2"))}
            | {"mixed": mixed(ax.connect(env, axes="stage=2,expert=2"))}
        )
    )()


def mixtral():
    """A tiny Mixtral; which of its experts a token goes to is asked of numbers."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = tf.MixtralConfig(
        **size,
        vocab_size=WORDS,
        intermediate_size=24,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    config._experts_implementation = "eager"  # the other has no float64
    return tf.MixtralForCausalLM(config).double()


def mixed(env):
    """Losses of three steps of it, and of one that is measured."""
    dealt = ax.shard_experts(env) if env.world > 1 else ax.identity
    cut = ax.shard_stages(env, "balanced", 2)
    tx = ax.chain(cut, dealt, ax.shard_model(env, "fsdp2"), ax.clip(1.0))
    state = ax.init(tx, mixtral, lambda m: torch.optim.SGD(m.parameters(), 0.5))
    step, found, rows = ax.step(tx, loss), [], rows_env(env)
    for (ids, mask), _ in zip(batches(), range(3), strict=False):
        low, high = t.even(len(ids), rows.rank, rows.world)
        part = mark(ids[low:high], high - low, len(ids)), mask[low:high]
        state, out = step(state, *part)
        found.append(float(out.loss))
    mean = ax.measure(tx, lambda model, batch: loss(model, *batch))
    return [*found, float(ax.reduce(env, mean(state, part)).value)]


def test_experts_of_stages_are_on_ranks_of_their_own():
    """Tokens go to them and back within a stage, in steps and in evaluation."""
    wanted = mixed(ax.Env())
    assert abs(wanted[1] - wanted[0]) > 1e-3
    for rank in in_half():
        assert rank["mixed"] == pytest.approx(wanted, abs=1e-10)


def shifted(model, ids, labels, mask):
    """A mean over real tokens, whose labels were shifted where batches are made."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return ax.Mean((each * mask).sum(), mask.sum())


def said(env):
    """Losses of a GPT-2 in four steps, one that is measured, and a text after it."""
    tokens = ax.shard_sequence(env) if env.world > 1 else ax.identity
    cut = ax.shard_stages(env, "transformer.h.1", 2)
    tx = ax.chain(cut, tokens, ax.remat("transformer.h.*"), ax.shard_model(env))
    state = ax.init(tx, gpt2, lambda m: torch.optim.AdamW(m.parameters(), 1e-2))
    step, found = ax.step(tx, shifted), []
    draw = torch.Generator().manual_seed(7)
    for k in range(4):
        ids = torch.randint(WORDS, (4, 9), generator=draw)
        mask = (torch.arange(8) < torch.tensor([[8], [2 + k], [4], [3]])).long()
        batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask
        state, out = step(state, *batch)
        found.append(float(out.loss))
    found.append(float(ax.reduce(env, ax.measure(tx, shifted)(state, *batch)).value))
    with ax.evaluating(state) as model:  # as long as a part was, but of whole rows
        found.append(float(model(ids[:, :4], use_cache=False).logits.square().sum()))
    return found


def untold(env, **given):
    """The loss of a model that never calls for attention, or what it raises."""
    tokens = ax.shard_sequence(env, **given) if env.world > 1 else ax.identity
    tx = ax.chain(ax.shard_stages(env, "last", 1), tokens, ax.shard_model(env))
    torch.manual_seed(0)
    state = ax.init(tx, Chain(), lambda m: torch.optim.SGD(m.parameters(), 0.1))
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2))
    try:
        return float(
            ax.step(tx, lambda model, x: model(x).square().mean())(state, x)[1].loss
        )
    except (ax.LossError, ax.CollectiveError) as error:
        return str(error)


def long(env):
    """Stages whose ranks hold parts of the tokens."""
    return said(env), untold(env), untold(env, allow="layers.*")


def test_stages_of_ranks_with_a_part_of_the_tokens_each():
    """Masks and positions are those of whole rows, in what is computed again, too."""
    wanted = said(ax.Env())
    assert abs(wanted[1] - wanted[0]) > 1e-3
    for rank in in_half():
        assert rank["long"][0] == pytest.approx(wanted, abs=1e-10)


def test_attention_is_looked_for_in_all_stages():
    """A model without is refused on every rank, unless a stage of it is vouched for."""
    for rank in in_half():
        _, refused, vouched = rank["long"]
        assert "did not call" in refused
        assert "allow=Chain" in refused
        assert vouched == pytest.approx(untold(ax.Env()), abs=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_stages_hand_on_half_precision(kind, precision):
    """Losses are those of one process in that precision, to its digits."""
    wanted = halved(ax.Env(), "ddp", precision)
    for rank in in_half():
        assert rank[kind, precision] == pytest.approx(wanted, abs=5e-3)
