"""Rows whose tokens lie on several ranks train as on one, attention included."""

import re
import tempfile
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax
from accelx import testing
from accelx.env_part import rows_env
from tests.laws import training as t

pytestmark = [pytest.mark.multi, t.quiet_views]
LENGTH, WORDS = 8, 11


class Block(nn.Module):
    """Grouped attention, four heads of queries to two of keys, and a perceptron."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 16), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x, how):
        parts = self.qkv(self.first(x)).split((8, 4, 4), -1)
        q, k, v = (y.unflatten(-1, (-1, 2)).transpose(1, 2) for y in parts)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(torch.tanh(self.up(self.second(x))))


class Net(nn.Module):
    """A transformer that is told positions and how to attend."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 8), nn.Embedding(LENGTH, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, WORDS)

    def forward(self, tokens, positions, how):
        x = self.words(tokens) + self.places(positions)
        for layer in self.layers:
            x = layer(x, how)
        return self.head(x)


def made():
    """The same model each time."""
    torch.manual_seed(0)
    return Net().double()


def batches(rows=(2, 5, 3)):
    """Batches whose labels are shifted already; weights and masks are ragged."""
    draw = torch.Generator().manual_seed(1)
    result = []
    for n in rows:
        tokens = torch.randint(WORDS, (n, LENGTH + 1), generator=draw)
        weights = (torch.rand(n, LENGTH, generator=draw) < 0.6).double()
        weights[:, 0] = 1
        seen = torch.rand(n, LENGTH, LENGTH, generator=draw) < 0.5
        seen |= torch.eye(LENGTH, dtype=torch.bool)
        result.append(
            {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "positions": torch.arange(LENGTH).expand(n, -1).contiguous(),
                "weights": weights,
                "seen": seen,
            }
        )
    return result


def each(model, batch, **how):
    """The loss of each token."""
    logits = model(batch["tokens"], batch["positions"], how)
    return F.cross_entropy(logits.mT, batch["labels"], reduction="none")


def weighed(losses, batch):
    """A mean over the tokens that count."""
    return ax.Mean((losses * batch["weights"]).sum(), batch["weights"].sum())


def causal(model, batch):
    return weighed(each(model, batch, is_causal=True), batch)


def bare(model, batch):
    return each(model, batch, is_causal=True).mean()


def whole(model, batch):
    return each(model, batch, scale=0.3).mean()


def keys(model, batch):
    return weighed(
        each(model, batch, attn_mask=batch["weights"].bool()[:, None, None]), batch
    )


def added(model, batch):
    return weighed(each(model, batch, attn_mask=batch["weights"][:, None, None]), batch)


def pairs(model, batch):
    return weighed(each(model, batch, attn_mask=batch["seen"][:, None]), batch)


def misplaced(model, batch):
    """What must not pass: positions counted among one rank's tokens."""
    return causal(model, batch | {"positions": batch["positions"].argsort(1)})


LOSSES = {f.__name__: f for f in (causal, bare, whole, keys, added, pairs, misplaced)}
CASES = [  # mode, kind, loss, microbatches, recomputed
    *(("gather", "ddp", "causal", 1, False), ("gather", "fsdp2", "causal", 2, True)),
    *(("gather", "ddp", "bare", 2, True), ("gather", "fsdp2", "bare", 2, False)),
    *(("gather", "fsdp2", "whole", 1, False), ("gather", "ddp", "keys", 2, False)),
    *(("gather", "fsdp2", "added", 1, False), ("gather", "fsdp2", "pairs", 2, True)),
    *(("ulysses", "fsdp2", "causal", 2, True), ("ulysses", "ddp", "bare", 2, False)),
    *(("ulysses", "ddp", "whole", 1, True), ("ulysses", "fsdp2", "keys", 1, False)),
    *(("ulysses", "ddp", "added", 2, False), ("ulysses", "fsdp2", "pairs", 1, False)),
    *(("ring", "ddp", "causal", 2, False), ("ring", "fsdp2", "whole", 1, True)),
]
LAYOUTS = {  # axes, and the cases that are run on them
    "sequence=2": CASES,
    "sequence=4": [*CASES[::3], CASES[-2]],
    "data=2,sequence=2": CASES[::2],
}


def chained(env, mode, kind, *rest, **options):
    """The chain of a case."""
    return ax.chain(
        ax.shard_sequence(env, mode, **options),
        ax.shard_model(env, kind, blocks="layers.*"),
        *rest,
        ax.clip(t.LIMIT),
        ax.with_schedule(t.curve),
    )


