"""What a state can do besides training by steps is the same on every engine."""

import warnings
from contextlib import nullcontext
from functools import cache

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import nn

import accelx as ax
from accelx import testing
from accelx.engines import plain
from accelx.engines.placed import Placed
from tests.laws import training as t

pytestmark = [pytest.mark.multi, t.quiet_views]
each_kind = pytest.mark.parametrize("kind", [*t.KINDS, "hsdp"])
DATA = t.batches(rows=(5, 4, 3))


def launch(kind):
    """Run on as many ranks as the kind is tried on."""
    if kind == "hsdp":
        return testing.run(4, axes="replicate=2,shard=2")
    return testing.run(t.ranks(kind))


def at(env):
    """Which of how many slices this rank has, where weights are in slices."""
    size = env.axes[-1].size
    return env.rank % size, size


def gradients(model):
    """Copies of the gradients that this rank has, by name."""
    named = model.named_parameters(remove_duplicate=False)
    return {n: t.local(p.grad).clone() for n, p in named if p.grad is not None}


def compare(env, found, wanted):
    """The largest difference of this rank's slices from whole tensors."""
    step = [t.Step(0.0, 0.0, x) for x in (wanted, found)]
    return t.apart(step[:1], step[1:], *at(env))


def by_torch(losses):
    """Gradients of a sum of losses of the whole batches, by torch on one process."""
    model = t.made()()
    total = 0
    for loss, batch in losses:
        value = loss(model, batch)
        value = value.total / value.weight if isinstance(value, ax.Mean) else value
        total = total + value
    total.backward()
    return gradients(model), model


def adding(env, kind, microbatches):
    """Two calls of grads, then apply: both as torch has them."""
    place = t.placing(env, kind)
    tx = ax.chain(place, ax.accumulate(microbatches), ax.clip(t.LIMIT))
    state = ax.init(tx, t.made(), t.grouped)
    state, _ = ax.grads(tx, t.bare)(state, t.part(env, DATA[0]))
    state, out = ax.grads(tx, t.masked)(state, t.part(env, DATA[1], t.lopsided))
    wanted, model = by_torch([(t.bare, DATA[0]), (t.masked, DATA[1])])
    assert compare(env, gradients(state.model), wanted) < 1e-12
    state, out = ax.apply(tx)(state, out)
    norm = nn.utils.clip_grad_norm_(model.parameters(), t.LIMIT)
    t.grouped(model).step()
    assert abs(norm - out.norm) < 1e-12
    assert compare(env, t.weights(state.model), t.weights(model)) < 1e-12
    assert not gradients(state.model)
    return True


@each_kind
@pytest.mark.parametrize("microbatches", [1, 2])
def test_gradients_of_two_calls_add(kind, microbatches):
    """grads twice, of a bare mean and of a Mean, is the gradient of the sum."""
    assert all(told(kind, f"adding-{microbatches}"))


def once(env, kind):
    """How far the gradients of one call lie from the sum of two."""
    tx = t.placing(env, kind)
    state = ax.init(tx, t.made(), t.grouped)
    state, _ = ax.grads(tx, t.bare)(state, t.part(env, DATA[0]))
    wanted, _ = by_torch([(t.bare, DATA[0]), (t.masked, DATA[1])])
    return compare(env, gradients(state.model), wanted)


@each_kind
def test_control_the_order_of_losses_is_not_what_adds(kind):
    """One call alone leaves other gradients than the sum of two."""
    assert min(told(kind, "once")) > 1e-3


def breaking(env, kind):
    """A loss that raises at each second call, before and between others."""
    calls = []

    def breaks(model, batch):
        calls.append(1)
        loss = t.bare(model, batch)
        if len(calls) % 2 == 0:
            raise KeyError("no such column")
        return loss

    tx = t.pipeline(env, kind, ax.accumulate(2))
    state = ax.init(tx, t.made(), t.grouped)
    with pytest.raises(KeyError, match="no such column"):
        ax.step(tx, breaks)(state, t.part(env, DATA[0]))
    assert not gradients(state.model)
    state, _ = ax.grads(tx, t.bare)(state, t.part(env, DATA[0]))
    kept = gradients(state.model)
    with pytest.raises(KeyError, match="no such column"):
        ax.grads(tx, breaks)(state, t.part(env, DATA[1]))
    assert t.same(gradients(state.model), kept)
    state, _out = ax.step(tx, t.masked)(state, t.part(env, DATA[1]))
    assert state.step == 1
    _, model = by_torch([(t.bare, DATA[0]), (t.masked, DATA[1])])
    nn.utils.clip_grad_norm_(model.parameters(), t.LIMIT)
    t.grouped(model).step()
    assert compare(env, t.weights(state.model), t.weights(model)) < 1e-12
    return True


