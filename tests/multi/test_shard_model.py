"""Every option of shard_model on four ranks, held to one process and torch alone."""

import re
import warnings
from collections import Counter
from functools import cache

import attrs
import pytest
import torch
from torch import distributed as dist, nn
from torch.optim import adam
from torch.utils._python_dispatch import TorchDispatchMode

import accelx as ax
from accelx import testing
from accelx.engines import plain, whole
from accelx.saves.commit import open_manifest, resolve
from tests.laws import odd, training as t
from tests.multi import test_engines as gan

pytestmark = [pytest.mark.multi, t.quiet_views]
AXES = "replicate=2,shard=2"
DATA = t.batches()
MADE = t.made()
EXACT = 1e-12


def flat(env):
    """The same ranks on one axis."""
    return attrs.evolve(env, axes=(ax.Axis("data", env.world),))


def at(env, kind):
    """Which of how many slices this rank of four holds."""
    return (env.rank % 2, 2) if kind == "hsdp" else (env.rank, env.world)


@cache
def judge(make, loss):
    """The run by hand that cases are held to; of many it is the same."""
    return t.by_hand(make, loss, t.grouped, DATA)


def gap(env, kind, *rest, loss=t.masked, make=MADE, module=False, **more):
    """How far a run lies from the one by hand; the model as a function or a module."""
    split = more.pop("split", t.even)
    where = env if kind == "hsdp" else flat(env)
    place = ax.shard_model(where, kind, **{"blocks": "layers.*", **more})
    tx = ax.chain(place, *rest, ax.clip(t.LIMIT), ax.with_schedule(t.curve))
    run = t.train(tx, where, make() if module else make, loss, t.grouped, DATA, split)
    return t.apart(judge(make, loss), run, *at(env, kind))


def miscounted(env):
    """The gap where clip counts each copy of a slice."""
    tx = t.pipeline(env, "hsdp")
    state = ax.init(tx, t.made(), t.grouped)
    placed = state.slots["shard_model"]
    placed = attrs.evolve(placed, handle=attrs.evolve(placed.handle, copies=1))
    state = ax.with_slot(state, "shard_model", placed)
    state, out = ax.step(tx, t.bare)(state, t.part(env, DATA[0]))
    judge = t.by_hand(t.made(), t.bare, t.grouped, DATA[:1])
    run = t.Step(float(out.loss), out.norm.item(), t.weights(state.model))
    return t.apart(judge, [run], *at(env, "hsdp"))


def groups(args):
    """The ranks of each process group among the arguments of a collective."""
    boxed = [x for x in args if isinstance(x, torch.ScriptObject)]
    found = [dist.ProcessGroup.unbox(x) for x in boxed if "ProcessGroup" in str(x)]
    return [dist.get_process_group_ranks(group) for group in found]


