"""How sequences are cut, and what is refused before any rank waits for another."""

import re

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F

import accelx as ax
from accelx.engines import sequence_checks as checks
from accelx.engines.sequence import Layout, Site, cut
from accelx.engines.sequence_mode import Exchanged
from accelx.engines.sequence_transformers import prepare
from accelx.rows import mark, rows_of

AXES = (ax.Axis("data", 1), ax.Axis("sequence", 2))
ENV = ax.Env(rank=1, world=2, axes=AXES)
HERE = 6
layouts = st.tuples(st.integers(1, 4), st.booleans())


def site(**fields):
    """What the second of two ranks knows, while a step is under way."""
    made = Site(ENV, Layout(1, 2, zigzag=True), "gather", 1, **fields)
    made.here = HERE
    return made


@given(layouts, st.integers(1, 3))
def test_the_parts_of_all_ranks_are_the_sequence(layout, size):
    """Each token once, in order again; positions are where they stood."""
    world, zigzag = layout
    every = [Layout(rank, world, zigzag) for rank in range(world)]
    length = every[0].parts * size
    x = torch.randn(2, length, 3)
    parts = tuple(one.take(x, 1) for one in every)
    assert {p.size(1) for p in parts} == {length // world}
    for one, part in zip(every, parts, strict=True):
        assert torch.equal(one.whole(parts, 1), x)
        assert torch.equal(x[:, one.positions(length, "cpu")], part)


@given(st.integers(1, 8))
def test_each_rank_looks_back_at_as_many_tokens(world):
    """In zigzag order; the control is one chunk each, where the last has most."""
    work = {
        zigzag: {
            Layout(r, world, zigzag).positions(4 * world, "cpu").sum().item()
            for r in range(world)
        }
        for zigzag in (True, False)
    }
    assert len(work[True]) == 1
    assert len(work[False]) == world


def test_a_batch_is_cut_where_it_has_the_sequence():
    """Other tensors stay, as do containers and the marks of rows."""
    batch = {"x": torch.arange(8).expand(3, 8), "y": torch.ones(3), "z": ["a", "b"]}
    mark(batch, 2, 5)
    made = site()
    (got,) = cut(made, (batch,), ())
    assert got["x"][0].tolist() == [2, 3, 4, 5]
    assert got["y"] is batch["y"]
    assert got["z"] == ["a", "b"]
    assert made.here == 4
    mine = rows_of(got)
    assert (mine.rows, mine.total) == (2, 5)
    assert batch["x"].shape == (3, 8)


def test_only_tensors_that_are_named_are_cut():
    """By key or by index."""
    a, b = torch.zeros(2, 8), torch.zeros(2, 8)
    one, other = cut(site(), (a, b), (1,))
    assert (one.shape, other.shape) == ((2, 8), (2, 4))
    (got,) = cut(site(), ({"a": a, "b": b},), ("a",))
    assert (got["a"].shape, got["b"].shape) == ((2, 4), (2, 8))


@pytest.mark.parametrize(
    ("args", "named", "words"),
    [
        ((torch.zeros(2, 6),), (), "4 equal chunks over 2 ranks.*6; pad to 8"),
        ((torch.zeros(2),), (), r"tokens \(rows, length\), got \(2,\)"),
        ((), (), "got no tensor"),
        (({"a": torch.zeros(2, 8)},), ("b",), r"no 'b' in \[0\]\['a'\]"),
        (
            (torch.zeros(2, 8), torch.zeros(2, 4)),
            (0, 1),
            r"one length.*\[0\] \(2, 8\) and \[1\] \(2, 4\)",
        ),
    ],
)
def test_a_batch_that_cannot_be_cut_says_why(args, named, words):
    """With its own shapes and names."""
    with pytest.raises(ax.DataError, match=words):
        cut(site(), args, named)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "rings"}, "'gather', 'ulysses', 'ring', got 'rings'"),
        ({"dim": 0}, "got 0; write dim=1"),
    ],
)
def test_settings_that_are_none_are_refused(options, words):
    """When the pass is made."""
    with pytest.raises(ax.PlacementError, match=words):
        ax.shard_sequence(ENV, **options)


def test_ranks_without_the_axis_are_refused():
    """With the axes to write."""
    with pytest.raises(ax.PlacementError, match="data=-1,sequence=2"):
        ax.shard_sequence(ax.Env(world=2))