@each_kind
def test_a_loss_that_raises_leaves_the_state_as_it_was(kind):
    """No half of a gradient stays, earlier gradients do, and the state goes on."""
    assert all(told(kind, "breaking"))


def tokenless(env, kind):
    """A step without weight, and the first that has some."""
    tx = t.pipeline(env, kind)
    state = ax.init(tx, t.made(), t.grouped)
    before = t.weights(state.model)
    tokens, mask = DATA[0]
    step = ax.step(tx, t.masked)
    state, out = step(state, t.part(env, (tokens, mask * 0)))
    assert not out.stepped
    assert "weight" in out.skipped
    assert float(out.weight) == 0
    assert (state.step, state.skipped, state.position) == (0, 1, 1)
    assert t.same(before, t.weights(state.model))
    assert not gradients(state.model)
    state, out = step(state, t.part(env, DATA[0]))  # and the schedule is at step 0
    run = t.Step(float(out.loss), out.norm.item(), t.weights(state.model))
    judge = t.by_hand(t.made(), t.masked, t.grouped, DATA[:1])
    assert t.apart(judge, [run], *at(env)) < 1e-12
    return True


@each_kind
def test_a_batch_without_a_token_is_skipped_by_all(kind):
    """Nothing moves, the report says why, and data and steps count apart."""
    assert all(told(kind, "tokenless"))


def poisoning(env, kind):
    """Steps that were made and skipped after nan on the last rank."""

    def poisoned(model, batch):
        bad = float("nan") if 7 in batch[0][:, 0] else 1.0
        return t.bare(model, batch) * bad

    tx = t.pipeline(env, kind)
    state = ax.init(tx, t.made(), t.grouped)
    tokens, mask = DATA[0][0].clamp(max=6), DATA[0][1]
    tokens[-1, 0] = 7  # the last row is the last rank's
    state, out = ax.step(tx, poisoned)(state, t.part(env, (tokens, mask)))
    assert "nan" in out.skipped
    return state.step, state.skipped


@each_kind
def test_non_finite_gradients_of_one_rank_are_skipped_by_all(kind):
    """clip looks at the global norm, so every rank decides alike."""
    assert set(told(kind, "poisoning")) == {(0, 1)}


def evaluating(env, kind):
    """Evaluations that end, that raise, and that are between steps."""
    tx = t.pipeline(env, kind)
    state = ax.init(tx, t.made(), t.grouped)
    state.model.layers[1].eval()
    modes = [m.training for m in state.model.modules()]
    with ax.evaluating(state) as model:
        assert model is state.model
        assert not any(m.training for m in model.modules())
        out = model(DATA[0][0])
        assert not out.requires_grad
    with pytest.raises(KeyError), ax.evaluating(state):
        raise KeyError
    assert [m.training for m in state.model.modules()] == modes
    assert torch.is_grad_enabled()
    wanted = t.made()()(DATA[0][0])
    assert (out - wanted).abs().max() < 1e-12
    data = DATA[:2]
    trace = []
    for batch in data:
        with ax.evaluating(state) as model:  # between steps, it disturbs nothing
            model(batch[0])
        state, out = ax.step(tx, t.bare)(state, t.part(env, batch))
        trace.append(t.Step(out.loss.item(), out.norm.item(), t.weights(state.model)))
    judge = t.by_hand(t.made(), t.bare, t.grouped, data)
    assert t.apart(judge, trace, *at(env)) < 1e-12
    return True


@each_kind
def test_evaluating_restores_every_mode_and_does_not_spend(kind):
    """Modes come back as they were, one by one, also when the body raises."""
    assert all(told(kind, "evaluating"))


def both(model, batch):
    """A loss and a metric."""
    right = (model(batch[0]).argmax(-1) == batch[0]).to(batch[1])
    return {"loss": t.masked(model, batch), "acc": right.mean()}


def measuring(env, kind):
    """The means of all batches and ranks."""
    tx = t.placing(env, kind)
    state = ax.init(tx, t.made())
    total = None
    for batch in t.batches(rows=(5, 1, 2)):
        found = ax.measure(tx, both)(state, t.part(env, batch))
        total = found if total is None else {k: total[k] + found[k] for k in found}
    parts = [
        torch.as_tensor(x, dtype=torch.float64)
        for m in total.values()
        for x in (m.total, m.weight)
    ]
    whole = ax.reduce(env, parts, "sum") if env.world > 1 else parts
    return [whole[0] / whole[1], whole[2] / whole[3]]