class Collectives(TorchDispatchMode):
    """Counts the collectives that run inside it, by kind."""

    def __init__(self):
        super().__init__()
        self.counts, self.order, self.sizes = Counter(), [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func.name().partition("::")
        if space == "c10d":
            self.counts[name] += 1
            self.sizes |= {len(g) for g in groups(args) if "gather" in name}
        self.order += [name] if space == "c10d" or name == "tanh" else []
        return func(*args, **(kwargs or {}))


def reductions(env, n):
    """How many collectives of each kind a step with n microbatches makes."""
    tx = t.pipeline(env, "hsdp", ax.accumulate(n))
    state = ax.init(tx, t.made(), t.grouped)
    step, batch = ax.step(tx, t.bare), t.batches(rows=(12,))[0]
    state, _ = step(state, t.part(env, batch))
    with Collectives() as seen:
        step(state, t.part(env, batch))
    return dict(seen.counts)


def alone(env, kind, **options):
    """The gap of a loop of one's own, without a pipeline."""
    where = env if kind == "hsdp" else flat(env)
    data = t.batches(rows=(8, 8))
    model = ax.shard_model(where, kind, blocks="layers.*", **options)(t.made()())
    optim = t.grouped(model)
    for batch in data:
        t.bare(model, [x[2 * env.rank : 2 * env.rank + 2] for x in batch]).backward()
        optim.step()
        optim.zero_grad()
    run = [t.Step(0.0, 0.0, t.weights(model))]
    judge = t.by_hand(t.made(), t.bare, t.grouped, data, 1e9, lambda k: 1.0)[-1:]
    judge = [attrs.evolve(judge[0], loss=0.0, norm=0.0)]
    return t.apart(judge, run, *at(env, kind))


def evaluated(env, kind, stale=False, **options):
    """The gap of a run that calls the model between gradients and update, and forks."""
    where = env if kind == "hsdp" else flat(env)
    tx = t.pipeline(where, kind, **options)
    state = ax.init(tx, t.made(), t.grouped)
    if stale:
        placed = state.slots["shard_model"]
        engine = attrs.evolve(placed.engine, update=plain.update)
        state = ax.with_slot(state, "shard_model", attrs.evolve(placed, engine=engine))
    trace = []
    for k, batch in enumerate(DATA):
        state, out = ax.grads(tx, t.bare)(state, t.part(env, batch))
        state = ax.fork(state) if k == 1 and not stale else state
        with torch.no_grad():
            state.model(batch[0])  # gathers, and nothing lets go of it
        state, out = ax.apply(tx)(state, out)
        trace.append(t.Step(float(out.loss), out.norm.item(), t.weights(state.model)))
    judge = t.by_hand(t.made(), t.bare, t.grouped, DATA)
    return t.apart(judge, trace, *at(env, kind))


HYBRID = {
    "module": lambda env: gap(env, "hsdp", module=True),
    "function": lambda env: gap(env, "hsdp", loss=t.bare),
    "lopsided": lambda env: gap(env, "hsdp", ax.accumulate(3), split=t.lopsided),
    "accumulated": lambda env: gap(env, "hsdp", ax.accumulate(2), module=True),
    "without-blocks": lambda env: gap(env, "hsdp", ax.accumulate(5), blocks=None),
    "alone": lambda env: alone(env, "hsdp"),
    "evaluated": lambda env: evaluated(env, "hsdp"),
    "evaluated-fsdp2": lambda env: evaluated(env, "fsdp2"),
}
HYBRID_CONTROLS = {
    "mean-of-means": lambda env: gap(env, "hsdp", loss=t.mean_of_means),
    "copies-counted": miscounted,
    "stale": lambda env: evaluated(env, "hsdp", stale=True),
}


def all_of(cases):
    """A function of ranks that runs each case."""
    return lambda env: {name: case(env) for name, case in cases.items()}


@cache
def hybrid():
    """Each case of hsdp, by rank, in one launch."""
    counts = {n: lambda env, n=n: reductions(env, n) for n in (1, 3)}
    cases = HYBRID | HYBRID_CONTROLS | counts
    judge(MADE, t.masked)  # before the fork, for all ranks at once
    return testing.run(4, axes=AXES, timeout=150)(all_of(cases))()


@pytest.mark.parametrize("case", HYBRID)
def test_hsdp_makes_the_run_of_one_process(case):
    """Two copies of two slices: losses, norms and weights are the plain loop's."""
    found = [rank[case] for rank in hybrid()]
    assert max(found) < EXACT, found


@pytest.mark.parametrize("case", HYBRID_CONTROLS)
def test_control_the_comparison_sees(case):
    """Means of means, a norm that counts copies, and weights that stay gathered."""
    assert min(rank[case] for rank in hybrid()) > 1e-3


def test_hsdp_reduces_once_a_step():
    """Microbatches gather again and reduce no more: over slices, then over copies."""
    for rank in hybrid():
        once, thrice = rank[1], rank[3]
        for kind in ("reduce_scatter", "allreduce"):
            ones = {k: v for k, v in once.items() if kind in k.lower()}
            assert ones
            assert ones == {k: v for k, v in thrice.items() if kind in k.lower()}
        assert sum(thrice.values()) > sum(once.values())  # the count sees microbatches


def described(env, kind, folder, load=None):
    """All of a state after two steps on `kind`, saved to `folder`; or one loaded."""
    name, options = LAYOUTS[kind][2:]
    place = ax.identity if name == "plain" else ax.shard_model(env, name, **options)
    more = () if load is None else (ax.load_state(env, load),)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1 if load is None else 2)
    tx = ax.chain(place, *more)
    state = ax.init(tx, odd.Odd(False), odd.adamw)
    share = 12 // env.world
    for k in range(2 if load is None else 0):
        rows = odd.batch(k)[env.rank * share : (env.rank + 1) * share]
        state, _ = ax.step(tx, odd.loss)(state, rows)
    if load is None:
        folder = ax.save_state(env, folder)(state)
    found = odd.described(state)
    rows = odd.batch(9)[env.rank * share : (env.rank + 1) * share]
    state, _ = ax.step(tx, odd.loss)(state, rows)
    return folder, found, odd.described(state)["model.up.weight"]


