"""A model in stages over ranks is that of one process: every number, every save."""

import re
from collections import Counter
from functools import cache

import attrs
import pytest
import torch
import torch.distributed.pipelining  # ranks are forked: once here, not once in each
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax
from accelx import testing
from accelx.engines import stage_step
from accelx.engines.stage_pipe import SCHEDULES
from accelx.records import Axis
from tests.laws import training as t

traced = "ignore:The .grad attribute of:UserWarning"  # torch says it while it traces
pytestmark = [pytest.mark.multi, t.quiet_views, pytest.mark.filterwarnings(traced)]
ROWS = (5, 1, 8, 4)  # fewer than microbatches, and not divided by them
FOUR = ["layers.1", "layers.2", "layers.3"]
SINGLE = ("gpipe", "1f1b")
ROW = torch.ones(8, 3)


def split_of(schedule):
    """Two stages, or four where a rank has two."""
    return ["layers.2"] if schedule in SINGLE else FOUR


def rows_of(env):
    """The ranks that have rows of their own."""
    names = {axis.name for axis in env.axes}
    return ax.along(env, "data") if "data" in names else ax.Env()


def chain(env, kind, schedule, n, *rest):
    """A model in stages with clip and a schedule, as `by_hand` trains."""
    blocks = None if kind == "ddp" else "layers.*"
    return ax.chain(
        ax.shard_stages(env, split_of(schedule), n, schedule),
        ax.shard_model(env, kind, blocks=blocks),
        *rest,
        ax.clip(t.LIMIT),
        ax.with_schedule(t.curve),
    )


@cache
def judged(loss, rows=ROWS):
    """What one process makes of whole batches."""
    return t.by_hand(t.made(), loss, t.grouped, t.batches(rows))


def gap(env, tx, loss, model=None, rows=ROWS):
    """The largest difference from the judge, in losses, norms and this rank's weights.

    And the names of its weights, each under all of them.
    """
    state = ax.init(tx, model or t.made()(), t.grouped)
    step, found = ax.step(tx, loss), [0.0]
    for batch, wanted in zip(t.batches(rows), judged(loss, rows), strict=True):
        state, out = step(state, t.part(rows_of(env), batch))
        assert out.stepped, out.skipped
        found += [
            abs(float(out.loss) - wanted.loss),
            abs(float(out.norm) - wanted.norm),
        ]
        for name, p in state.model.named_parameters(remove_duplicate=False):
            found.append((t.whole(p) - wanted.weights[name]).abs().max().item())
    return max(found), {n for n, _ in state.model.named_parameters()}


LOSSES = {"bare": t.bare, "masked": t.masked}
TWO = [(s, loss, 3) for s in SCHEDULES for loss in LOSSES]
TWO += [("1f1b", "masked", 1), ("interleaved", "bare", 5)]
REST = {
    "accumulate": lambda: [ax.accumulate(2)],
    "remat": lambda: [ax.remat("layers.*")],
    "compile": lambda: [ax.compile("layers.*", backend="eager")],
    "ema": lambda: [ax.with_ema(0.9)],
}


def unshared(env):
    """The gap of a run whose tied weights are each stage's own: what must not pass."""
    tie, stage_step.tie = stage_step.tie, lambda stages, state: None
    try:
        return gap(env, chain(env, "ddp", "1f1b", 2), t.masked)[0]
    finally:
        stage_step.tie = tie


def mean_of_means(env):
    """The gap of a loss that takes each microbatch's own mean: what must not pass."""
    tx, judge = chain(env, "ddp", "1f1b", 2), judged(t.masked)
    run = t.train(tx, ax.Env(), t.made()(), t.mean_of_means, t.grouped, t.batches(ROWS))
    return abs(run[-1].loss - judge[-1].loss)