@cache
def judge(loss):
    """The run of one process by hand, without a cut."""
    return t.by_hand(made, LOSSES[loss], t.grouped, batches())


def trained(env, tx, loss, data=None):
    """The trace of a run on this rank's rows of each batch."""
    state = ax.init(tx, made, t.grouped)
    step, trace = ax.step(tx, loss), []
    for batch in data or batches():
        own = rows_env(env)
        mine = t.part(own, list(batch.values()), t.lopsided)
        marked = dict(zip(batch, mine, strict=True))
        state, out = step(state, marked)
        assert out.stepped, out.skipped
        assert loss is not bare or float(out.weight) == len(batch["tokens"])
        trace.append(t.Step(float(out.loss), out.norm.item(), t.weights(state.model)))
    return state, trace


def run_case(env, mode, kind, loss, n, recomputed):
    """How far a case lies from its judge."""
    policy = "selective" if mode == "gather" else "full"
    rest = [ax.remat("layers.*", policy)] if recomputed else []
    tx = chained(env, mode, kind, *rest, ax.accumulate(n))
    _, trace = trained(env, tx, LOSSES[loss])
    return t.apart(judge(loss), trace, env.rank, env.world)


def controls(env):
    """Runs that must be seen: attention among one rank's tokens, local positions."""
    local = chained(env, "gather", "ddp", allow=Net)
    right = chained(env, "ulysses", "ddp")
    return {
        "local attention": t.apart(judge("causal"), trained(env, local, causal)[1]),
        "positions": t.apart(judge("causal"), trained(env, right, misplaced)[1]),
    }


@cache
def gaps(axes):
    """Every case on one layout of ranks, in one launch."""
    for case in LAYOUTS[axes]:
        judge(case[2])  # before the fork

    def rank(env):
        found = {case: run_case(env, *case) for case in LAYOUTS[axes]}
        if axes == "sequence=2":
            found |= controls(env) | {"refused": refusals(env)}
        return found

    ranks = 2 if axes == "sequence=2" else 4
    return testing.run(ranks, timeout=120, axes=axes)(rank)()


@pytest.mark.parametrize("axes", LAYOUTS)
def test_a_sequence_over_ranks_trains_as_on_one(axes):
    """Losses, norms and weights of each step: modes, masks, kinds, microbatches."""
    found = gaps(axes)
    for case in found[0]:
        if isinstance(case, tuple):
            assert max(rank[case] for rank in found) < 1e-10, case


@pytest.mark.parametrize("name", ["local attention", "positions"])
def test_control_one_ranks_tokens_are_another_run(name):
    """The comparison sees attention, or positions, of a rank by itself."""
    assert min(rank[name] for rank in gaps("sequence=2")) > 1e-3


def beside(env):
    """A run over ax.feed that is measured and saved, and calls outside a step."""
    data = batches((12,))[0]
    names, folder = list(data), ax.broadcast(env, tempfile.mkdtemp())
    loader = DataLoader(TensorDataset(*data.values()), batch_size=5)

    def named(loss):
        return lambda model, batch: loss(model, dict(zip(names, batch, strict=True)))

    tx = ax.chain(
        chained(env, "gather", "fsdp2"),
        ax.shard_loader(env),
        ax.save_state(env, folder, every=3),
    )
    state = ax.init(tx, made, t.grouped)
    step, trace = ax.step(tx, named(causal)), []
    for batch in ax.feed(tx, loader, stop=3):
        state, out = step(state, batch)
        trace.append(t.Step(float(out.loss), out.norm.item(), t.weights(state.model)))
    want = [{k: x[low : low + 5] for k, x in data.items()} for low in (0, 5, 10)]
    gap = t.apart(t.by_hand(made, causal, t.grouped, want), trace, env.rank, env.world)

    test = ax.measure(tx, named(lambda *a: {"sum": causal(*a), "mean": bare(*a)}))
    parts = [test(state, batch) for batch in ax.feed(tx, loader)]
    total = {k: sum((p[k] for p in parts[1:]), parts[0][k]) for k in parts[0]}
    told = {k: float(m.value) for k, m in ax.reduce(env, total).items()}
    with ax.evaluating(state) as model:
        outside = each(model, data, is_causal=True)
    forked = ax.fork(state)
    again, _ = step(forked, next(iter(ax.feed(tx, loader))))
    full = {n: t.whole(p) for n, p in state.model.named_parameters()}
    moved = {n: t.whole(p) for n, p in again.model.named_parameters()}
    return gap, told, outside, full, moved, folder