WHOLE = {"ignored": ("one", "up.*"), "offload": True, "reshard_after_forward": False}
LAYOUTS = {  # ranks, axes, kind, options
    "plain": (1, None, "plain", {}),
    "fsdp2": (2, None, "fsdp2", {}),
    "ddp": (3, None, "ddp", {"bucket_mb": 1}),
    "hsdp": (4, AXES, "hsdp", {}),
    "whole": (2, None, "fsdp2", WHOLE),
}


def on(kind, jobs):
    """`described` of each job, in one launch on the ranks of a layout: rank 0's."""
    world, axes = LAYOUTS[kind][:2]

    def rank(env):
        return {name: described(env, kind, *job) for name, job in jobs.items()}

    return testing.run(world, axes=axes, timeout=90)(rank)()[0]


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """Layout -> URL and what was saved."""
    folder = tmp_path_factory.mktemp("layouts")
    return {k: on(k, {k: (str(folder / k),)})[k] for k in LAYOUTS}


@pytest.fixture(scope="module")
def loads(saves):
    """Reader -> writer -> what was loaded: hsdp reads all, and all read hsdp's."""
    urls = {kind: (None, saved[0]) for kind, saved in saves.items()}
    return {k: on(k, urls if k == "hsdp" else {"hsdp": urls["hsdp"]}) for k in LAYOUTS}


@pytest.mark.parametrize("other", LAYOUTS)
def test_hsdp_loads_what_others_saved_and_they_what_it_did(saves, loads, other):
    """Weights, moments and options to the bit (L5), and the next step from there."""
    for writer, reader in {("hsdp", other), (other, "hsdp")}:
        _, wanted, after = saves[writer]
        _, found, then = loads[reader][writer]
        assert odd.differing(wanted, found) == []
        assert (then - after).abs().max() < EXACT


def test_a_copied_slice_is_written_once(saves):
    """Pieces of hsdp tile each tensor, and its folder is no larger than fsdp2's."""
    sizes = {}
    for kind in ("plain", "hsdp"):
        url = resolve(saves[kind][0])
        manifest = open_manifest(url)[1]
        sizes[kind] = 0
        for name, entry in manifest.tensors.items():
            if name == "random":
                continue
            pieces = manifest.layouts[entry.layout]
            held = sum(piece.box.volume for piece in pieces)
            assert held == torch.Size(entry.shape).numel(), name
            sizes[kind] += held
    assert sizes["plain"] == sizes["hsdp"]