class Sent(TorchDispatchMode):
    """Counts what goes between ranks inside it, by kind."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func.name().partition("::")
        self.counts[name] += space == "c10d"
        return func(*args, **(kwargs or {}))


def sent(env, tx, model, loss, batch):
    """How many messages and sums a second step takes, which has learnt all shapes."""
    state = ax.init(tx, model, sgd)
    step, part = ax.step(tx, loss), t.part(rows_of(env), batch)
    state, _ = step(state, part)
    with Sent() as seen:
        step(state, part)
    return {name: count for name, count in seen.counts.items() if count}


def messages(env, kind="ddp", **options):
    """What a step sends: of the plainest model, and of one with a tie and a norm."""
    cut = ax.shard_stages(env, "layers.2", 2)
    tx = ax.chain(cut, ax.shard_model(env, kind, **options))
    bare = sent(env, tx, tiny(), lambda m, batch: square(m, batch[0]), [ROW])
    tied = ax.chain(tx, ax.clip(1.0))
    return bare, sent(env, tied, t.made()(), t.bare, t.batches((8,))[0])


def sgd(model):
    """The plainest optimizer."""
    return torch.optim.SGD(model.parameters(), 0.1)


def tiny(tied=False, apart=False):
    """A Tiny without what is late; or where it shares a weight with the first stage.

    That stage uses the weight, or with `apart` none does.
    """
    torch.manual_seed(3)
    model = Tiny()
    if not tied:
        del model.late
        return model
    model.late = nn.Linear(4, 4, bias=False)
    if apart:
        model.layers[0].beside = nn.Linear(4, 4, bias=False)
    first = model.layers[0].beside if apart else model.layers[0]
    model.late.weight = first.weight
    return model


def half_used(env):
    """How far weights are from one process's, of which one stage uses a tied one."""
    alone = tiny(tied=True)
    optim, x = sgd(alone), torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    square(alone, x).backward()
    optim.step()
    tx = ax.chain(ax.shard_stages(env, "layers.2", 2), ax.shard_model(env))
    state, _ = ax.step(tx, square)(ax.init(tx, tiny(tied=True), sgd), x)
    wanted = dict(alone.named_parameters(remove_duplicate=False))
    named = list(state.model.named_parameters(remove_duplicate=False))
    far = [(p - wanted[n]).abs().max().item() for n, p in named]
    return max(far), "late.weight" in dict(named)


def still(split):
    """A model whose weights before `split` are frozen, as the first stage's are."""

    def make():
        model = t.made()()
        held = True
        for name, part in model.named_modules():
            held = held and not name.startswith(split)
            if held and name:
                part.requires_grad_(name == "layers")
        return model

    return make


def frozen(env, split):
    """The gap, losses and norms too, of a first stage in which nothing is trained."""
    tx = ax.chain(
        ax.shard_stages(env, split, 2),
        ax.shard_model(env),
        ax.clip(t.LIMIT),
        ax.with_schedule(t.curve),
    )
    data, found = t.batches(ROWS), []
    judge = t.by_hand(still(split), t.masked, t.grouped, data)
    state = ax.init(tx, still(split)(), t.grouped)
    assert env.rank or not any(p.requires_grad for p in state.model.parameters())
    step = ax.step(tx, t.masked)
    for batch, wanted in zip(data, judge, strict=True):
        state, out = step(state, t.part(rows_of(env), batch))
        found.append(abs(float(out.loss) - wanted.loss))
        found.append(abs(float(out.norm) - wanted.norm))
    named = state.model.named_parameters()
    far = [(p - wanted.weights[n]).abs().max().item() for n, p in named]
    return max(found + far)


def unused(env, kind, model):
    """What a step says of weights that no row uses."""
    tx = ax.chain(ax.shard_stages(env, "layers.2", 2), ax.shard_model(env, kind))
    try:
        ax.step(tx, square)(ax.init(tx, model, sgd), torch.ones(2, 3))
    except ax.AccelxError as error:
        return str(error)
    return "nothing was raised"


