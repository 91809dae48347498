"""Weights cut inside layers make the run of one process, beside every other axis."""

import re
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
from accelx.engines import tensor_plans
from accelx.env_part import rows_env
from accelx.testing import run
from tests.laws import training as t
from tests.multi import test_shard_model as peft

pytestmark = [
    pytest.mark.multi,
    t.quiet_views,
    pytest.mark.filterwarnings("ignore:While redistributing:UserWarning"),
]
ENV = ax.Env()
WIDTH, HEADS, TOKENS = 8, 4, 12


class Attention(nn.Module):
    """Counts the heads that are here."""

    def __init__(self):
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
        self.near = nn.LayerNorm(WIDTH // HEADS)

    def forward(self, x):
        size = WIDTH // HEADS
        q, k, v = (
            f(x).view(*x.shape[:-1], -1, size).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(self.near(q), k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP, and a weight of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH)
        )
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        x = x + self.attention(self.first(x)) * self.gain
        return x + self.mlp(self.second(x))


class Net(nn.Module):
    """With a tied head, a frozen norm, a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embed.weight
        self.layers[1].first.requires_grad_(False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


PLAN = {
    "layers.*.attention.[qkv]": "column",
    "layers.*.attention.o": "row",
    "layers.*.attention.near": "partial",
    "layers.*.mlp.0": "column",
    "layers.*.mlp.2": "row",
    "embed": "embedding",
    "head": "column_gather",
}
LOGITS = PLAN | {"head": "loss"}
POSITIONS = PLAN | {
    "layers.*.first": "sequence",
    "layers.*.second": "sequence",
    "layers.0": "scatter+partial",
    "layers.1": "partial",
    "layers.*.attention": "gather",
    "layers.*.mlp": "gather",
    "layers.*.attention.o": "row_scatter",
    "layers.*.mlp.2": "row_scatter",
    "norm": "sequence_gather",
}
CASES = {  # name: (axes, kind, plan, microbatches, given)
    "alone": ("tensor=2", "ddp", PLAN, 2, "module"),
    "alone-function": ("tensor=2", "fsdp2", PLAN, 1, "function"),
    "alone-logits": ("tensor=2", "ddp", LOGITS, 3, "module"),
    "alone-positions": ("tensor=2", "ddp", POSITIONS, 1, "function"),
}
WIDE = {
    "alone-4": ("tensor=4", "ddp", PLAN, 1, "function"),
    "ddp": ("data=2,tensor=2", "ddp", PLAN, 2, "module"),
    "ddp-function": ("data=2,tensor=2", "ddp", PLAN, 1, "function"),
    "fsdp2": ("data=2,tensor=2", "fsdp2", PLAN, 1, "module"),
    "fsdp2-function": ("data=2,tensor=2", "fsdp2", LOGITS, 3, "function"),
    "fsdp2-positions": ("data=2,tensor=2", "fsdp2", POSITIONS, 2, "module"),
    "hsdp": ("replicate=2,shard=1,tensor=2", "hsdp", PLAN, 2, "function"),
}


def made():
    torch.manual_seed(3)
    return Net().double()


def masked(model, batch):
    """A mean over tokens, as numerator and denominator."""
    logits = model(batch[0])
    each = F.cross_entropy(
        logits.flatten(0, 1), batch[0].roll(-1, 1).flatten(), reduction="none"
    )
    return ax.Mean((each * batch[1].flatten()).sum(), batch[1].sum())


def bare(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[0].flatten())


def squares(model, batch):
    """What is not cross_entropy, of logits that may be cut."""
    return model(batch[0]).square().mean()


def train(env, tx, model, loss, optim=t.grouped):
    """The trace of a run; weights are joined from all ranks."""
    state, trace = ax.init(tx, model, optim), []
    step = ax.step(tx, loss)
    for batch in t.batches():
        state, out = step(state, t.part(rows_env(env), batch))
        named = state.model.named_parameters(remove_duplicate=False)
        weights = {n: t.whole(p).clone() for n, p in named}
        trace.append(t.Step(float(out.loss), float(out.norm), weights))
    return trace


def gap(env, case, loss):
    """How far a case lies from the hand-written run of one process."""
    axes, kind, plan, n, given = case
    env = ax.connect(env, axes=axes)
    tx = ax.chain(
        ax.shard_tensors(env, plan),
        ax.shard_model(env, kind, blocks="layers.*"),
        ax.accumulate(n),
        ax.clip(t.LIMIT),
        ax.with_schedule(t.curve),
    )
    judge = t.by_hand(made, loss, t.grouped, t.batches())
    return t.apart(judge, train(env, tx, made if given == "function" else made(), loss))


def gaps(env, cases):
    return {name: gap(env, case, masked) for name, case in cases.items()}


MODELS = {  # name: (class, config)
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "tied": (
        *(transformers.LlamaForCausalLM, transformers.LlamaConfig),
        {"tie_word_embeddings": True},
    ),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {}),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig, {}),
    # norms over all heads: columns that are joined, and rows whose inputs are whole
    "olmo2": (transformers.Olmo2ForCausalLM, transformers.Olmo2Config, {}),
}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": TOKENS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 16,
}


def real(name):
    """A model of transformers with random weights, as its config makes it."""
    kind, config, more = MODELS[name]

    def make():
        torch.manual_seed(0)
        return kind(config(**SMALL, **more)).double()

    return make


def logits(model, batch):
    found = model(input_ids=batch[0]).logits
    return F.cross_entropy(found.flatten(0, 1), batch[0].roll(-1, 1).flatten())


def adam(model):
    return torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-6)


def reals(env, axes, kind, names):
    """The gaps of whole models of transformers, split by the plan that they bring."""
    env = ax.connect(env, axes=axes)
    place = ax.chain(ax.shard_model(env, kind), ax.shard_tensors(env))
    tx = ax.chain(place, ax.clip(t.LIMIT), ax.with_schedule(t.curve))
    found = {}
    for name in names:
        judge = t.by_hand(real(name), logits, adam, t.batches())
        found[name] = t.apart(judge, train(env, tx, real(name), logits, adam))
    return found


def written(env, model, tokens):
    """What a model that is split generates."""
    prompt = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=tokens, **prompt).tolist()


def kept(env, folder, axes, kind, plan):
    """Trains, saves, forks, measures; then what was saved on one process goes on.

    The gaps of: the fork's step, one process's step from what was saved, this layout's
    step from what one process saved; and of a measure.
    """
    env = ax.connect(env, axes=axes)
    data = t.batches()
    place = ax.chain(ax.shard_tensors(env, plan), ax.shard_model(env, kind))
    rest = ax.chain(ax.clip(t.LIMIT), ax.with_ema(0.9))
    tx = ax.chain(place, rest)
    state = ax.init(tx, made(), t.grouped)
    rows = rows_env(env)
    parts = [t.part(rows, batch) for batch in data]
    step = ax.step(tx, masked)
    state, _ = step(state, parts[0])
    ax.save_state(env, f"{folder}/split")(state)
    other, _ = step(ax.fork(state), parts[1])
    mean = ax.reduce(env, ax.measure(tx, masked)(other, parts[2]))
    state, out = step(state, parts[1])
    ax.barrier(env)
    alone = ax.chain(rest, ax.load_state(ax.Env(), f"{folder}/split"))
    one = ax.init(alone, made(), t.grouped)
    one, single = ax.step(alone, masked)(one, data[1])
    if env.main:
        ax.save_state(ax.Env(), f"{folder}/single")(one)
    ax.barrier(env)
    back = ax.init(
        ax.chain(tx, ax.load_state(env, f"{folder}/single")), made, t.grouped
    )
    back, last = step(back, parts[2])
    one, wanted = ax.step(alone, masked)(one, data[2])
    exact = ax.measure(alone, masked)(other_on_one(other), data[2])
    names = [n for n, _ in state.model.named_parameters()]

    def gap(one, two):
        named = [dict(state.model.named_parameters()) for state in (one, two)]
        pairs = [[t.whole(weights[n]) for weights in named] for n in names]
        return max(float((a - b).abs().max()) for a, b in pairs)

    return {
        "fork": gap(state, other),
        "loss": abs(float(out.loss) - float(single.loss)),
        "norm": abs(float(out.norm) - float(single.norm)),
        "back": gap(back, one),
        "last": abs(float(last.norm) - float(wanted.norm)),
        "measure": abs(float(mean.value) - float(exact.value)),
        "weight": abs(float(mean.weight) - float(exact.weight)),
    }


def other_on_one(state):
    """The weights of a split state in a model of one process."""
    model = made()
    for (_, p), (_, q) in zip(
        model.named_parameters(), state.model.named_parameters(), strict=True
    ):
        p.data.copy_(t.whole(q))
    return ax.init(ax.identity, model)


def half(env):
    """bf16: the losses of one process and of two that share layers."""
    env = ax.connect(env, axes="tensor=2")
    runs = []
    for place in (
        ax.identity,
        ax.chain(ax.shard_model(env), ax.shard_tensors(env, PLAN)),
    ):
        tx = ax.chain(place, ax.with_precision("bf16"), ax.clip(1.0))
        state, losses = ax.init(tx, lambda: made().float(), t.grouped), []
        step = ax.step(tx, masked)
        for tokens, mask in t.batches():
            state, out = step(state, (tokens, mask.float()))
            losses.append(float(out.loss))
        runs.append(losses)
    return runs


def kindly(env, plan, optim=t.grouped, **options):
    """The error of a plan, an optimizer or an option."""
    env = ax.connect(env, axes="tensor=2")
    try:
        tx = ax.chain(ax.shard_model(env, **options), ax.shard_tensors(env, plan))
        state = ax.init(tx, made(), optim)
        ax.step(tx, masked)(state, t.batches()[0])
    except ax.PlacementError as error:
        return str(error)


class Lending(nn.Module):
    """Gives the weights of a convolution to a kernel, as linear attention does."""

    def __init__(self):
        super().__init__()
        self.near, self.out = nn.Conv1d(8, 8, 3, groups=8), nn.Linear(8, 8)

    def forward(self, x):
        x = F.conv1d(x.mT, self.near.weight, self.near.bias, padding=1, groups=8)
        return self.out(x.mT).square().mean()


def lent(env):
    """The gap to one process of a weight that another module uses."""

    def make():
        torch.manual_seed(0)
        return Lending().double()

    env, x = ax.connect(env, axes="tensor=2"), torch.linspace(-1, 1, 48).double()
    cut = ax.shard_tensors(env, {"out": "column_gather"})
    plan = ax.chain(ax.shard_model(env), cut)
    weights: list[dict[str, torch.Tensor]] = []
    for tx in (ax.identity, plan):
        state = ax.init(tx, make, adam)
        for _ in range(2):
            state, _ = ax.step(tx, lambda m, x: m(x))(state, x.view(2, 3, 8))
        weights.append({n: t.whole(p) for n, p in state.model.named_parameters()})
    one, other = weights
    return max(float((p - other[n]).abs().max()) for n, p in one.items())


def smoothed(env):
    """What is said of a loss that torch does not compute of cut logits."""

    def loss(model, batch):
        cut = model(batch[0]).mT
        return F.cross_entropy(cut, batch[0], label_smoothing=0.1)

    with pytest.raises(ax.LossError) as caught:
        gap(env, CASES["alone-logits"], loss)
    return str(caught.value)


def factored(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adafactor(trained)


WRONG = {  # what is wrong: (plan, words of the error)
    "no such module": ({"layers.*.mlp.9": "column"}, "matches no module"),
    "of another kind": ({"norm": "column"}, "is for a Linear, but norm is a LayerNorm"),
    "twice": ({"norm": "sequence", "**.norm": "gather"}, '"sequence\\+gather"'),
    "ties": ({"embed": "embedding"}, "are one weight, but the plan"),
    "heads": (
        {n: s for n, s in PLAN.items() if "near" not in n},
        'layers.0.attention.near.weight.* differ; write "partial"',
    ),
    "positions": (
        {n: s for n, s in POSITIONS.items() if n != "layers.1"},
        "layers.1.gain differ",
    ),
    "unknown": ("auto", "does not know layers.0.attention.q, .*write a plan"),
}


LAYERS = "base_model.model.model.layers.*.mlp."
ADAPTED = {  # an adapter of a Linear that is cut by inputs has its first table cut so
    LAYERS + "gate_proj": "column",
    LAYERS + "up_proj": "column",
    LAYERS + "down_proj.base_layer": "row",
    LAYERS + "down_proj.lora_A.default": "row",
}


def adapted(env):
    """The gap of peft's adapters over a split Llama, and what "auto" says of it."""
    env = ax.connect(env, axes="tensor=2")
    make, plan = lambda: peft.llama(True), ax.shard_tensors(env, ADAPTED)
    tx = ax.chain(
        plan, ax.shard_model(env), ax.clip(t.LIMIT), ax.with_schedule(t.curve)
    )
    judge = t.by_hand(make, peft.spoken, peft.adapters, t.batches())
    gap = t.apart(judge, train(env, tx, make, peft.spoken, peft.adapters))
    tx = ax.chain(ax.shard_tensors(env), ax.shard_model(env))
    with pytest.raises(ax.PlacementError) as caught:
        ax.init(tx, make, peft.adapters)
    return gap, str(caught.value)


def on_two(env, folder):
    found = {
        "adapted": adapted(env),
        "gaps": gaps(env, CASES) | reals(env, "tensor=2", "ddp", MODELS),
        "kept": kept(env, f"{folder}/2", "tensor=2", "ddp", LOGITS),
        "half": half(env),
        "wrong": {name: kindly(env, plan) for name, (plan, _) in WRONG.items()},
        "hook": kindly(env, PLAN, hook="bf16"),
        "squares": gap(env, CASES["alone-logits"], squares),
        "smoothed": smoothed(env),
        "lent": lent(env),
        "factored": kindly(env, PLAN, factored),
    }
    with pytest.raises(ax.PlacementError, match="share the rows of a batch"):
        ax.init(ax.shard_model(ax.connect(env, axes="tensor=2")), made)
    env = ax.connect(env, axes="tensor=2")
    tokens = t.batches()[0][0]
    tx = ax.chain(ax.shard_model(env), ax.shard_tensors(env))
    with ax.evaluating(ax.init(tx, real("llama"))) as model:
        found["text"] = written(env, model, tokens)
    return found


@cache
def two():
    folder = tempfile.mkdtemp()
    return run(2, timeout=240)(on_two)(folder)


def test_two_ranks_share_layers():
    """Every loss, norm and weight after every step is the hand-written loop's."""
    for rank in two():
        assert max(rank["gaps"].values()) < 1e-10, rank["gaps"]


def test_what_is_saved_goes_on_elsewhere():
    """One process goes on from ranks that share layers, and they from one process."""
    for rank in two():
        assert rank["kept"].pop("fork") == 0.0
        assert max(rank["kept"].values()) < 1e-10, rank["kept"]


def test_half_precision():
    """Losses part by rounding, and by less than from one step to the next."""
    for one, split in (rank["half"] for rank in two()):
        assert max(abs(a - b) for a, b in zip(one, split, strict=True)) < 0.02
        assert abs(one[0] - one[2]) > 0.04


@pytest.mark.parametrize("name", WRONG)
def test_a_plan_that_does_not_fit_is_refused(name):
    """By a name and what to write; a partial gradient that none would see, too."""
    for rank in two():
        assert re.search(WRONG[name][1], rank["wrong"][name]), rank["wrong"][name]


def test_adapters_train_over_a_split_base():
    """By a written plan (Llama's norms are float32); "auto" refuses unknown names."""
    for rank in two():
        gap, told = rank["adapted"]
        assert gap < 1e-6
        assert "does not know base_model.model.model.layers.0.self_attn" in told


def test_an_option_of_whole_weights_is_refused():
    """With what to do."""
    for rank in two():
        assert "not for a chain with shard_tensors" in rank["hook"]


def test_other_losses_of_cut_logits_are_those_of_whole_ones():
    """A mean over them has the gradient of all, and not of one rank's part."""
    for rank in two():
        assert rank["squares"] < 1e-10


def test_a_weight_that_another_module_uses_is_plain():
    """For a convolution, whose parent may call a kernel by itself."""
    for rank in two():
        assert rank["lent"] < 1e-10


def test_an_activation_that_learns_is_partial_between_cuts():
    """It sees the features that are here; of a model whose plan does not say so."""
    config = transformers.ApertusConfig(**SMALL)
    with torch.device("meta"):
        model = transformers.ApertusForCausalLM(config)
    found = tensor_plans.styles(model, "auto", 2)
    assert found["model.layers.0.mlp.act_fn"] == "partial"
    assert "model.layers.0.mlp.act_fn" not in tensor_plans.styles(
        model, [("model.layers.*.mlp.up_proj", "column")], 2
    )


def test_a_loss_that_wants_whole_logits_is_refused():
    """With the style to write."""
    for rank in two():
        assert 'got 0.1; write "column_gather"' in rank["smoothed"]


def test_an_optimizer_that_writes_whole_weights_is_refused():
    """By its name, where no axis but tensor divides them, too."""
    for rank in two():
        assert "Adafactor wants whole weights" in rank["factored"]
        assert "those of tensor" in rank["factored"]


def test_a_split_model_generates():
    """The same tokens as on one process."""
    wanted = written(ax.Env(), real("llama")().eval(), t.batches()[0][0])
    assert [rank["text"] for rank in two()] == [wanted, wanted]


def on_four(env, folder):
    axes = "data=2,tensor=2"
    return {
        "gaps": gaps(env, WIDE) | reals(env, axes, "fsdp2", ["llama"]),
        "kept": kept(env, f"{folder}/4", axes, "fsdp2", PLAN),
        "drawn": drawn(env, axes),
    }


def drawn(env, axes):
    """Whether ranks that share rows draw alike, and others do not."""
    ax.seed(ax.connect(env, axes=axes), 0, per_rank=True)
    numbers = ax.gather_objects(env, float(torch.rand(())))
    return numbers[0] == numbers[1] != numbers[2] == numbers[3]


def test_four_ranks_share_layers_and_rows():
    """Beside copies and slices of the model, whole numbers of rows, and saves."""
    for rank in run(4, timeout=150)(on_four)(tempfile.mkdtemp()):
        assert max(rank["gaps"].values()) < 1e-10, rank["gaps"]
        assert rank["kept"].pop("fork") == 0.0
        assert max(rank["kept"].values()) < 1e-10, rank["kept"]
        assert rank["drawn"]


def apart_in_one(env):
    """A run whose row is never added up over ranks: what must not pass."""
    env = ax.connect(env, axes="tensor=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PLAN, "layers.*.mlp.2", "column_gather")  # of the wrong inputs
        try:
            return gap(env, ("tensor=2", "ddp", PLAN, 1, "module"), masked)
        except RuntimeError:
            return float("inf")


def test_control_another_plan_is_another_run():
    """The comparison sees a layer that is put together wrongly."""
    assert min(run(2)(apart_in_one)()) > 1e-3


@pytest.mark.parametrize(
    ("plan", "words"),
    [("rows", 'wants "auto" or a mapping'), ({"a": "colum"}, "write 'column'")],
)
def test_a_word_that_is_no_style_is_refused_at_once(plan, words):
    """Before a process starts, with the nearest word."""
    env = ax.Env(world=2, axes=(ax.Axis("tensor", 2),))
    with pytest.raises(ax.PlacementError, match=words):
        ax.shard_tensors(env, plan)


def test_a_wrong_plan_is_wrong_on_one_process_too():
    """There it would cut nothing, and the error come on the cluster."""
    tx = ax.chain(ax.shard_model(ENV), ax.shard_tensors(ENV, {"norm": "column"}))
    with pytest.raises(ax.PlacementError, match="is a LayerNorm"):
        ax.init(tx, made, adam)
    with pytest.raises(ax.PlacementError, match="wants shard_model in the chain"):
        ax.init(ax.shard_tensors(ENV, PLAN), made, adam)


def test_the_axis_is_the_innermost():
    """Where ranks are nearest; and there is one."""
    axes = (ax.Axis("tensor", 2), ax.Axis("data", 2))
    with pytest.raises(ax.PlacementError, match="innermost"):
        ax.shard_tensors(ax.Env(world=4, axes=axes))
    with pytest.raises(ax.PlacementError, match="has data"):
        ax.shard_tensors(ax.Env(world=4))