class Tiny(t.Net):
    """Weights of no dim, one row and six, a module called twice, and two methods."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.8))
        self.one = nn.Parameter(torch.full((1,), 0.3))
        self.six = nn.Parameter(torch.linspace(-1, 1, t.WIDTH))
        self.thin = nn.Parameter(torch.randn(1, t.WIDTH) / 3)
        self.twice = nn.Linear(t.WIDTH, t.WIDTH)
        self.calls = 0

    def encode(self, tokens):
        """(rows, length, WIDTH) of tokens."""
        self.calls += 1
        x = self.twice(self.embed(tokens)) * self.scale + self.six
        for layer in self.layers:
            x = layer(x)
        return self.twice(torch.tanh(x)) * self.one + self.thin

    def forward(self, tokens):
        return self.head(self.encode(tokens))

    def scored(self, tokens):
        """What forward gives, by way of it."""
        return self(tokens)

    def around(self, tokens):
        """What forward gives, and not by way of it."""
        return self.head(self.encode(tokens))


def tiny():
    """The same Tiny each time."""
    torch.manual_seed(3)
    return Tiny().double()


def by(method):
    """A mean over tokens that calls a method in place of the model."""

    def loss(model, batch):
        logits = getattr(model, method)(batch[0])
        wanted = batch[0].roll(-1, dims=1)
        each = nn.functional.cross_entropy(logits.mT, wanted, reduction="none")
        return ax.Mean((each * batch[1]).sum(), batch[1].sum())

    return loss


def small(env, kind, *rest, **options):
    """The gap of Tiny, whose scalar stays whole."""
    options = {"make": tiny, "ignored": "scale", "blocks": BLOCKS, **options}
    return gap(env, kind, *rest, **options)


BLOCKS = ("layers.*", "twice")
FROZEN = ("**.bias", nn.LayerNorm, "embed")  # globs over weights, a class, a module
OPTIONS = {
    "kept": {"reshard_after_forward": False},
    "offloaded": {"offload": True},
    "ahead": {"prefetch": 1},
    "far-ahead": {"prefetch": 9, "reshard_after_forward": False},
    "whole": {"ignored": ("scale", *FROZEN)},
    "whole-by-function": {"ignored": lambda name, p: p.numel() < 7},
    "all-whole": {"ignored": "**"},
    "method-by-forward": {"loss": by("scored"), "methods": "scored"},
    "method": {"loss": by("around"), "methods": ("around", "encode")},
    "everything": {
        "reshard_after_forward": False,
        "offload": "cpu",
        "prefetch": 2,
        "ignored": ("scale", "**.bias"),
        "unused": "allow",
        "methods": "encode",
    },
}
GRID = [(kind, name) for name in OPTIONS for kind in ("fsdp2", "hsdp")]
SLICED = {
    f"{kind}-{name}": lambda env, kind=kind, name=name, n=1 + i // 2 % 2: small(
        env, kind, ax.accumulate(n), module=(env.world + n) % 2 == 1, **OPTIONS[name]
    )
    for i, (kind, name) in enumerate(GRID)
}
SLICED |= {
    "fsdp2-skipped-ahead": lambda env: skipped(env, prefetch=1),
    "fsdp2-in-halves": lambda env: small(env, "fsdp2", reshard_after_forward=2),
    "fsdp2-in-halves-evaluated": lambda env: evaluated(
        env, "fsdp2", reshard_after_forward=2
    ),
    "hsdp-in-all": lambda env: small(env, "hsdp", reshard_after_forward=2),
    "hsdp-kept-evaluated": lambda env: evaluated(
        env, "hsdp", reshard_after_forward=False, ignored=FROZEN
    ),
    "fsdp2-whole-as-on-a-gpu": lambda env: at_once(env),
    "fsdp2-written": lambda env: gap(
        env, "fsdp2", loss=written, blocks=None, unused="allow"
    ),
    "fsdp2-whole-alone": lambda env: alone(env, "fsdp2", ignored=FROZEN),
    "hsdp-whole-alone": lambda env: alone(env, "hsdp", ignored=FROZEN),
}


def written(model, batch):
    """A mean over tokens of logits that are written to: a view, as of any Linear."""
    logits = model(batch[0])
    logits /= 2
    each = nn.functional.cross_entropy(
        logits.mT, batch[0].roll(-1, dims=1), reduction="none"
    )
    return ax.Mean((each * batch[1]).sum(), batch[1].sum())


def at_once(env):
    """The gap where torch updates all weights of a group at once, if none says no."""
    keep = adam._default_to_fused_or_foreach
    adam._default_to_fused_or_foreach = lambda *args, **kwargs: (False, True)
    try:
        return small(env, "fsdp2", ignored=("scale", *FROZEN))
    finally:
        adam._default_to_fused_or_foreach = keep


def skipped(env, **options):
    """The gap of a run whose second block takes no part in most steps."""
    asked = lambda batch: bool((batch[0] > 2).any())  # noqa: E731

    def loss(model, batch):
        model.asked = asked(batch)
        return gan.square(model, batch)

    data = [[torch.full((4, 2), 1.0 + 2 * (k == 2)).double()] for k in range(4)]
    sgd = lambda m: torch.optim.SGD(m.parameters(), 0.1)  # noqa: E731
    tx = ax.shard_model(flat(env), "fsdp2", "layers.*", unused="allow", **options)
    state = ax.init(tx, gan.partly, sgd)
    for batch in data:
        with ax.evaluating(state) as model:
            loss(model, batch)
        state, _ = ax.step(tx, loss)(state, t.part(env, batch))
    judge = t.by_hand(gan.partly, loss, sgd, data, 1e9, lambda k: 1.0)[-1].weights
    steps = [t.Step(0.0, 0.0, w) for w in (judge, t.weights(state.model))]
    return t.apart(steps[:1], steps[1:], *at(env, "fsdp2"))


def precise(env, kind, preset, **options):
    """The gap, from float32 by hand, of a run in fewer bits."""
    where = env if kind == "hsdp" else flat(env)
    place = ax.shard_model(where, kind, "layers.*", **options)
    tx = ax.chain(place, ax.with_precision(preset), ax.clip(t.LIMIT))
    make = t.made(torch.float32)
    run = t.train(tx, where, make, t.masked, t.grouped, t.batches(dtype=torch.float32))
    judge = t.by_hand(make, t.masked, t.grouped, DATA, factor=lambda k: 1.0)
    return t.apart(judge, run, *at(env, kind))


WIRE = ax.Precision(param="fp32", reduce="bf16")
PRECISE = {
    name: lambda env, name=name, preset=preset: precise(
        env, name.partition("-")[0], preset, ignored=FROZEN, prefetch=1
    )
    for name, preset in {
        "hsdp-bf16": "bf16",
        "fsdp2-bf16": "bf16",
        "hsdp-wire": WIRE,
        "fsdp2-wire": WIRE,
    }.items()
}


def unreduced(env):
    """The gap where nobody averages the gradients of weights that stay whole."""
    keep, whole.reduce = whole.reduce, lambda grads, env, wire: None
    try:
        return small(env, "fsdp2", ignored=("scale", *FROZEN))
    finally:
        whole.reduce = keep


@cache
def sliced():
    """Each option of fsdp2 and hsdp, by rank, in one launch."""
    cases = SLICED | PRECISE | {"control": unreduced}
    judge(tiny, t.masked)  # before the fork, for all ranks at once
    return testing.run(4, axes=AXES, timeout=150)(all_of(cases))()


@pytest.mark.parametrize("case", SLICED)
def test_no_option_of_slices_changes_a_number(case):
    """Tied, frozen, tiny and twice-used weights, under every option."""
    found = [rank[case] for rank in sliced()]
    assert max(found) < EXACT, found


@pytest.mark.parametrize("case", PRECISE)
def test_fewer_bits_are_as_near_as_their_digits(case):
    """Half-precision products under hsdp, beside weights that stay whole."""
    for found in (rank[case] for rank in sliced()):
        assert 1e-5 < found < 3e-2


def test_control_whole_weights_that_are_not_averaged_are_seen():
    """Ranks whose whole weights follow their own rows are another run."""
    assert max(rank["control"] for rank in sliced()) > 1e-3


def gathers(env, kind="fsdp2", **options):
    """Gathers before the first tanh, in all, and the ranks that each goes over."""
    tx = ax.shard_model(flat(env), kind, "layers.*", **options)
    state = ax.init(tx, t.made(), t.grouped)
    step, batch = ax.step(tx, t.bare), t.part(env, t.batches(rows=(8,))[0])
    state, _ = step(state, batch)
    with Collectives() as seen:
        step(state, batch)
    first = seen.order.index("tanh")
    found = [x for x in seen.order if "gather" in x]
    ahead = [x for x in seen.order[:first] if "gather" in x]
    return len(ahead), len(found), seen.sizes


EFFECTS = {
    "default": {},
    "kept": {"reshard_after_forward": False},
    "halves": {"reshard_after_forward": 2},
    "one": {"prefetch": 1},
    "two": {"prefetch": 2},
    "whole": {"ignored": "**"},
}


def test_options_do_what_they_say():
    """Fewer gathers, over fewer ranks, sooner, or none."""
    for rank in looked():
        found = rank["gathers"]
        before, total, sizes = found["default"]
        assert sizes == {4}
        assert found["one"][:2] == (before + 1, total)
        assert found["two"][:2] == (before + 2, total)
        assert found["kept"][0] == before
        assert found["kept"][1] < total
        assert found["halves"] == (before, total, {2, 4})
        assert found["whole"][:2] == (0, 0)


def pair(env):
    """The gaps of a maker in copies of slices and its critic in slices of its own."""
    maker, critic, data = gan.networks()
    adam = lambda m: torch.optim.Adam(m.parameters(), 1e-2)  # noqa: E731
    one = ax.shard_model(env, "hsdp", "layers.*", prefetch=1)
    other = ax.shard_model(flat(env), "fsdp2", reshard_after_forward=False)
    gen, disc = ax.init(one, maker, adam), ax.init(other, critic, adam)
    for batch in data:
        z, real = t.part(env, batch)
        with ax.evaluating(gen) as model:
            fake = model(z)
        disc, _ = ax.step(other, gan.critic_loss)(disc, fake, real)
        with ax.frozen(disc) as model:
            gen, _ = ax.step(one, gan.maker_loss)(gen, z, model)
    found = []
    for state, kind, wanted in zip(
        (gen, disc), ("hsdp", "fsdp2"), gan.gan_by_hand(), strict=True
    ):
        steps = [t.Step(0.0, 0.0, w) for w in (wanted, t.weights(state.model))]
        found.append(t.apart(steps[:1], steps[1:], *at(env, kind)))
    return max(found)


def llama(adapted=False, base=torch.float64):
    """A tiny Llama; `adapted` by low-rank adapters, the rest frozen in `base`."""
    tf = pytest.importorskip("transformers")
    size = {"vocab_size": t.TOKENS, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**size, **heads, bos_token_id=1))
    if not adapted:
        return model.double()
    peft = pytest.importorskip("peft")
    modules = ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=3, target_modules=modules, init_lora_weights=False)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        model = peft.get_peft_model(model, config)  # it asks by a name of before
    for p in model.parameters():
        p.data = p.data.to(torch.float64 if p.requires_grad else base)
    return model


def spoken(model, batch):
    """A mean over tokens of what a model of transformers says."""
    logits = model(input_ids=batch[0]).logits
    wanted = batch[0].roll(-1, dims=1)
    each = nn.functional.cross_entropy(logits.mT, wanted, reduction="none")
    return ax.Mean((each * batch[1]).sum(), batch[1].sum())


def adapters(model):
    """An optimizer over what is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)