def two(env):
    """All that two ranks with a stage or two each are tried on."""
    found = {c: gap(env, chain(env, "ddp", c[0], c[2]), LOSSES[c[1]]) for c in TWO}
    for name, rest in REST.items():
        found[name] = gap(env, chain(env, "ddp", "1f1b", 2, *rest()), t.masked)
    found["factory"] = gap(env, chain(env, "ddp", "1f1b", 2), t.bare, t.made())
    state = ax.init(chain(env, "ddp", "1f1b", 2), t.made()(), t.grouped)
    step = ax.step(chain(env, "ddp", "1f1b", 2), told)
    after, out = step(state, t.batches(ROWS)[2])
    found["aux"] = float(out.aux["real"].value), out.aux["rows"].detach()
    found["held"] = ax.memory_report(env, after).held, names_of(after)
    found["sent"] = messages(env)
    found["half used"] = half_used(env)
    found["frozen"] = frozen(env, "layers.2")
    found["no use"] = unused(env, "ddp", tiny(tied=True, apart=True))
    return found | {"unshared": unshared(env), "means": mean_of_means(env)}


@cache
def on_two():
    """Of each of two ranks its gaps."""
    judged(t.bare), judged(t.masked)
    return testing.run(2, axes="stage=2", timeout=120)(two)()


@pytest.mark.parametrize("case", [*TWO, *REST, "factory"], ids=str)
def test_two_ranks_make_the_run_of_one(case):
    """Every loss, norm and weight after every step, by every schedule, ties and all."""
    found = [rank[case][0] for rank in on_two()]
    assert max(found) < 1e-10, found


def test_a_stage_may_have_nothing_that_is_trained():
    """In float64, of which a norm over no weight knows nothing."""
    assert max(rank["frozen"] for rank in on_two()) < 1e-10


def test_control_ties_that_are_not_kept_are_another_run():
    """The comparison sees a tied weight that each stage trains by itself."""
    assert min(rank["unshared"] for rank in on_two()) > 1e-4


def test_control_the_mean_of_means_is_another_run():
    """The comparison sees a loss that each microbatch divides by its own tokens."""
    assert min(rank["means"] for rank in on_two()) > 1e-4


def test_what_a_loss_returns_beside_is_on_all_stages():
    """Means of the whole batch, and rows in their order."""
    batch = t.batches(ROWS)[2]
    _, wanted = told(t.made()(), batch)
    for rank in on_two():
        real, rows = rank["aux"]
        assert real == pytest.approx(float(wanted["real"].value))
        assert torch.allclose(rows, wanted["rows"].detach(), atol=1e-12, rtol=0)


def test_a_step_sends_what_a_schedule_does_and_one_message_to_and_fro():
    """With all that stages agree on; only a tie and a norm are a sum each."""
    each = {"send": 2 + 1, "recv_": 2 + 1}  # of two microbatches
    for rank in on_two():
        bare, tied = rank["sent"]
        assert bare == each
        # of the ties of Net one is over stages
        assert tied == {**each, "allreduce_": 2}


def test_copies_of_stages_add_gradients_and_losses_alone():
    """Two sums; a third only where copies may use other weights (the control)."""
    for rank in on_four():
        strict, allowing = rank["sent"]
        assert strict["allreduce_"] == 2
        assert allowing["allreduce_"] == 3


def test_a_tied_weight_that_one_stage_uses_moves_on_both():
    """As in one process, to rounding, and without an error."""
    for far, here in (rank["half used"] for rank in on_two()):
        assert here
        assert far < 1e-6


def test_weights_without_a_use_are_named_on_every_rank():
    """Tied ones too, and whoever holds the gradients until they are reduced."""
    for rank in on_two():
        assert re.search("no gradient .*layers.0.beside.weight", rank["no use"])
    for text in (text for rank in on_four() for text in rank["no use"]):
        assert re.search("no gradient .*late.weight", text), text


def names_of(state):
    """Of each weight that is here."""
    return {name for name, _ in state.model.named_parameters()}


def test_a_report_of_memory_counts_what_a_rank_has():
    """Its own weights, and nothing of the shapes that are known of other stages."""
    sizes = {name: p.nbytes for name, p in t.made()().named_parameters()}
    for rank in on_two():
        held, names = rank["held"]
        found = {one.what: one.bytes for one in held}
        assert found["parameters"] == sum(sizes[n] for n in names) < sum(sizes.values())
        assert not {what for what in found if what.startswith("slot shard")}