@each_kind
def test_measure_is_exact_over_batches_and_ranks(kind):
    """Means of a loss and of a metric, with rows that only pad, add to those of all."""
    model, sums = t.made()(), torch.zeros(2, 2, dtype=torch.float64)
    with torch.no_grad():
        for batch in t.batches(rows=(5, 1, 2)):
            found = both(model, batch)
            sums[0] += torch.stack([found["loss"].total, found["loss"].weight])
            sums[1] += torch.tensor([found["acc"] * len(batch[0]), len(batch[0])])
    for found in told(kind, "measuring"):
        assert torch.allclose(torch.stack(found), sums[:, 0] / sums[:, 1], atol=1e-12)


class Critic(nn.Module):
    """A small judge of points."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return self.layers(x).squeeze(-1)


class Maker(nn.Module):
    """A small maker of points."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, z):
        return self.layers(z)


def networks():
    """The two networks of a GAN, and its data."""
    torch.manual_seed(2)
    pair = Maker().double(), Critic().double()
    draw = torch.Generator().manual_seed(4)
    return *pair, [
        (
            torch.randn(5, 2, generator=draw).double(),
            torch.randn(5, 3, generator=draw).double(),
        )
        for _ in range(3)
    ]


def critic_loss(critic, fake, real):
    """Real points up, made ones down, by row."""
    up, down = critic(torch.cat([real, fake])).chunk(2)
    return nn.functional.softplus(-up).mean() + nn.functional.softplus(down).mean()


def maker_loss(maker, z, critic):
    """Made points up, through the critic."""
    return nn.functional.softplus(-critic(maker(z))).mean()


def gan_by_hand():
    """The judge: two optimizers in a plain loop."""
    maker, critic, data = networks()
    first, second = (torch.optim.Adam(m.parameters(), 1e-2) for m in (critic, maker))
    for z, real in data:
        first.zero_grad()
        critic_loss(critic, maker(z).detach(), real).backward()
        first.step()
        second.zero_grad()
        maker_loss(maker, z, critic).backward()
        second.step()
    return t.weights(maker), t.weights(critic)


def two_states(env, kind):
    """How far a maker and its critic end from the run by hand."""
    tx = t.placing(env, kind) if kind == "plain" else ax.shard_model(env, kind)
    maker, critic, data = networks()
    adam = lambda m: torch.optim.Adam(m.parameters(), 1e-2)  # noqa: E731
    gen, disc = ax.init(tx, maker, adam), ax.init(tx, critic, adam)
    gen_step, disc_step = ax.step(tx, maker_loss), ax.step(tx, critic_loss)
    for whole in data:
        z, real = t.part(env, whole)
        with ax.evaluating(gen) as model:
            fake = model(z)
        disc, _ = disc_step(disc, fake, real)
        with ax.frozen(disc) as model:
            assert not any(p.requires_grad for p in model.parameters())
            gen, _ = gen_step(gen, z, model)
        assert not gradients(disc.model)
        assert all(p.requires_grad for p in disc.model.parameters())
    return [
        compare(env, t.weights(s.model), w)
        for s, w in zip((gen, disc), gan_by_hand(), strict=True)
    ]


@each_kind
def test_a_gan_of_two_states_is_the_run_of_one_process(kind):
    """Two pipelines, one the frozen critic of the other; no gradient goes astray."""
    assert max(gap for gaps in told(kind, "two_states") for gap in gaps) < 1e-12


def freezing(env, kind):
    """What was frozen, after a raise inside `frozen`."""
    state = ax.init(t.placing(env, kind), t.made(), t.grouped)
    wanted = [p.requires_grad for p in state.model.parameters()]
    assert not all(wanted)
    with pytest.raises(KeyError), ax.frozen(state):
        raise KeyError
    assert [p.requires_grad for p in state.model.parameters()] == wanted
    assert state.step == 0
    return True


@each_kind
def test_frozen_leaves_what_was_frozen_before(kind):
    """Weights that the user froze stay so, and a raise inside restores the rest."""
    assert all(told(kind, "freezing"))


def summing(meet):
    """A whole engine of torch's own calls: each rank's gradients, through `meet`."""

    def backward(state, loss, scale):
        (loss * scale).backward()

    def settle(state, scale):
        for p in state.model.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                meet(p.grad)
                p.grad.mul_(scale)

    def update(state):
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def clip(state, limit):
        weights = list(state.model.parameters())
        return nn.utils.clip_grad_norm_(weights, limit or float("inf"))

    return ax.Engine("mine", backward, settle, update, clip, lambda _: nullcontext())