def test_what_does_not_go_with_it_is_refused_when_the_chain_is_made():
    """Ranks that train apart; what is recomputed comes after it."""
    one = ax.shard_sequence(ENV)
    for other in (ax.with_local_sgd(ENV, 2), ax.compile("layers.*")):
        with pytest.raises(ax.OrderError, match="add up at each step"):
            ax.chain(one, other)
    with pytest.raises(ax.OrderError, match="computed again must be"):
        ax.chain(ax.remat("layers.*"), one)
    ax.chain(one, ax.remat("layers.*"))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (None, "over the same axes, got None; add shard_model"),
        (ax.shard_model(ax.Env()), "same axes, got shard_model"),
        (ax.shard_model(ENV, "deepspeed"), "got 'deepspeed'; write \"fsdp2\""),
    ],
)
def test_a_model_placed_otherwise_is_refused(place, words):
    """Gradients would not add up over the ranks of a sequence."""
    one = ax.shard_sequence(ENV)
    with pytest.raises(ax.PlacementError, match=words):
        ax.init(one if place is None else ax.chain(one, place), nn.Linear(2, 2))


def test_one_process_is_left_as_it_is():
    """No axis is wanted there, and nothing is cut."""
    tx = ax.shard_sequence(ax.Env(), "ulysses", tensors="x")
    assert repr(tx) == "shard_sequence(Env(), mode='ulysses', tensors=('x',))"
    state = ax.init(tx, nn.Linear(3, 1), lambda m: torch.optim.SGD(m.parameters(), 1))
    seen = []

    def loss(model, x):
        seen.append(x.shape)
        return model(x).mean()

    ax.step(tx, loss)(state, torch.ones(2, 3))
    assert seen == [(2, 3)]


X = torch.zeros(2, HERE, 5)
IDS = torch.zeros(2, HERE, dtype=torch.long)
HEADS = torch.zeros(2, 3, HERE, 4)
TABLE = nn.Parameter(torch.zeros(20, 5))
WRONG = {
    "shifted": lambda: X[:, 1:],
    "shifted behind dots": lambda: X[..., :-1, :],
    "labels": lambda: IDS[:, :-1],
    "first token": lambda: X[:, 0],
    "rolled": lambda: IDS.roll(-1, dims=1),
    "one token": lambda: X.select(1, 0),
    "pooled": lambda: X.mean(1, True),
    "pooled by name": lambda: torch.amax(X, dim=-2),
    "running sum": lambda: X.cumsum(1),
    "positions": lambda: torch.arange(HERE),
    "positions from 0": lambda: torch.arange(0, end=HERE),
    "positions of a mask": lambda: IDS.cumsum(-1),
    "by torch's own function": lambda: F.multi_head_attention_forward(
        *[X] * 3, 5, 1, None, None, None, None, False, 0.0, torch.eye(5), torch.ones(5)
    ),
    "by keyword": lambda: torch.mean(input=X, axis=1),
    "table": lambda: TABLE[:HERE],
    "triangle": lambda: torch.ones(1, 1, 20, 20)[:, :, :HERE, :HERE],
    "by hand": lambda: F.softmax(torch.zeros(2, 3, HERE, HERE), -1),
    "convolution": lambda: F.conv1d(X.mT, torch.zeros(5, 5, 1)),
    "by hand, without a softmax": lambda: HEADS.mT @ HEADS,
    "softmax over tokens": lambda: X.softmax(1),
    "tokens of heads": lambda: HEADS[:, :, :-1],
    "heads padded at the front": lambda: F.pad(HEADS, (0, 0, 1, -1)),
    "padded at the front": lambda: F.pad(X, (0, 0, 1, -1)),
    "narrowed": lambda: IDS.narrow(1, 0, HERE - 1),
    "spread of tokens": lambda: X.std(dim=1),
    "soft maximum": lambda: torch.logsumexp(X, 1),
    "length of tokens": lambda: X.norm(dim=1),
    "divided by it": lambda: F.normalize(X),
    "largest tokens": lambda: X.topk(2, 1),
    "differences": lambda: torch.diff(X, dim=1),
    "sum of letters": lambda: torch.einsum("btf->bf", X),
    "other lengths": lambda: F.scaled_dot_product_attention(*[X[:, None, 0:, :3]] * 3),
}
RIGHT = {
    "rows": lambda: X[1:],
    "features": lambda: X[..., :3],
    "rolled features": lambda: (X.roll(1, 2), X.select(2, 1), X.mean(2, True)),
    "all of it": lambda: (X[:, :], X[:, 0:, :], X[:, :, None], X[:, None]),
    "by mask": lambda: X[IDS > 0],
    "other tables": lambda: (TABLE[:7], TABLE[IDS]),
    "means of rows": lambda: torch.zeros(2, HERE).mean(1),
    "means of features": lambda: (X.mean(-1), X.sum(), X.mean((0, 2))),
    "other ranges": lambda: (torch.arange(7), torch.arange(1, HERE)),
    "softmax of words": lambda: F.softmax(X, -1),
    "features of heads": lambda: (HEADS[..., :2], HEADS[:, :1], HEADS @ HEADS.mT[:1]),
    "features padded": lambda: (F.pad(X, (0, 1)), X.narrow(2, 0, 3)),
    "numbers of features": lambda: (X.norm(dim=-1), F.normalize(X, dim=-1), X.topk(1)),
    "letters that stay": lambda: torch.einsum("btf,fg->btg", X, torch.zeros(5, 3)),
    "narrowed to all": lambda: IDS.narrow(1, 0, HERE),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_call_that_takes_one_ranks_tokens_for_all_is_refused(name):
    """In the loss and in the model; the same call is torch's own outside."""
    if name not in ("other lengths", "by torch's own function"):
        WRONG[name]()
    made = site()
    made.here = 4 if name == "other lengths" else HERE
    with pytest.raises(ax.LossError, match="shard_sequence"), Exchanged(made):
        WRONG[name]()


@pytest.mark.parametrize("name", RIGHT)
def test_a_call_that_works_token_by_token_is_not(name):
    """What is refused above is not all there is."""
    with Exchanged(site()):
        RIGHT[name]()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout_p": 0.1}, "got dropout_p=0.1"),
        ({"attn_mask": torch.ones(HERE, HERE).bool()}, r"got \(6, 6\).*is_causal=True"),
        (
            {"attn_mask": torch.ones(HERE).bool(), "is_causal": True},
            "a mask or is_causal=True, got both",
        ),
    ],
)
def test_attention_that_would_be_another_is_refused(options, words):
    """Before keys are sent."""
    x = torch.zeros(2, 3, HERE, 4)
    with pytest.raises(ax.LossError, match=words), Exchanged(site()):
        F.scaled_dot_product_attention(x, x, x, **options)