def test_a_rank_has_the_weights_of_its_stages_alone():
    """Together they have all; only what is tied over stages is on both."""
    first, second = (rank[("1f1b", "bare", 3)][1] for rank in on_two())
    names = {name for name, _ in t.made()().named_parameters()}
    assert first | second == names
    assert first & second == {"embed.weight"}
    assert "layers.0.outer.weight" in first - second
    assert "layers.3.inner.weight" in second - first


FOURS = [
    ("ddp", "1f1b", "bare"),
    ("ddp", "zbv", "masked"),
    ("fsdp2", "1f1b", "masked"),
    ("fsdp2", "interleaved", "bare"),
]


def four(env):
    """Two stages, each on two ranks with rows of their own."""
    found = {c: gap(env, chain(env, c[0], c[1], 2), LOSSES[c[2]])[0] for c in FOURS}
    tx = chain(env, "fsdp2", "1f1b", 2)
    found["factory"] = gap(env, tx, t.masked, t.made())[0]
    tx = chain(env, "fsdp2", "gpipe", 2, ax.accumulate(2))
    found["accumulate"] = gap(env, tx, t.bare)[0]
    found["fed"] = fed(env, chain(env, "fsdp2", "1f1b", 2))
    found["allowed"] = allowed(env)
    found["sent"] = messages(env)[0], messages(env, unused="allow")[0]
    found["no use"] = [unused(env, kind, Tiny()) for kind in ("ddp", "fsdp2")]
    return found | {"row": in_a_row(attrs.evolve(env, axes=(Axis("stage", 4),)))}


def in_a_row(env):
    """Of four stages the gap, what a step sends, and what is said of a failure."""
    bare = ax.chain(ax.shard_stages(env, FOUR, 4), ax.shard_model(env))
    far = gap(env, ax.chain(bare, ax.clip(t.LIMIT), ax.with_schedule(t.curve)), t.bare)
    counts = sent(env, bare, tiny(), lambda m, rows: square(m, rows[0]), [ROW])
    return far[0], counts, failed(env, bare)


def failed(env, tx):
    """What each rank says of a failure in the third stage, and whether it updated."""

    def broken(*_):
        if torch.is_grad_enabled():  # not where shapes are learnt
            raise ZeroDivisionError("of stage 2")

    model = tiny()
    model.layers[2].register_forward_hook(broken)
    state = ax.init(tx, model, sgd)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        ax.step(tx, square)(state, ROW)
    except (ax.CollectiveError, ZeroDivisionError) as error:
        same = all(map(torch.equal, before, model.parameters()))
        return f"{type(error).__name__}: {error}", same
    return "nothing was raised", False


def fed(env, tx):
    """Losses of batches from ax.feed, the last of them short."""
    data = TensorDataset(torch.arange(88).reshape(22, 4) % t.TOKENS)
    tx = ax.chain(ax.shard_loader(env, seed=3), tx)
    state = ax.init(tx, t.made()(), t.grouped)
    step, losses = ax.step(tx, t.bare), []
    for batch in ax.feed(tx, DataLoader(data, batch_size=8, shuffle=True)):
        state, out = step(state, batch)
        losses.append(float(out.loss))
    return losses


def allowed(env):
    """Names of the weights that move where one module is used by no row."""
    tx = ax.chain(
        ax.shard_stages(env, "layers.2", 2), ax.shard_model(env, unused="allow")
    )
    torch.manual_seed(3)
    state = ax.init(tx, Tiny(), lambda m: torch.optim.AdamW(m.parameters(), 0.1))
    before = {n: p.detach().clone() for n, p in state.model.named_parameters()}
    state, _ = ax.step(tx, square)(state, torch.ones(2, 3))
    after = dict(state.model.named_parameters())
    return {n for n, p in before.items() if not torch.equal(p, after[n])}