def test_feeding_measuring_saving_and_forking_know_of_the_cut():
    """What is evaluated, restored and forked is that of one process, on each rank."""
    ranks = testing.run(4, axes="data=2,sequence=2")(beside)()
    tx = ax.chain(
        ax.load_state(ax.Env(), ranks[0][-1]),
        ax.clip(t.LIMIT),
        ax.with_schedule(t.curve),
    )
    state = ax.init(tx, made, t.grouped)
    data = batches((12,))[0]
    with torch.no_grad():
        losses = each(state.model, data, is_causal=True)
    mean = weighed(losses, data).value
    step = ax.step(ax.chain(ax.clip(t.LIMIT), ax.with_schedule(t.curve)), causal)
    full = {n: p.detach().clone() for n, p in state.model.named_parameters()}
    after, _ = step(state, {k: x[:5] for k, x in data.items()})
    for gap, told, outside, weights, moved, _ in ranks:
        assert gap < 1e-10
        assert abs(told["sum"] - float(mean)) < 1e-10
        assert abs(told["mean"] - float(losses.mean())) < 1e-10
        torch.testing.assert_close(outside, losses)
        for name, p in after.model.named_parameters():
            torch.testing.assert_close(weights[name], full[name])
            torch.testing.assert_close(moved[name], p.detach())


SIZE = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 24}


def models():
    """Tiny models of transformers, and their blocks."""
    tf = pytest.importorskip("transformers")
    gpt2 = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": LENGTH}
    off = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    gpt2 = tf.GPT2Config(vocab_size=24, **gpt2, **dict.fromkeys(off, 0.0), **ends)
    llama = tf.LlamaConfig(**SIZE, **HEADS, num_key_value_heads=2)
    off = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    bert = {**SIZE, **HEADS, "max_position_embeddings": LENGTH}
    bert = tf.BertConfig(**bert, **dict.fromkeys(off, 0.0))
    return {
        "gpt2": (lambda: tf.GPT2LMHeadModel(gpt2), "transformer.h.*"),
        "llama": (lambda: tf.LlamaForCausalLM(llama), "model.layers.*"),
        "bert": (lambda: tf.BertForMaskedLM(bert), "bert.encoder.layer.*"),
    }


def texts(model, batch):
    """A loss of a model of transformers: without a mask, padded, packed."""
    tokens, labels, kept, places, seen = batch
    packed = {"attention_mask": seen, "position_ids": places}
    padded = {"attention_mask": kept}
    masked = {4: {}, 3: padded, 2: packed}[tokens.size(0)]
    losses = F.cross_entropy(
        model(input_ids=tokens, **masked).logits.mT, labels, reduction="none"
    )
    return ax.Mean((losses * kept).sum(), kept.sum())


def some_texts():
    """Three batches: the second padded at the right, the third of two texts a row."""
    draw = torch.Generator().manual_seed(6)
    result = []
    for rows in (4, 3, 2):
        tokens = torch.randint(24, (rows, LENGTH + 1), generator=draw)
        lengths = torch.randint(3, LENGTH + 1, (rows, 1), generator=draw)
        kept = (torch.arange(LENGTH) < lengths).long()
        number = torch.tensor([0] * 3 + [1] * 5).expand(rows, LENGTH)
        places = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]).expand(rows, LENGTH)
        ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        result.append((ids, labels, kept, places, ax.block_mask(number)))
    return result


def optim(model):
    """AdamW over all of it."""
    return torch.optim.AdamW(model.parameters(), 3e-3, eps=1e-6)


def test_models_of_transformers_get_positions_and_masks():
    """Unmodified, padded or not, recomputed or not: the run of one process."""
    known = models()

    def make(name):
        torch.manual_seed(3)
        return known[name][0]().double()

    judges = {
        name: t.by_hand(lambda n=name: make(n), texts, optim, some_texts())
        for name in known
    }

    def gap(env, name, mode, kind, *passes):
        model = make(name)
        if mode == "ulysses" and name != "bert":
            model.config.use_cache = False
            new = getattr(model, "activation_checkpointing_enable", None)
            (new or model.gradient_checkpointing_enable)()
        place = ax.shard_model(env, kind, blocks=known[name][1], unused="allow")
        tx = ax.chain(
            *(place, *passes, ax.shard_sequence(env, mode)),
            *(ax.clip(t.LIMIT), ax.with_schedule(t.curve)),
        )
        state = ax.init(tx, model, optim)
        step, losses = ax.step(tx, texts), []
        for batch in some_texts():
            state, out = step(state, t.part(rows_env(env), batch))
            losses.append((float(out.loss), float(out.norm)))
            state = ax.fork(state) if mode == "gather" else state
        weights = {n: t.whole(p) for n, p in state.model.named_parameters()}
        last = judges[name][-1].weights
        gaps = [(w - last[n]).abs().max().item() for n, w in weights.items()]
        for (loss, norm), one in zip(losses, judges[name], strict=True):
            gaps += [abs(loss - one.loss), abs(norm - one.norm)]
        return max(gaps)

    def rank(env):
        kinds = {"gather": "fsdp2", "ulysses": "ddp"}
        return {(n, m): gap(env, n, m, k) for n in known for m, k in kinds.items()}

    def cut(env):
        return ax.shard_tensors(env, "auto")

    def both(env):
        return {("llama", "tensor"): gap(env, "llama", "gather", "ddp", cut(env))}

    found = testing.run(2, axes="sequence=2")(rank)()
    others = testing.run(4, axes="sequence=2,tensor=2")(both)()
    found = [one | more for one, more in zip(found, others[:2], strict=True)]
    for name, mode in found[0]:
        # Llama's norms and rotations are computed in float32
        limit = 1e-7 if name == "llama" else 1e-10
        assert max(one[name, mode] for one in found) < limit, (name, mode)