LAYERS = "base_model.model.model.layers.*"


def adapted(env, kind, base=torch.float64):
    """The gap of adapters over frozen weights, in slices of 3 rows on 4 ranks."""
    make = lambda: llama(True, base)  # noqa: E731
    where = env if kind == "hsdp" else flat(env)
    tx = ax.chain(ax.shard_model(where, kind, LAYERS), ax.clip(0.05))
    run = t.train(tx, where, make, spoken, adapters, DATA)
    judge = t.by_hand(make, spoken, adapters, DATA, 0.05, lambda k: 1.0)
    moved = [n for n, p in make().named_parameters() if p.requires_grad]
    assert 0 < len(moved) < len(judge[0].weights)
    return t.apart(judge, run, *at(env, kind))


def generated(env, kind, methods):
    """Whether ranks with other prompts and lengths generate what one process does."""
    ids, count = torch.arange(1, 4 + env.rank)[None], 3 + 2 * env.rank
    args = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    tx = ax.shard_model(env, kind, "model.layers.*", methods=methods)
    state = ax.init(tx, llama)
    with ax.evaluating(state) as model:
        found = model.generate(ids, pad_token_id=0, **args)
    return torch.equal(found, llama().generate(ids, pad_token_id=0, **args))


MODELS = {
    "pair": pair,
    **{
        f"adapted-{kind}": lambda env, kind=kind: adapted(env, kind)
        for kind in ("ddp", "fsdp2", "hsdp")
    },
}