@cache
def on_four():
    """Of each of four ranks its gaps."""
    judged(t.bare), judged(t.masked)
    return testing.run(4, axes="data=2,stage=2", timeout=120)(four)()


@pytest.mark.parametrize("case", [*FOURS, "factory", "accumulate"], ids=str)
def test_stages_over_data_make_the_run_of_one(case):
    """Copies and slices of stages, ranks with few rows and with none."""
    found = [rank[case] for rank in on_four()]
    assert max(found) < 1e-10, found


def test_four_stages_in_a_row_make_the_run_of_one_and_send_one_message_to_and_fro():
    """Those in the middle two; of a failure there all hear before an update."""
    for number, rank in enumerate(on_four()):
        far, counts, (text, same) = rank["row"]
        assert far < 1e-10
        beside = 1 if number in (0, 3) else 2
        assert counts == {"send": beside * (4 + 1), "recv_": beside * (4 + 1)}
        kind = "ZeroDivisionError" if number == 2 else "CollectiveError.*rank 2"
        assert re.search(f"{kind}.*of stage 2", text), text
        assert same


def test_a_loader_feeds_stages_the_rows_of_one_process():
    """Each row once, a short last batch too."""
    alone = ax.chain(ax.shard_model(ax.Env()), ax.clip(t.LIMIT))
    wanted = fed(ax.Env(), ax.chain(alone, ax.with_schedule(t.curve)))
    assert len(wanted) == 3
    for rank in on_four():
        assert rank["fed"] == pytest.approx(wanted, abs=1e-10)


def test_unused_weights_stay_where_that_is_allowed():
    """All others move, on the stages that have them."""
    moved = set().union(*(rank["allowed"] for rank in on_four()))
    names = {name for name, _ in Tiny().named_parameters()}
    assert names - moved == {"late.weight", "late.bias"}


def halves(env, url, first):
    """Three steps and a save, or what was saved and three steps more."""
    staged = any(axis.name == "stage" for axis in env.axes)
    kind = "fsdp2" if env.world == 4 else "ddp"
    cut = [ax.shard_stages(env, "layers.2", 2)] if staged else []
    load = [] if first else [ax.load_state(env, url)]
    tx = ax.chain(
        *cut,
        ax.shard_model(env, kind),
        ax.with_ema(0.9),
        ax.clip(t.LIMIT),
        ax.with_schedule(t.curve),
        *load,
    )
    state = ax.init(tx, t.made(seed=1 if first else 2), t.grouped)
    step, losses = ax.step(tx, t.masked), []
    data = t.batches((5, 1, 7, 4, 6, 8))
    for batch in data[:3] if first else data[3:]:
        state, out = step(state, t.part(rows_of(env), batch))
        losses.append(float(out.loss))
    if first:
        ax.save_state(env, url)(state)
    mean = ax.measure(tx, lambda model, batch: t.masked(model, batch))
    got = ax.reduce(env, mean(state, t.part(rows_of(env), data[0])))
    with ax.averaged(state) as model:
        averaged = model(data[0][0]).sum().item()
    named = state.model.named_parameters(remove_duplicate=False)
    weights = {n: t.whole(p).clone() for n, p in named}
    return [*losses, float(got.value), averaged], weights


def off(run, judge):
    """How far a run's numbers and weights are from those of another."""
    numbers = [abs(a - b) for a, b in zip(run[0], judge[0], strict=True)]
    return max(
        numbers + [(w - judge[1][n]).abs().max().item() for n, w in run[1].items()]
    )


def test_what_stages_save_any_layout_loads(tmp_path):
    """Two by two saves, one goes on; one saves, two stages do; averages come along."""
    alone = ax.Env()
    judge = halves(alone, str(tmp_path / "one"), True)
    rest = halves(alone, str(tmp_path / "one"), False)
    url = str(tmp_path / "four")
    for run in testing.run(4, axes="data=2,stage=2")(halves)(url, True):
        assert off(run, judge) < 1e-10
    assert off(halves(alone, url, False), rest) < 1e-10
    for run in testing.run(2, axes="stage=2")(halves)(str(tmp_path / "one"), False):
        assert off(run, rest) < 1e-10
    for run in testing.run(2, axes="stage=2")(halves)(url, False):
        assert off(run, rest) < 1e-10