def refusals(env):
    """What each wrong loss or model raises, all on the same ranks."""

    def said(loss, model=made, data=None, measured=False, **options):
        try:
            if measured:
                tx = chained(env, "gather", "ddp", **options)
                ax.measure(tx, loss)(ax.init(tx, model, t.grouped), batches()[0])
                return "nothing"
            trained(env, chained(env, "gather", "ddp", **options), loss, data)
        except ax.AccelxError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def shifted(model, batch):
        return each(model, batch, is_causal=True)[:, 1:].mean()

    def counted(model, batch):
        here = torch.arange(batch["tokens"].size(1))
        return bare(model, batch | {"positions": here})

    def triangle(model, batch):
        n = batch["tokens"].size(1)
        return each(model, batch, attn_mask=torch.ones(n, n).bool().tril()).mean()

    def ignoring(model, batch):
        labels = torch.where(batch["weights"] > 0, batch["labels"], -100)
        logits = model(batch["tokens"], batch["positions"], {"is_causal": True})
        return F.cross_entropy(logits.mT, labels)

    def shared(model, batch):
        losses, weights = each(model, batch, is_causal=True), batch["weights"]
        return (losses * weights).sum() / weights.sum().clamp(min=1)

    def picked(model, batch):
        return each(model, batch, is_causal=True)[batch["weights"] > 0].mean()

    short = [{k: x[:, :6] for k, x in b.items() if k != "seen"} for b in batches()]
    return {
        "shifted": said(shifted),
        "counted": said(counted),
        "triangle": said(triangle),
        "dropout": said(lambda m, b: each(m, b, dropout_p=0.1).mean()),
        "unattended": said(lambda m, b: m.head(m.words(b["tokens"])).mean()),
        "length": said(causal, data=short),
        "named": said(causal, tensors=("tokens", "text")),
        "ignoring": said(ignoring),
        "shared": said(shared),
        "picked": said(picked),
        "measured": said(shared, measured=True),
        "in a mean": said(lambda m, b: ax.Mean(picked(m, b), 1.0)),
        "in aux": said(lambda m, b: (bare(m, b), (b["weights"].sum() / 2).sqrt())),
    }


def test_what_would_be_wrong_is_refused_with_what_to_write():
    """On all ranks alike, before any of them waits for another."""
    found = [rank["refused"] for rank in gaps("sequence=2")]
    assert found[0] == found[1]
    words = {
        "shifted": "LossError.*4 of 8 tokens, but __getitem__.*shift labels where",
        "counted": "LossError.*arange.*counts positions up to 4.*from the batch",
        "triangle": r"LossError.*mask of keys.*got \(4, 4\).*is_causal=True",
        "dropout": "LossError.*without dropout.*got dropout_p=0.1",
        "unattended": "LossError.*Net did not call.*allow=Net",
        "length": "DataError.*4 equal chunks over 2 ranks, got a length of 6; pad to 8",
        "named": r"DataError.*no 'text' in \[0\]\['tokens'\]",
        "ignoring": "LossError.*cross_entropy leaves out the labels -100; write",
        "shared": "LossError.*divides by a sum over 4 tokens of each row; write",
        "picked": "LossError.*chooses among 4 tokens of each row; write ax.Mean",
        "measured": "LossError.*divides by a sum over 4 tokens of each row",
        "in a mean": "nothing",
        "in aux": "nothing",
    }
    for name, pattern in words.items():
        assert re.search(pattern, found[0][name], re.DOTALL), found[0][name]