def own_engine(env):
    """How far a run on that engine is from one process, and one that never meets."""
    wanted = t.by_hand(t.made(), t.masked, t.pair, DATA)
    return [run_on(summing(meet), env, wanted) for meet in (dist.all_reduce, id)]


def run_on(engine, env, wanted):
    """The largest difference from a plain loop."""

    def place(state, tx):
        model = state.model()
        slots = {"shard_model": Placed(engine, env, model)}
        return attrs.evolve(state, model=model, slots=slots)

    rest = (ax.accumulate(2), ax.clip(t.LIMIT), ax.with_schedule(t.curve))
    tx = ax.chain(ax.transform("mine", place=place), *rest)
    run = t.train(tx, env, t.made(), t.masked, t.pair, DATA)
    return t.apart(wanted, run)


def test_an_engine_is_one_file():
    """Its functions and the arrow that puts it there: nothing else knows of it."""
    for gap, alone in told("ddp", "own_engine"):
        assert gap < 1e-12
        assert alone > 1e-3  # the control: the comparison sees that ranks do not meet


def clipping():
    """An engine of a test's own that clips as it updates, and a pass that places it."""

    def update(state):
        nn.utils.clip_grad_norm_(state.model.parameters(), 1e-3)
        plain.update(state)

    mine = attrs.evolve(
        plain.ENGINE, name="mine", update=update, handles=frozenset({"clip"})
    )

    def place(state, tx):
        model = state.model()
        slots = {"shard_model": Placed(mine, ax.Env(), model)}
        return attrs.evolve(state, model=model, slots=slots)

    return mine, ax.transform("mine", place=place)


def test_an_engine_absorbs_what_it_handles():
    """The pass named in `handles` is skipped in a run, its spec is still there."""
    _, place = clipping()
    tx = ax.chain(place, ax.clip(0.5))
    state = ax.init(tx, t.made(), lambda m: torch.optim.SGD(m.parameters(), 1.0))
    before = t.weights(state.model)
    state, out = ax.step(tx, t.bare)(state, t.part(ax.Env(), DATA[0]))
    assert out.norm is None  # clip itself did not run
    assert tx.find("clip").norm == 0.5
    moved = [(before[n] - p).square().sum() for n, p in state.model.named_parameters()]
    assert abs(sum(moved).sqrt() - 1e-3) < 1e-8


def test_explain_shows_what_the_engine_absorbs():
    """The row of the pass says who does it."""

    @attrs.frozen
    class Spec:
        engine: object

    engine, _ = clipping()
    mine = ax.Pass("mine", Spec(engine), place=lambda state, tx: state)
    table = repr(ax.explain(ax.chain(ax.Transform((mine,)), ax.clip(0.5))))
    assert "absorbed by mine" in table
    assert "absorbed" not in repr(ax.explain(ax.clip(0.5)))


class Partly(nn.Module):
    """A model, one of whose layers takes part only if asked."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.asked = False

    def forward(self, x):
        return (
            self.layers[0](x) if not self.asked else self.layers[1](self.layers[0](x))
        )


def partly():
    """The same Partly each time."""
    torch.manual_seed(0)
    return Partly().double()


class Handing(Partly):
    """It also returns a weight of its own as it is, as that of a loss is."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x):
        return super().forward(x), {"scale": self.scale}


def handing():
    """The same Handing each time."""
    torch.manual_seed(0)
    return Handing().double()


def square(model, batch):
    """A mean over rows."""
    return model(batch[0]).square().mean()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_parameters_without_a_gradient_are_named_with_the_choices(kind):
    """The step itself raises on every rank, and says what may be done."""

    def rank(env):
        tx = ax.shard_model(env, kind, blocks="layers.*")
        state = ax.init(tx, partly, lambda m: torch.optim.SGD(m.parameters(), 0.1))
        batch = t.part(env, [torch.ones(4, 2).double()])
        with pytest.raises(ax.UnusedParameterError) as error:
            ax.step(tx, square)(state, batch)
        return str(error.value)

    for text in testing.run(2)(rank)():
        for part in (
            "layers.1.weight, layers.1.bias",
            "requires_grad_(False)",
            '"allow"',
            kind,
        ):
            assert part in text


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_unused_allow_is_the_run_of_one_process(kind):
    """Also where only one rank's rows use the layer, and in later steps all do.

    A weight that forward returns as it is counts as used.
    """

    def loss(model, batch):
        model.asked = bool((batch[0] > 2).any())
        out, own = model(batch[0])
        return (out * own["scale"].prod()).square().mean()

    draw = torch.Generator().manual_seed(3)
    data = [
        [torch.rand(4, 2, generator=draw).double() + 2 * (k == 2)] for k in range(4)
    ]
    sgd = lambda m: torch.optim.SGD(m.parameters(), 0.1)  # noqa: E731

    def rank(env):
        tx = ax.shard_model(env, kind, blocks="layers.*", unused="allow")
        state = ax.init(tx, handing, sgd)
        for batch in data:
            state, _ = ax.step(tx, loss)(state, t.part(env, batch))
        return compare(env, t.weights(state.model), judge)

    judge = t.by_hand(handing, loss, sgd, data, limit=1e9, factor=lambda k: 1.0)[
        -1
    ].weights
    assert max(testing.run(2)(rank)()) < 1e-12