@cache
def models():
    """Each case of models that accelx did not write, and of several, in one launch."""
    for make in (llama, lambda: llama(True)):
        make()  # imports, before the fork
    cases = {
        **MODELS,
        "mixed": lambda env: adapted(env, "fsdp2", torch.float32),
        "generate": lambda env: generated(env, "hsdp", ()),
        "generate-named": lambda env: generated(flat(env), "fsdp2", "generate"),
    }
    return testing.run(4, axes=AXES, timeout=120)(all_of(cases))()


@pytest.mark.parametrize("case", MODELS)
def test_several_models_and_frozen_ones_are_the_runs_of_one_process(case):
    """A GAN on two layouts, and low-rank adapters of peft over a frozen Llama."""
    found = [rank[case] for rank in models()]
    # Llama takes its norms and rotations in float32, whatever its weights are
    assert max(found) < (EXACT if case == "pair" else 1e-6), found


def test_adapters_over_weights_of_another_dtype_train():
    """Frozen float32 beside trained float64: to the digits of float32."""
    assert max(rank["mixed"] for rank in models()) < 1e-5


@pytest.mark.parametrize("case", ["generate", "generate-named"])
def test_a_model_in_slices_generates_what_one_process_does(case):
    """Each rank its own prompt and length, whether or not the method is named."""
    assert all(rank[case] for rank in models())