def test_control_another_start_is_another_run(tmp_path):
    """The comparison sees weights that were not loaded."""
    alone = ax.Env()
    one = halves(alone, str(tmp_path / "one"), True)
    assert off(halves(alone, str(tmp_path / "one"), False), one) > 1e-4


class Tiny(nn.Module):
    """Four blocks, with a switch for each thing that cannot be cut."""

    def __init__(self, how=""):
        super().__init__()
        self.how = how
        self.embed = nn.Linear(3, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.head = nn.Linear(4, 1)
        self.late = nn.Linear(4, 4)  # registered after the head

    def forward(self, x):
        first = x = self.embed(x)
        if self.how == "late":
            x = self.late(x)
        if self.how == "branch" and x.sum() > 0:
            x = -x
        if self.how == "noise":
            x = x + torch.randn(4)
        if self.how == "into":
            made = torch.zeros(len(x), 4)
            made[:] = x
            x = made
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if self.how == "skip" and i == 2:
                x = x + first
        if self.how == "loose":
            x = nn.functional.linear(x, self.layers[0].weight)
        return self.head(x)


def square(model, x):
    """A mean over rows."""
    return model(x).square().mean()


def twice(model, x):
    """A loss that calls the model twice."""
    return square(model, x) + square(model, x)


def never(model, x):
    """A loss that does not call the model."""
    return x.mean()


def fails_last(model, x):
    """A loss that fails on what the model returns."""
    return model(x)[..., 7].mean()


def penalised(model, x):
    """A loss that adds up the weights, of which each rank has some."""
    return square(model, x) + 0.1 * sum(p.square().sum() for p in model.parameters())


def picked(model, x):
    """A loss that reads one weight, of the first stage."""
    return square(model, x) + model.embed.weight.square().sum()


def floats(model, x):
    """A loss with a number of each microbatch beside it."""
    return square(model, x), {"share": 0.5}


def told(model, batch):
    """A loss with a Mean and rows beside it."""
    each = t.each(model, batch[0])
    beside = {"real": ax.Mean(batch[1].sum(), batch[1].numel()), "rows": each.sum(1)}
    return ax.Mean((each * batch[1]).sum(), batch[1].sum()), beside


def rows_apart(env):
    """Other rows on each stage."""
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(env.rank))


LATE = ["late", "late registered again"]
REFUSED = {  # model, loss, arguments, words of the error
    "late": ("late", square, {}, "late belongs to stage 1, .* in stage 0.*sample"),
    "branch": ("branch", square, {}, "a branch of it asks for a number"),
    "noise": ("noise", square, {}, "random numbers were drawn outside"),
    "into": ("into", square, {}, "writes by .*torch.cat"),
    "skip": ("skip", square, {}, "uses a tensor of shape .*split elsewhere|failed"),
    "loose": ("loose", square, {}, "layers.0.weight is a weight of another stage|fail"),
    "twice": ("", twice, {}, "calls it again; join both inputs"),
    "never": ("", never, {}, "returned without; write model"),
    "few": ("", square, {"split": []}, "names of modules, got"),
    "none": ("", square, {"split": "layer.2"}, "takes no module of Tiny"),
    "several": ("", square, {"split": "layers.*"}, "takes 4 modules"),
    "inside": (
        "",
        square,
        {"split": ["layers", "layers.2"], "schedule": "zbv"},
        "lies",
    ),
    "order": (
        *("", square, {"split": ["layers.2", "layers.1"], "schedule": "zbv"}),
        "in their order",
    ),
    "count": (
        "",
        square,
        {"split": ["layers.1", "layers.2"]},
        "wants 2 stages.*makes 3",
    ),
    "aux": ("", floats, {}, "does not add up to one"),
    "sums": ("", penalised, {}, "goes through the weights.*weight_decay"),
    "picks": ("", picked, {}, "another stage, of which there is no .square here"),
    "each": (
        "",
        square,
        {"schedule": "interleaved"},
        "wants 4 or another multiple of 2",
    ),
    "rows": ("", square, {}, "have other rows"),
    "unused": ("unused", square, {}, r"no gradient .*: late.weight, late.bias\."),
    "last": ("", fails_last, {}, "IndexError|index 7"),
}


