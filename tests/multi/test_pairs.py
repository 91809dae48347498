"""Ways to divide a run, two and more at a time: the run of one process, or an error.

docs/parallel.md has the table of every pair; tests/unit/test_parallel_page.py holds it
to what is tried here.
"""

import tempfile
from functools import cache

import pytest
import torch
import torch._dynamo  # optimizers import it when first made: here, not in each rank
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor.parallel
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax
from accelx import testing
from accelx.engines.packed import Form, pack, unpack
from accelx.env_part import rows_env
from accelx.passes.with_precision import LossScale
from tests import parallel_page
from tests.laws import training as t

pytestmark = [
    pytest.mark.multi,
    t.quiet_views,
    pytest.mark.filterwarnings("ignore:While redistributing:UserWarning"),
    # torch says these while it traces
    pytest.mark.filterwarnings("ignore:The .grad attribute of:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* should not be inst:DeprecationWarning"),
]
WIDTH, HEADS, TOKENS, LENGTH, COUNT = 8, 4, 12, 12, 4
ROWS = (6, 1, 4)
PACKED = "layers.0.mlp.0"  # frozen, and packed, where a case has quantize
DECAY = 0.6


class Attention(nn.Module):
    """Counts the heads that are here."""

    def __init__(self):
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = (
            f(x).view(*x.shape[:-1], -1, WIDTH // HEADS).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """One expert a row."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(COUNT, WIDTH, WIDTH) / 2)

    def forward(self, tokens, index, weights):
        each = torch.einsum("tw,tkwv->tkv", tokens, self.weight[index])
        return (torch.tanh(each) * weights[..., None]).sum(1)


class Mixture(nn.Sequential):
    """A router, the experts that it chooses two of, and an MLP for every token."""

    def __init__(self, *shared):
        super().__init__(*shared)
        self.router, self.experts = nn.Linear(WIDTH, COUNT), Experts()

    def forward(self, x):
        flat = x.flatten(0, -2)
        weights, index = self.router(flat).softmax(-1).topk(2)
        up, act, down = self[0], self[1], self[2]
        return self.experts(flat, index, weights).view_as(x) + down(act(up(x)))


class Block(nn.Module):
    """Attention, and an MLP or a mixture."""

    def __init__(self, mixed):
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        up, down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.mlp = (Mixture if mixed else nn.Sequential)(up, nn.GELU(), down)

    def forward(self, x):
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class Net(nn.Module):
    """A head that is the table, over the first and the last stage."""

    def __init__(self, mixed=False):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList([Block(mixed), Block(mixed)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, places):
        x = self.embed(tokens) + self.places(places)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@cache
def made(mixed=False, packed=False, dtype=torch.float64):
    """A function that makes the same model each time."""

    def make():
        torch.manual_seed(3)
        model = Net(mixed).to(dtype)
        if packed:
            model.get_submodule(PACKED).weight.requires_grad_(False)
        return model

    return make


def rounded():
    """The model with the floats that its packed weight stands for."""
    model = made(packed=True)()
    weight = model.get_submodule(PACKED).weight
    form = Form("int8", weight.shape[1], weight.dtype)
    weight.data.copy_(unpack(pack(weight, "int8"), form))
    return model


def batches(dtype=torch.float64):
    """(tokens, labels, places, weights): rows of one length, tokens that count."""
    draw, found = torch.Generator().manual_seed(2), []
    for n in ROWS:
        tokens = torch.randint(TOKENS, (n, LENGTH + 1), generator=draw)
        weights = (torch.rand(n, LENGTH, generator=draw) < 0.6).to(dtype)
        weights[:, 0] = 1
        places = torch.arange(LENGTH).expand(n, -1).contiguous()
        labels = tokens[:, 1:].contiguous()
        found.append((tokens[:, :-1].contiguous(), labels, places, weights))
    return found


def loss(model, batch):
    """A mean over tokens."""
    tokens, labels, places, weights = batch
    each = F.cross_entropy(model(tokens, places).mT, labels, reduction="none")
    return ax.Mean((each * weights).sum(), weights.sum())


def uneven(model, batch):
    """What must not pass: the mean of each part's own mean."""
    value = loss(model, batch)
    return value.total / value.weight


PLAN = {
    "layers.*.attention.[qkv]": "column",
    "layers.*.attention.o": "row",
    "layers.*.mlp.0": "column",
    "layers.*.mlp.2": "row",
    "embed": "embedding",
    "head": "column_gather",
}


def sgd(model):
    """One step is linear in the gradient."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)


def outer(params):
    """Goes where the ranks went."""
    return torch.optim.SGD(params, 1.0)


PASSES = {  # name: the pass of a chain, on an Env
    "shard_tensors": lambda env: ax.shard_tensors(env, PLAN),
    "shard_sequence": lambda env: ax.shard_sequence(env),
    "shard_stages": lambda env: ax.shard_stages(env, "layers.1", 2),
    "shard_experts": lambda env: ax.shard_experts(env, "layers.*.mlp.experts"),
    "with_local_sgd": lambda env: ax.with_local_sgd(env, 1),
    "with_diloco": lambda env: ax.with_diloco(env, 1, outer),
    "with_ema": lambda env: ax.with_ema(DECAY),
    "remat": lambda env: ax.remat("layers.*"),
    "compile": lambda env: ax.compile("layers.1.mlp", backend="eager"),
    "quantize": lambda env: ax.quantize("int8", PACKED),
    "accumulate": lambda env: ax.accumulate(2),
}
APART = {"with_local_sgd", "with_diloco"}
ALL = ("with_ema", "remat", "accumulate", "save_state")
TENSOR, EXPERT = ("shard_tensors", *ALL), ("shard_experts", *ALL)
STAGE, SEQUENCE = ("shard_stages", *ALL), ("shard_sequence", *ALL)
CASES = {  # ranks: [(axes, kind, *names)]
    2: [
        ("tensor=2", "ddp", *TENSOR, "compile"),
        ("sequence=2", "ddp", *SEQUENCE, "quantize"),
        ("stage=2", "ddp", *STAGE, "compile"),
        ("expert=2", "ddp", *EXPERT, "compile"),
        ("data=2", "ddp", *ALL, "compile", "quantize"),
        ("data=2", "fsdp2", *ALL, "compile", "quantize"),
        ("replicate=1,shard=2", "hsdp", *ALL, "compile", "quantize"),
        ("data=2", "deepspeed", *ALL, "compile"),
        ("data=2", "ddp", "with_local_sgd", *ALL, "compile", "quantize"),
        ("data=2", "ddp", "with_diloco", *ALL, "compile", "quantize"),
    ],
    4: [
        ("stage=2,tensor=2", "ddp", *STAGE, "shard_tensors", "compile"),
        ("replicate=1,shard=2,tensor=2", "hsdp", *TENSOR),
        ("replicate=1,shard=2,stage=2", "hsdp", *STAGE),
        ("data=2,stage=2", "fsdp2", *STAGE),
        ("sequence=2,tensor=2", "fsdp2", *SEQUENCE, "shard_tensors"),
        ("stage=2,sequence=2", "fsdp2", *SEQUENCE, "shard_stages"),
        ("stage=2,expert=2", "ddp", *STAGE, "shard_experts"),
        ("sequence=2,expert=2", "ddp", *SEQUENCE, "shard_experts"),
        ("sequence=2,expert=2", "fsdp2", *SEQUENCE, "shard_experts"),
        ("replicate=2,shard=1,sequence=2", "hsdp", *SEQUENCE),
        ("replicate=1,shard=2,expert=2", "hsdp", *EXPERT),
        ("expert=2,tensor=2", "fsdp2", *EXPERT, "shard_tensors"),
    ],
}


def dtype_of(case):
    """DeepSpeed has no float64."""
    return torch.float32 if "deepspeed" in case else torch.float64


def model_of(case):
    """The function that makes the model of a case."""
    return made("shard_experts" in case, "quantize" in case, dtype_of(case))


@cache
def judge(make, dtype, optim, limit):
    """The run of one process by hand."""
    return t.by_hand(make, loss, optim, batches(dtype), limit)


def judged(case):
    """The judge of a case."""
    make = rounded if "quantize" in case else model_of(case)
    return judge(make, dtype_of(case), *method(case))


def method(case):
    """The optimizer and the limit of norms: ranks that train apart have none.

    In float32 moments would blow up the gradient of keys' bias, which is rounding.
    """
    if APART & {*case}:
        return sgd, 1e9
    return (sgd if "deepspeed" in case else t.grouped), t.LIMIT


def average(trace):
    """The average of with_ema, in closed form."""
    found = trace[0].weights
    for step in trace[1:]:
        found = {n: DECAY * w + (1 - DECAY) * step.weights[n] for n, w in found.items()}
    return found


def held(model):
    """What this rank's model has of each weight that is trained, in full."""
    named = model.named_parameters()
    return {n: t.whole(p).clone() for n, p in named if p.requires_grad}


def off(weights, wanted):
    assert weights
    return max((w - wanted[n]).abs().max().item() for n, w in weights.items())


def chained(env, case, *first):
    """The chain of a case, but for saves, after some passes."""
    _, kind, *names = case
    clip = ax.identity if APART & {*names} else ax.clip(t.LIMIT)
    passes = [PASSES[name](env) for name in names if name != "save_state"]
    place = ax.shard_model(env, kind)
    return ax.chain(*first, *passes, place, clip, ax.with_schedule(t.curve))


def trained(env, case, loss=loss, tx=None):
    """The last state of a case, and the gaps of losses, norms and weights."""
    tx, data = tx or chained(env, case), batches(dtype_of(case))
    state, gaps = ax.init(tx, model_of(case), method(case)[0]), [0.0]
    step = ax.step(tx, loss)
    for batch, want in zip(data, judged(case), strict=True):
        state, out = step(state, t.part(rows_env(env), batch))
        assert out.stepped, out.skipped
        gaps.append(abs(float(out.loss) - want.loss))
        if out.norm is not None:
            gaps.append(abs(float(out.norm) - want.norm))
        if "deepspeed" not in case:  # which has weights whole at the end
            gaps.append(off(held(state.model), want.weights))
    return state, max(gaps)


def tried(env, case, folder):
    """How far each of a case's numbers lies from the judge's."""
    env, wanted = ax.connect(env, axes=case[0]), judged(case)
    state, gap = trained(env, case)
    with ax.averaged(state) as averaged:
        mean = off(held(averaged), average(wanted))
    ax.save_state(env, folder)(state)
    ax.barrier(env)
    pack = ax.quantize("int8", PACKED) if "quantize" in case else ax.identity
    load = ax.load_state(ax.Env(), folder, only="model.**")
    back = ax.init(ax.chain(pack, load), model_of(case)(), None)
    return gap, mean, off(held(back.model), wanted[-1].weights)


@cache
def found(ranks):
    """Of each rank, the gaps of every case; and what else is asked of the ranks."""
    for case in CASES[ranks]:
        judged(case)  # before the fork
    folder = tempfile.mkdtemp()

    def rank(env):
        cases = [tried(env, c, f"{folder}/{i}") for i, c in enumerate(CASES[ranks])]
        return cases, more[ranks](env)

    more = {2: lambda env: (control(env), halves(env, 2), refused(env))}
    more[4] = lambda env: (counts(env), halves(env, 4), staged(env))
    return testing.run(ranks, timeout=270)(rank)()


@pytest.mark.parametrize("ranks", CASES)
def test_it_is_the_run_of_one_process(ranks):
    """Losses, norms, weights, averages and what is loaded from a save, of each case."""
    for gaps, _ in found(ranks):
        for case, gap in zip(CASES[ranks], gaps, strict=True):
            assert max(gap) < (1e-5 if "deepspeed" in case else 1e-10), case


def control(env):
    """The gaps of the mean of means, in two layouts: what must not pass."""
    found = []
    for axes, name in (("tensor=2", "shard_tensors"), ("stage=2", "shard_stages")):
        case = (axes, "ddp", name, "accumulate")
        found.append(trained(ax.connect(env, axes=axes), case, uneven)[1])
    return found


def test_control_the_mean_of_means_is_another_run():
    """The comparison sees a loss that each microbatch divides by its own tokens."""
    assert min(gap for _, (gaps, *_) in found(2) for gap in gaps) > 1e-4


AXIS = {  # what a pass wants of the mesh
    "hsdp": "replicate=1,shard=2",
    "shard_sequence": "sequence=2",
    "shard_stages": "stage=2",
    "shard_experts": "expert=2",
    "shard_tensors": "tensor=2",
}
ON_ONE = ("remat", "compile", "quantize")  # with which XLA could be asked for


def refused(env):
    """What each of the pairs that are refused raises: none of them wants two axes."""
    said = parallel_page.refusals()
    pairs = [p for p, mark in parallel_page.pairs().items() if mark in said]
    return {pair: error_of(env, pair) for pair in pairs}


def error_of(env, pair):
    axes = next((AXIS[name] for name in pair if name in AXIS), "data=2")
    env = ax.connect(env, axes=axes)
    if "xla" in pair and {*ON_ONE} & {*pair}:
        env = ax.Env(device="xla")
    kinds = [name for name in pair if name not in PASSES] or ["ddp"]
    try:
        passes = [PASSES[name](env) for name in pair if name in PASSES]
        tx = ax.chain(*passes, *(ax.shard_model(env, kind) for kind in kinds))
        ax.init(tx, made("shard_experts" in pair, "quantize" in pair)(), sgd)
    except ax.AccelxError as error:
        return str(error)
    return "nothing"


def test_what_does_not_go_together_says_why():
    """On every rank, in the words of the page."""
    marks, words = parallel_page.pairs(), parallel_page.refusals()
    for _, (*_, errors) in found(2):
        assert errors
        for pair, error in errors.items():
            assert words[marks[pair]] in error, (pair, error)


FED = (  # axes
    *("data=2,tensor=2", "data=2,sequence=2", "data=2,stage=2", "data=2,expert=2"),
    *("replicate=2,shard=2", "stage=2,tensor=2", "data=4"),
    *("replicate=2,shard=1,sequence=2", "expert=2,tensor=2"),
)


def counts(env):
    """What each layout hands on of 11 samples, three ways, and how many it counts."""
    data, found = TensorDataset(torch.arange(11)), {}
    for axes in FED:
        env = ax.connect(env, axes=axes)
        loader, rows, seen = DataLoader(data, 4), [], ax.Mean(0.0, 0)
        for (batch,) in ax.feed(ax.shard_loader(env), loader, stop=3):
            rows += ax.gather_rows(env, batch, batch).tolist()
            real = ax.gather_rows(env, batch, batch)
            share = ax.split(env, real)
            seen = seen + ax.Mean(share.sum(), len(share))
        total = ax.reduce(env, seen)
        found[axes] = rows, float(total.total), float(total.weight)
    return found


def test_each_sample_counts_once_along_every_axis():
    """Fed, gathered, divided by hand and reduced."""
    for _, (layouts, *_) in found(4):
        assert layouts.keys() == {*FED}
        for axes, got in layouts.items():
            assert got == (list(range(11)), 55.0, 11.0), axes


LATER = ["layers.0", "layers.1", "norm"]  # four stages
POSITIONS = PLAN | {  # sequence parallel
    **dict.fromkeys(("embed", "places"), "embedding_scatter"),
    **dict.fromkeys(("layers.*.first", "layers.*.second"), "sequence"),
    **dict.fromkeys(("layers.*.attention", "layers.*.mlp"), "gather"),
    **dict.fromkeys(("layers.*.attention.o", "layers.*.mlp.2"), "row_scatter"),
    "norm": "sequence_gather",
}
OWN = POSITIONS | {  # the mixture works on a rank's own positions
    "layers.*.attention": "gather",
    "layers.*.mlp.0": "gather+column",
    **dict.fromkeys(("layers.*.mlp.router", "layers.*.mlp.experts"), "partial"),
}
del OWN["layers.*.mlp"]
STAGED = {  # schedule: plan
    "interleaved": PLAN | {"head": "loss"},
    "looped_bfs": PLAN | {"norm": "scatter+sequence_gather"},
    "zbv": POSITIONS,
}


def staged(env):
    """The gaps of layers that are cut in two stages a rank; lengths that cross.

    And what a batch and a plan are told that do not fit.
    """
    env, found, said = ax.connect(env, axes="stage=2,tensor=2"), {}, []

    def tx(plan, schedule):
        cut = ax.shard_stages(env, LATER, 2, schedule)
        rest = (ax.clip(t.LIMIT), ax.with_schedule(t.curve))
        return ax.chain(ax.shard_tensors(env, plan), cut, ax.shard_model(env), *rest)

    case = ("stage=2,tensor=2", "ddp", "shard_stages", "shard_tensors")
    found["ring"], found["experts"] = ringed(env), dealt_positions(env)
    for schedule, plan in STAGED.items():
        state, found[schedule] = trained(env, case, loss, tx(plan, schedule))
    route, _ = next(iter(state.slots["shard_model"].stages.routes.values()))
    cross = [crossing.like[0].size(1) for crossing in route.crossings]
    odd = tuple(x[:, :-1] for x in batches()[0])
    with pytest.raises(ax.DataError) as caught:
        ax.step(tx(POSITIONS, "zbv"), loss)(state, odd)
    said.append(str(caught.value))
    with pytest.raises(ax.PlacementError) as caught:
        ax.init(tx(PLAN | {"layers": "gather"}, "zbv"), made(), t.grouped)
    said.append(str(caught.value))
    env = ax.connect(env, axes="stage=2,expert=2")
    dealt = (PASSES["shard_experts"](env), ax.shard_model(env))
    cut = ax.shard_stages(env, LATER, 2, "zbv")
    with pytest.raises(ax.PlacementError) as caught:
        ax.init(ax.chain(cut, *dealt), made(True), t.grouped)
    return found, cross, [*said, str(caught.value)]


def dealt_positions(env):
    """The gap of experts of which each rank is given its own positions."""
    case = ("expert=2,tensor=2", "fsdp2", "shard_experts", "accumulate")
    env = ax.connect(env, axes=case[0])
    tx = chained(env, case, ax.shard_tensors(env, OWN))
    return trained(env, case, loss, tx)[1]


def ringed(env):
    """The gap of tokens over ranks, of a mean of ranks that share rows."""
    env = ax.connect(env, axes="stage=2,sequence=2")
    cut = (ax.shard_stages(env, LATER, 2, "zbv"), ax.shard_sequence(env, "ring"))
    rest = (ax.shard_model(env), ax.clip(t.LIMIT), ax.with_schedule(t.curve))
    tx, gaps = ax.chain(*cut, *rest), []
    state, step = ax.init(tx, made(), t.grouped), ax.step(tx, bare)
    judge = t.by_hand(made(), bare, t.grouped, batches(), t.LIMIT)
    for batch, want in zip(batches(), judge, strict=True):
        state, out = step(state, batch)
        gaps += [abs(float(out.loss) - want.loss), off(held(state.model), want.weights)]
    return max(gaps)


def bare(model, batch):
    """A plain mean over rows and tokens."""
    return F.cross_entropy(model(batch[0], batch[2]).mT, batch[1])


def test_layers_are_cut_in_each_schedule():
    """Logits that stay cut, too, and positions, of which stages hand on a part."""
    for _, (*_, (gaps, cross, said)) in found(4):
        assert max(gaps.values()) < 1e-10, gaps
        assert cross == [LENGTH // 2] * 3
        assert "do not divide 11; pad rows to a length of 12" in said[0]
        assert "layers to cut or join positions by 'gather'" in said[1]
        assert "for which shard_experts would have gathered them no more" in said[2]


HALF = {  # ranks: (axes, kind, pass)
    2: [("tensor=2", "ddp", "shard_tensors"), ("stage=2", "ddp", "shard_stages")],
    4: [
        ("replicate=2,shard=2", "hsdp", "remat"),
        ("stage=2,tensor=2", "ddp", "shard_stages", "shard_tensors"),
        ("data=2,expert=2", "fsdp2", "shard_experts"),
    ],
}


def halves(env, ranks):
    """fp16, with one gradient of the last rank that is infinite in the second step."""
    return [half(ax.connect(env, axes=case[0]), case) for case in HALF[ranks]]


def half(env, case):
    """Which steps were skipped, and the loss scale after each."""
    data, now = batches(torch.float32), []
    tx = chained(env, case, ax.with_precision("fp16"))
    mixed = "shard_experts" in case
    state = ax.init(tx, made(mixed, False, torch.float32), t.grouped)
    state = ax.with_slot(state, "loss_scale", LossScale(scale=256.0))

    def spoilt(grad):
        return grad * float("inf") if len(now) == 1 else grad

    def behind(module, args, out):
        if out.requires_grad:
            out.register_hook(spoilt)

    if env.rank == env.world - 1:
        state.model.layers[1].second.register_forward_hook(behind)
    step = ax.step(tx, loss)
    for batch in [data[0], *data]:
        state, out = step(state, t.part(rows_env(env), batch))
        now.append((out.stepped, state.slots["loss_scale"].scale))
    return now


@pytest.mark.parametrize("ranks", CASES)
def test_an_overflow_on_one_rank_is_skipped_by_all(ranks):
    """Wherever it is, and the scale is halved once, on each rank."""
    wanted = [(True, 256.0), (False, 128.0), (True, 128.0), (True, 128.0)]
    for _, (_, cases, *_) in found(ranks):
        assert cases == [wanted] * len(HALF[ranks])