def test_in_a_loop_of_ones_own_ddp_names_unused_parameters():
    """torch complains with indices at the next forward; here with names and choices."""

    def rank(env):
        model = ax.shard_model(env)(partly())
        model(torch.ones(2, 2).double()).sum().backward()
        with pytest.raises(
            ax.UnusedParameterError, match=r"layers\.1\.weight"
        ) as error:
            model(torch.ones(2, 2).double()).sum().backward()
        assert "unused=" in str(error.value)

    testing.run(2)(rank)()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_loop_of_ones_own_trains_as_one_process(kind):
    """shard_model(env, kind)(model) and loss.backward(): four lines and no pipeline."""

    def rank(env):
        model = ax.shard_model(env, kind, blocks="layers.*")(t.made()())
        optim = t.grouped(model)
        for batch in data:
            rows = slice(2 * env.rank, 2 * env.rank + 2)
            t.bare(model, [x[rows] for x in batch]).backward()
            optim.step()
            optim.zero_grad()
        return compare(env, t.weights(model), judge)

    data = t.batches(rows=(4, 4, 4))
    judge = t.by_hand(t.made(), t.bare, t.grouped, data, 1e9, lambda k: 1.0)[-1].weights
    assert max(testing.run(2)(rank)()) < 1e-12


def differing(env, kind):
    """How far weights that differ over ranks lie from rank 0's."""
    model = t.made(seed=env.rank)()
    with torch.no_grad():
        model.layers[0].share.fill_(env.rank + 0.5)
    state = ax.init(t.placing(env, kind), model)
    assert state.model.layers[0].share.item() == 0.5
    wanted = t.weights(t.made(seed=0)())
    return compare(env, t.weights(state.model), wanted)


@each_kind
def test_rank_zeros_numbers_count(kind):
    """Modules that differ over ranks are rank 0's after placing, buffers included."""
    assert max(told(kind, "differing")) == 0.0


def test_batch_norm_warns_and_averages_its_statistics():
    """Numbers depend on ranks then, and that is said; statistics agree on all ranks."""

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def means(env, kind, model):
        """The running means after a step, of a fork too, and before they are met."""
        tx = ax.shard_model(env, kind)
        with pytest.warns(ax.NeutralityWarning, match=r"1 normalise.*GroupNorm"):
            state = ax.init(tx, model, lambda m: torch.optim.SGD(m.parameters(), 0.1))
        with warnings.catch_warnings(action="ignore", category=ax.NeutralityWarning):
            fork = ax.fork(state)
        batch = t.part(env, [torch.arange(16.0).reshape(8, 2)])
        after = [ax.step(tx, square)(one, batch)[0] for one in (state, fork)]
        own = net()
        own(batch[0])
        return [*(s.model[1].running_mean for s in after), own[1].running_mean]

    def rank(env):
        cases = [(k, m) for k in ("ddp", "fsdp2") for m in (net, net())]
        return [means(env, *case) for case in cases]

    for one, other in zip(*testing.run(2)(rank)(), strict=True):
        own, wanted = one[-1], (one[-1] + other[-1]) / 2
        assert not torch.allclose(own, wanted)  # each rank's own would be seen
        for mean in (*one[:-1], *other[:-1]):
            assert torch.allclose(mean, wanted)


PARTS = {
    **{f"adding-{n}": lambda env, kind, n=n: adding(env, kind, n) for n in (1, 2)},
    **{f.__name__: f for f in (once, breaking, tokenless, poisoning, evaluating)},
    **{f.__name__: f for f in (measuring, two_states, freezing, differing)},
    "own_engine": lambda env, kind: kind == "ddp" and own_engine(env),
}


@cache
def launched(kind):
    """What each rank of a kind found in each part, in one launch."""
    return launch(kind)(lambda env: {n: f(env, kind) for n, f in PARTS.items()})()


def told(kind, part):
    """What each rank of a kind found in one part."""
    return [rank[part] for rank in launched(kind)]