def test_heads_that_do_not_divide_and_masks_in_a_ring_are_refused():
    """Each mode says which other one takes them."""
    x = torch.zeros(2, 3, HERE, 4)
    made = site()
    made.mode = "ulysses"
    few = pytest.raises(ax.LossError, match=r"2 ranks.*got 3; .*gather")
    with few, Exchanged(made):
        F.scaled_dot_product_attention(x, x, x)
    made.mode = "ring"
    masked = pytest.raises(ax.LossError, match=r"without a mask.*\(6,\); .*gather")
    with masked, Exchanged(made):
        F.scaled_dot_product_attention(x, x, x, torch.ones(HERE).bool())


@pytest.mark.parametrize(
    "module", [nn.Conv1d(1, 1, 1), nn.GRU(1, 1), nn.MultiheadAttention(2, 1)]
)
def test_modules_that_mix_tokens_are_refused_unless_vouched_for(module):
    """By name, class or glob; what is in a module that is vouched for is too."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(module))
    with pytest.raises(ax.PlacementError, match=r"1.0 is a \w+.*allow='1.0'"):
        checks.check_modules(model, set())
    for allow in ("1.0", "1", type(module), "**"):
        checks.check_modules(model, checks.vouched(model, [allow]))
    with pytest.raises(ax.PlacementError, match=r"allow='conv'.*matches no module"):
        checks.vouched(model, ["conv"])


def config(kind, **options):
    """A tiny model of transformers."""
    tf = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    return getattr(tf, kind)(vocab_size=9, intermediate_size=8, **size, **options)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("Llama", {"attn_implementation": "eager"}, "attention is 'eager'"),
        ("Mistral", {"sliding_window": 4}, "through a window"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rot"),
        ("Roberta", {}, "begin behind padding_idx"),
        ("Mamba", {}, "no position_ids"),
    ],
)
def test_models_of_transformers_that_look_at_one_rank_are_refused(kind, options, words):
    """Windows, positions by the longest seen, attention of other kinds."""
    tf = pytest.importorskip("transformers")
    model = getattr(tf, f"{kind}Model")(config(f"{kind}Config", **options))
    with pytest.raises(ax.PlacementError, match=re.compile(words, re.DOTALL)):
        prepare(model, site())


def test_labels_given_to_a_model_of_transformers_are_refused():
    """It would shift them, and take its mean, within one rank's tokens."""
    tf = pytest.importorskip("transformers")
    model, made = tf.LlamaForCausalLM(config("LlamaConfig")), site()
    prepare(model, made)
    ids = torch.zeros(1, HERE, dtype=torch.long)
    with pytest.raises(ax.LossError, match=r"shifts labels.*within one rank's tokens"):
        model(input_ids=ids, labels=ids)
    with pytest.raises(ax.LossError, match=r"6 tokens of each row, got \(1, 3\)"):
        model(ids[:, :3])
    with pytest.raises(ax.LossError, match=r"packed texts.*block_mask"):
        model(ids, position_ids=torch.arange(HERE)[None])  # this rank has 3 to 8
    made.close()
    assert model(input_ids=ids, labels=ids).loss is not None
