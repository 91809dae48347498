"""Models of transformers, unmodified, train the same on one rank and on four."""

from functools import cache
from itertools import product

import pytest
import torch
from torch.nn import functional as F

import accelx as ax
from accelx import testing
from tests.laws import training as t

tf = pytest.importorskip("transformers")
pytestmark = [pytest.mark.multi, t.quiet_views]
SIZE = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}


def bert():
    """A tiny BERT for masked words, its head tied."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = tf.BertConfig(
        **SIZE, **off, intermediate_size=24, max_position_embeddings=8
    )
    return tf.BertForMaskedLM(config)


def gpt2(tied):
    """A tiny GPT-2."""
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = tf.GPT2Config(
        vocab_size=23, n_embd=16, n_head=2, n_layer=2, n_positions=8, **off
    )
    config.tie_word_embeddings = tied
    return tf.GPT2LMHeadModel(config)


def llama(tied):
    """A tiny Llama."""
    config = tf.LlamaConfig(
        **SIZE, intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=tied
    )
    return tf.LlamaForCausalLM(config)


MODELS = {  # factory, blocks as a glob, blocks as a class
    "bert": (bert, "bert.encoder.layer.*", "BertLayer"),
    "gpt2-tied": (lambda: gpt2(True), "transformer.h.*", "GPT2Block"),
    "gpt2-untied": (lambda: gpt2(False), "transformer.h.*", "GPT2Block"),
    "llama-tied": (lambda: llama(True), "model.layers.*", "LlamaDecoderLayer"),
    "llama-untied": (lambda: llama(False), "model.layers.*", "LlamaDecoderLayer"),
}
CASES = list(product(MODELS, ("ddp", "fsdp2")))


def made(name):
    """A function that makes the same model each time."""

    def make():
        torch.manual_seed(3)
        return MODELS[name][0]()

    return make


def batches():
    """Three batches of (tokens, mask), ragged, one with fewer rows than ranks."""
    draw = torch.Generator().manual_seed(6)
    result = []
    for rows in (6, 3, 5):
        tokens = torch.randint(23, (rows, 7), generator=draw)
        lengths = torch.randint(1, 7, (rows,), generator=draw)
        result.append((tokens, (torch.arange(7) < lengths[:, None]).float()))
    return result


def loss(model, batch):
    """A mean over the tokens that count."""
    tokens, mask = batch
    logits = model(input_ids=tokens).logits
    each = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    return ax.Mean((each * mask[:, :-1]).sum(), mask[:, :-1].sum())


def mean_of_means(model, batch):
    """What most scripts write."""
    mean = loss(model, batch)
    return mean.total / mean.weight.clamp(min=1)


def optim(model):
    """AdamW over all of it."""
    return torch.optim.AdamW(model.parameters(), 3e-3, eps=1e-6)


def block_class(name):
    """The class of a model's blocks."""
    wanted = MODELS[name][2]
    model = made(name)()
    return next(type(m) for m in model.modules() if type(m).__name__ == wanted)


@cache
def judge(name):
    """The run by hand."""
    return t.by_hand(made(name), loss, optim, batches())


def gap(env, i, name, kind, loss=loss):
    """How far a case lies from its judge: modules, functions, globs and classes."""
    model = made(name) if i % 2 else made(name)()
    blocks = MODELS[name][1] if i % 4 < 2 else block_class(name)
    tx = ax.chain(
        ax.shard_model(
            env, kind, blocks=blocks, unused="allow" if name == "bert" else "error"
        ),
        ax.accumulate(1 + i % 3),
        ax.clip(t.LIMIT),
        ax.with_schedule(t.curve),
    )
    run = t.train(tx, env, model, loss, optim, batches())
    return t.apart(judge(name), run, env.rank, env.world)


@cache
def gaps():
    """All cases in one launch of four ranks."""
    for name in MODELS:
        judge(name)  # before the fork, for all ranks at once

    def rank(env):
        found = {case: gap(env, i, *case) for i, case in enumerate(CASES)}
        for kind in ("ddp", "fsdp2"):
            found["control", kind] = gap(env, 0, "gpt2-tied", kind, mean_of_means)
        return found

    return testing.run(4, timeout=120)(rank)()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_four_ranks_train_as_one_process(case):
    """Losses, norms and weights of three steps, with token masks of uneven lengths."""
    assert max(rank[case] for rank in gaps()) < 2e-6


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_control_the_mean_of_means_is_another_run(kind):
    """A loss that each rank divides by its own tokens, as in most scripts, is seen."""
    assert min(rank["control", kind] for rank in gaps()) > 1e-3