def doubled():
    """Blocks of two dtypes each."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].bias.data = model[0].bias.data.double()
    return model


def tabled(**options):
    """A table of embeddings with options of its own."""
    return lambda: nn.Sequential(nn.Embedding(6, 4, **options), nn.Linear(4, 4))


def hooked():
    """A weight whose gradient someone changes."""
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.register_hook(lambda grad: 2 * grad)
    return model


def void():
    """A model with a trained weight of no numbers."""
    model = nn.Linear(4, 4)
    model.void = nn.Parameter(torch.zeros(0, 3))
    return model


REFUSED = {  # model, options, what the error says
    "renormed": (tabled(max_norm=1.0), {}, r"0 has max_norm=1\.0.*leave max_norm out"),
    "sparse": (tabled(sparse=True), {}, r"but 0 has sparse=True; write sparse=False"),
    "hooked": (hooked, {}, r"hooks of 0\.weight would never.*ax\.transform"),
    "lazy": (lambda: nn.LazyLinear(4), {}, r"but weight, bias of this LazyLinear"),
    "none-ignored": (tiny, {"ignored": "layers.*.gamma"}, r"matches no weight.*write"),
    "scalar": (tiny, {}, r"but scale has none; write.*ignored='scale'"),
    "empty": (void, {}, r"but void has none; leave it.*ignored='void'"),
    "container": (t.made(), {"blocks": "layers"}, r"is a ModuleList.*layers\.\*"),
    "two-dtypes": (
        doubled,
        {"blocks": "0"},
        r"0\.weight is torch.float32 and 0\.bias is torch.float64; add with_precision",
    ),
    "no-method": (
        tiny,
        {"ignored": "scale", "methods": "decode"},
        r"wants a method of Tiny.*around, encode, scored: write",
    ),
    "forward": (t.made(), {"methods": "forward"}, r"forward, which is one already"),
    "no-block": (
        t.made(),
        {"methods": "head.extra_repr"},
        r"gathered with what.*blocks",
    ),
}


def refused(env):
    """What each wrong placement says, with the model untouched and on no wire."""
    found = {}
    for name, (make, options, wanted) in REFUSED.items():
        for given in (make, make()):
            tx = ax.shard_model(env, "fsdp2", **options)
            error = pytest.raises(ax.PlacementError, match=wanted)
            with Collectives() as seen, error:
                ax.init(tx, given)
            assert not seen.counts
        weights = list(given.parameters())
        assert not any(hasattr(p, "full_tensor") for p in weights)
        found[name] = len(weights)
    return found


def two_axes(env):
    """What fsdp2 says of an Env with two axes, and how often the model was made."""
    env, made = ax.connect(env, axes="replicate=1,shard=2"), []
    with pytest.raises(ax.PlacementError) as caught:
        ax.init(ax.shard_model(env, "fsdp2"), lambda: made.append(1))
    return str(caught.value), len(made)


def remedied(env):
    """What was refused, done as the errors say; what a named method gives."""
    for options in ({"ignored": "0.bias"}, {"ignored": nn.Linear}):
        ax.init(ax.shard_model(env, "fsdp2", "0", **options), doubled)
    wanted = ax.with_precision("fp32")
    ax.init(ax.chain(wanted, ax.shard_model(env, "fsdp2", "0")), doubled)
    tx = ax.shard_model(env, "fsdp2", "layers.3", methods="layers.3.extra_repr")
    return ax.init(tx, t.made()).model.layers[3].extra_repr()


def all_at_once(env):
    """What an optimizer hears that updates slices and whole weights together."""
    tx = ax.shard_model(env, "fsdp2", ignored="head.**")
    adamw = lambda groups: torch.optim.AdamW(groups, foreach=True)  # noqa: E731
    with pytest.raises(ax.PlacementError) as caught:
        ax.init(tx, t.made(), lambda m: adamw(m.parameters()))
    apart = {"embed.**": {}, "head.**": {}, "**": {}}  # whose weight is one
    ax.init(tx, t.made(), lambda m: adamw(ax.param_groups(m, apart)))
    return str(caught.value)


@cache
def placements():
    """What two ranks refuse, and what they then take, in one launch."""
    cases = {f.__name__: f for f in (refused, two_axes, remedied, all_at_once)}
    return testing.run(2, timeout=90)(all_of(cases))()


def test_what_cannot_be_placed_is_refused_before_anything_moves():
    """By name, with what to write, and without a collective."""
    for rank in placements():
        assert rank["refused"].keys() == REFUSED.keys()


def test_two_axes_are_refused_before_the_model_is_made():
    """fsdp2 lies over one; which of them would be unsaid."""
    for rank in placements():
        said, made = rank["two_axes"]
        assert 'write "hsdp"' in said
        assert made == 0


def test_whole_weights_and_slices_are_not_updated_at_once():
    """Said when the optimizer is made, with the groups that can be."""
    for rank in placements():
        assert re.search(r"foreach=True.*AdamW has.*param_groups", rank["all_at_once"])


def test_the_remedy_of_each_is_taken():
    """Two dtypes whole or by precision, a method of a block that is named."""
    assert [rank["remedied"] for rank in placements()] == ["", ""]


def unused(env, kind):
    """What a step says of a weight that no rank uses."""
    where = env if kind == "hsdp" else flat(env)
    sgd = lambda m: torch.optim.SGD(m.parameters(), 0.1)  # noqa: E731
    batch = t.part(env, [torch.ones(4, 2).double()])
    tx = ax.shard_model(where, kind, "layers.*")
    with pytest.raises(ax.UnusedParameterError) as caught:
        ax.step(tx, gan.square)(ax.init(tx, gan.partly, sgd), batch)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["fsdp2", "hsdp"])
def test_unused_parameters_are_named_by_kind(kind):
    """Also where some ranks use them, which slices cannot do."""
    for rank in looked():
        assert f'"{kind}", unused="allow"' in rank["unused"][kind]


def bytes_held(env, kind, **options):
    """Bytes of weights, gradients and moments that this rank holds between steps."""
    where = env if kind == "hsdp" else flat(env)
    tx = ax.shard_model(where, kind, "layers.*", **options)
    layers = lambda: nn.ModuleDict(  # noqa: E731
        {"layers": nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)])}
    )

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers()["layers"]

        def forward(self, x):
            return self.layers(x)

    state = ax.init(tx, Stack, lambda m: torch.optim.AdamW(m.parameters()))
    x = t.part(env, [torch.ones(4, 64)])
    loss = lambda model, x: model(x[0]).square().mean()  # noqa: E731
    state, out = ax.grads(tx, loss)(state, x)
    grads = sum(t.local(p.grad).nbytes for p in state.model.parameters())
    state, _ = ax.apply(tx)(state, out)
    weights = sum(t.local(p).nbytes for p in state.model.parameters())
    held = [v for s in state.optim.state.values() for v in s.values() if v.dim()]
    return weights, grads, sum(t.local(v).nbytes for v in held)


HOLDING = {
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    "hsdp": ("hsdp", {}),
    "kept": ("hsdp", {"reshard_after_forward": False}),
    "whole": ("fsdp2", {"ignored": "layers.0"}),
}


@cache
def looked():
    """What is counted on each of four ranks, in one launch."""

    def rank(env):
        return {
            "gathers": {
                name: gathers(env, **options) for name, options in EFFECTS.items()
            },
            "unused": {kind: unused(env, kind) for kind in ("fsdp2", "hsdp")},
            "bytes": {
                name: bytes_held(env, kind, **options)
                for name, (kind, options) in HOLDING.items()
            },
        }

    return testing.run(4, axes=AXES, timeout=120)(rank)()


def test_each_kind_holds_what_the_table_says():
    """Bytes of a rank are the model's over its slices, as docs/sharding.md has it."""
    size = 4 * 64 * 64 * 4
    for rank in looked():
        found = rank["bytes"]
        assert found["ddp"] == (size, size, 2 * size)
        assert found["fsdp2"] == (size // 4, size // 4, size // 2)
        assert found["hsdp"] == found["kept"] == (size // 2, size // 2, size)
        part = size // 4 + 3 * size // 16
        assert found["whole"] == (part, part, 2 * part)