def refused(env):
    """What each of the above raises on this rank."""
    found = {}
    for name, (how, loss, given, _) in REFUSED.items():
        x = rows_apart(env) if name == "rows" else torch.ones(4, 3)
        try:
            options = {"split": "layers.2", "n": 2, **given}
            tx = ax.chain(ax.shard_stages(env, **options), ax.shard_model(env))
            model = Tiny(how)
            if how not in ("late", "unused"):
                del model.late
            state = ax.init(tx, model, lambda m: torch.optim.SGD(m.parameters(), 0.1))
            ax.step(tx, loss)(state, x)
            found[name] = "nothing was raised"
        except (ax.AccelxError, ValueError, LookupError, AttributeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found | {"misuse": misuse(env), "sampled": sampled(env)}


def misuse(env):
    """Calls of a model in stages that are no step."""
    tx = ax.chain(ax.shard_stages(env, "layers.2", 2), ax.shard_model(env))
    model = Tiny()
    del model.late
    state = ax.init(tx, model, lambda m: torch.optim.SGD(m.parameters(), 0.1))
    found = []
    for wrong in (
        lambda: state.model(torch.ones(2, 3)),
        lambda: state.model.embed(torch.ones(2, 3)),
        lambda: state.model(torch.ones(2, 3), past_key_values=1),
        lambda: ax.fork(state),
        lambda: ax.save_state(env, "memory://x", select="trainable")(state),
        lambda: next(iter(ax.stream_weights(env, state))),
        lambda: ax.measure(tx, penalised)(state, torch.ones(2, 3)),
    ):
        try:
            with torch.set_grad_enabled(len(found) != 2):
                wrong()
            found.append("nothing was raised")
        except ax.AccelxError as error:
            found.append(str(error))
    return found


def sampled(env):
    """What runs late and is registered late finds its stage with a sample."""
    x, found = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), []
    torch.manual_seed(3)
    cut = ax.shard_stages(env, "balanced", 2, sample=(x,))
    tx = ax.chain(cut, ax.shard_model(env))
    state = ax.init(tx, Tiny("late"), lambda m: torch.optim.SGD(m.parameters(), 0.1))
    names = {n.partition(".")[0] for n, _ in state.model.named_parameters()}
    step = ax.step(tx, square)
    for _ in range(2):
        state, out = step(state, x)
        found.append(float(out.loss))
    return names, found


@cache
def refusals():
    """Of each of two ranks what it was told."""
    return testing.run(2, axes="stage=2")(refused)()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused_on_every_rank(name):
    """With names, and with what to write instead; no rank waits for another."""
    for rank in refusals():
        text = rank[name].replace("\n", " ")
        assert re.search(REFUSED[name][3], text), text


def test_calls_that_are_no_step_are_refused():
    """Gradients outside a step, a part by itself, a cache, copies, parts of saves."""
    words = (
        "called with gradients outside",
        "embed was called by itself",
        "use_cache=False",
        "save_state it",
        "leave select out",
        "take it from there",
        "goes through the weights",
    )
    for rank in refusals():
        for text, word in zip(rank["misuse"], words, strict=True):
            assert word in text, text


def test_a_sample_gives_modules_the_stage_in_which_they_run():
    """And the run is that of one process."""
    (first, losses), (second, others) = (rank["sampled"] for rank in refusals())
    assert "late" in first
    assert "head" in second - first
    torch.manual_seed(3)
    model = Tiny("late")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    for got, other in zip(losses, others, strict=True):
        loss = square(model, x)
        assert got == other == pytest.approx(loss.item(), abs=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
