"""with_local_sgd and with_diloco on ranks, held to loops written by hand."""

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

import accelx as ax
from accelx import testing
from accelx.passes.with_diloco import with_diloco
from accelx.passes.with_ema import with_ema
from accelx.passes.with_local_sgd import with_local_sgd
from tests.laws import training as t

hooked = "ignore:Full backward hook is firing:UserWarning"  # those that count messages
pytestmark = [pytest.mark.multi, pytest.mark.filterwarnings(hooked)]
DATA = t.batches(rows=(5, 1, 7, 3, 4, 6))
EXACT = 1e-12


def sgd(model):
    """Without momentum: one step is linear in the gradient."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)


def nesterov(params):
    """The outer optimizer of the paper."""
    return torch.optim.SGD(params, 0.7, momentum=0.9, nesterov=True)


def plain(params):
    """The outer optimizer that only goes where the ranks went."""
    return torch.optim.SGD(params, 1.0)


def adam(params):
    """An outer optimizer with moments and a count."""
    return torch.optim.Adam(params, 0.01)


PASSES = {
    "local": lambda env, every: with_local_sgd(env, every),
    "diloco": lambda env, every: with_diloco(env, every, nesterov),
    "adam": lambda env, every: with_diloco(env, every, adam),
    "plain": lambda env, every: with_diloco(env, every, plain),
}
OUTER = {"local": None, "diloco": nesterov, "adam": adam, "plain": plain}


def chain(env, name, every, *more):
    """A pipeline whose ranks train apart."""
    place = ax.shard_model(env, "ddp")
    return ax.chain(place, PASSES[name](env, every), ax.with_schedule(t.curve), *more)


def train(env, tx, optim, loss, data=DATA, seed=1):
    """The last state, and this rank's weights and losses after each step."""
    state = ax.init(tx, t.made(seed=seed + env.rank), optim)  # rank 0's count
    step, trace = ax.step(tx, loss), []
    for batch in data:
        state, out = step(state, t.part(env, batch))
        trace.append((float(out.loss), t.weights(state.model)))
    return state, trace


def share(loss, model, batch, low, high):
    """A rank's part of the batch's mean, times nothing: they add up over ranks."""
    if high == low:
        return None
    value = loss(model, tuple(x[low:high] for x in batch))
    if isinstance(value, ax.Mean):
        return value.total / batch[1].sum()
    return value * ((high - low) / len(batch[0]))


def by_hand(world, every, optim, loss, outer=None, data=DATA):
    """Every replica's weights after each step, in one process with torch alone."""
    models = [t.made()() for _ in range(world)]
    optimizers = [optim(m) for m in models]
    rates = [[g["lr"] for g in o.param_groups] for o in optimizers]
    names = [n for n, p in models[0].named_parameters() if p.requires_grad]
    common = {
        n: nn.Parameter(dict(models[0].named_parameters())[n].clone().detach())
        for n in names
    }
    mover = None if outer is None else outer(list(common.values()))
    trace = []
    for k, batch in enumerate(data):
        for r, (m, o, rate) in enumerate(zip(models, optimizers, rates, strict=True)):
            for group, base in zip(o.param_groups, rate, strict=True):
                group["lr"] = base * t.curve(k)
            part = share(loss, m, batch, *t.even(len(batch[0]), r, world))
            o.zero_grad(set_to_none=False)
            for p in m.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            if part is not None:
                (part * world).backward()
            o.step()
        if (k + 1) % every == 0:
            with torch.no_grad():
                meet([dict(m.named_parameters()) for m in models], common, mover)
        trace.append([t.weights(m) for m in models])
    return trace


def meet(models, common, mover):
    """All replicas go to their mean, or to where the outer optimizer goes."""
    for name, shared in common.items():
        mean = sum(m[name] for m in models) / len(models)
        shared.grad = shared - mean
        if mover is None:
            shared.copy_(mean)
    if mover is not None:
        mover.step()
    for name, shared in common.items():
        for m in models:
            m[name].copy_(shared)


def gap(one, other):
    """The largest difference of two sets of weights."""
    return max((one[n] - other[n]).abs().max().item() for n in one)


RUNS = {  # pass, every, optimizer, loss
    "local": ("local", 3, t.grouped, t.masked),
    "local, sgd": ("local", 2, sgd, t.bare),
    "diloco": ("diloco", 2, t.grouped, t.masked),
    "diloco, adam outside": ("adam", 3, sgd, t.bare),
}


def quiet_step(env, name):
    """What is sent in a step between means, and in one that takes the mean.

    Not the first of the run, at which ranks compare buffers.
    """
    tx = chain(env, name, 2)
    state = ax.init(tx, t.made(), sgd)
    step, sent = ax.step(tx, t.bare), []
    for batch in DATA[:4]:
        with CommDebugMode() as seen:
            state, out = step(state, t.part(env, batch))
            float(out.loss)
        sent.append(seen.get_total_counts())
    return sent[2:]


def skipping(env):
    """Skips of a run in which one rank's gradients are no numbers, once."""
    tx = chain(env, "local", 2, ax.clip(t.LIMIT))
    calls = []

    def odd(model, batch):
        calls.append(1)
        bad = env.rank == env.world - 1 and len(calls) == 2
        return t.bare(model, batch) * (float("nan") if bad else 1.0)

    state = ax.init(tx, t.made(), t.grouped)
    step, norms = ax.step(tx, odd), []
    for batch in DATA:
        state, out = step(state, t.part(env, batch))
        norms.append((out.stepped, float(out.norm)))
    return state.step, state.skipped, norms


def forked(env, name):
    """Whether a fork goes its own way to the same place."""
    tx = chain(env, name, 2)
    state, _ = train(env, tx, t.grouped, t.masked, DATA[:3])
    other, step = ax.fork(state), ax.step(tx, t.masked)
    before = t.weights(other.model)
    assert t.same(before, t.weights(state.model))
    for batch in DATA[3:5]:
        state, _ = step(state, t.part(env, batch))
    still = t.same(before, t.weights(other.model))
    for batch in DATA[3:5]:
        other, _ = step(other, t.part(env, batch))
    return still, t.same(t.weights(state.model), t.weights(other.model))


def averaged_now(env, name):
    """Weights before and after a mean that is asked for, and that it spends."""
    tx = chain(env, name, 100)
    state, _ = train(env, tx, t.grouped, t.masked, DATA[:3])
    before = t.weights(state.model)
    after = PASSES[name](env, 100)(state)
    assert state.spent == tx.passes[1].name
    return before, t.weights(after.model), after.slots["shard_model"].engine.name


def normed(env):
    """Running statistics of a rank before and after a mean."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    tx = ax.chain(ax.shard_model(env), with_local_sgd(env, 2))
    state = ax.init(tx, make, lambda m: torch.optim.SGD(m.parameters(), 0.1))
    step, found = ax.step(tx, lambda m, x: m(x).square().mean()), []
    for k in range(2):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(k))
        state, _ = step(state, x[env.rank * 4 : env.rank * 4 + 4])
        found.append(state.model[1].running_mean.clone())
    return found


@cache
def found(world):
    """All of that of each rank, in one launch."""

    def rank(env):
        runs = {}
        for name, (one, every, optim, loss) in RUNS.items():
            runs[name] = train(env, chain(env, one, every), optim, loss)[1]
        every_step = train(env, chain(env, "local", 1), sgd, t.masked)[1]
        tx = ax.chain(ax.shard_model(env), ax.with_schedule(t.curve))
        return {
            "runs": runs,
            "every step": every_step,
            "ddp": train(env, tx, sgd, t.masked)[1],
            "sums": {
                n: train(env, chain(env, n, 3), sgd, t.masked)[1]
                for n in ("local", "plain")
            },
            "parts": train(
                env,
                ax.chain(ax.accumulate(2), chain(env, "local", 3)),
                t.grouped,
                t.masked,
            )[1],
            "sent": {n: quiet_step(env, n) for n in PASSES},
            "skips": skipping(env),
            "forks": {n: forked(env, n) for n in PASSES},
            "now": {n: averaged_now(env, n) for n in PASSES},
        }

    return testing.run(world, timeout=120)(rank)()


worlds = pytest.mark.parametrize("world", [2, 3])


@pytest.mark.parametrize("name", RUNS)
@worlds
def test_each_rank_s_run_is_the_loop_by_hand(world, name):
    """Every weight of every rank after every step, with ranks without a row."""
    one, every, optim, loss = RUNS[name]
    judge = by_hand(world, every, optim, loss, OUTER[one])
    for r, rank in enumerate(found(world)):
        gaps = [gap(judge[k][r], w) for k, (_, w) in enumerate(rank["runs"][name])]
        assert max(gaps) < EXACT, gaps


@worlds
def test_ranks_agree_after_each_mean_and_only_then(world):
    """To the bit; in between they differ."""
    for name, (_, every, *_) in RUNS.items():
        runs = [rank["runs"][name] for rank in found(world)]
        for k in range(len(DATA)):
            alike = t.same(runs[0][k][1], runs[-1][k][1])
            assert alike == ((k + 1) % every == 0), (name, k)
            assert runs[0][k][0] == runs[-1][k][0]  # the loss is everyone's


@worlds
def test_a_mean_each_step_of_plain_sgd_is_ddp(world):
    """To rounding; a mean each third step is not."""
    for rank in found(world):
        pairs = zip(rank["every step"], rank["ddp"], strict=True)
        assert max(gap(a[1], b[1]) for a, b in pairs) < EXACT
        assert gap(rank["sums"]["local"][-1][1], rank["ddp"][-1][1]) > 1e-6


@worlds
def test_an_outer_step_of_1_is_the_mean(world):
    """DiLoCo with SGD of rate 1 is local SGD, to rounding; with Nesterov it is not."""
    for rank in found(world):
        pairs = zip(rank["sums"]["plain"], rank["sums"]["local"], strict=True)
        assert max(gap(a[1], b[1]) for a, b in pairs) < EXACT


@worlds
def test_microbatches_change_nothing(world):
    """Gradients of a rank add up before its step."""
    for rank in found(world):
        pairs = zip(rank["parts"], rank["runs"]["local"], strict=True)
        assert max(gap(a[1], b[1]) for a, b in pairs) < EXACT


def test_between_means_only_the_loss_is_sent():
    """One message for the report; the mean of all weights is one more."""
    for rank in found(2):
        assert rank["sent"] == {name: [1, 2] for name in PASSES}


@worlds
def test_ranks_skip_together(world):
    """A gradient that is no number on one rank is skipped by all; counts stay one."""
    for rank in found(world):
        steps, skipped, norms = rank["skips"]
        assert (steps, skipped) == (len(DATA) - 1, 1)
        assert [stepped for stepped, _ in norms] == [
            True,
            False,
            True,
            True,
            True,
            True,
        ]
    first, last = (rank["skips"][2] for rank in (found(world)[0], found(world)[-1]))
    assert first[0][1] != last[0][1]  # norms are each rank's own


@worlds
def test_a_fork_goes_its_own_way(world):
    """Common weights and outer state are its own."""
    for rank in found(world):
        assert set(rank["forks"].values()) == {(True, True)}


@worlds
def test_a_mean_can_be_asked_for(world):
    """At any step; it is the mean, or the outer step, over all ranks."""
    ranks = found(world)
    start = t.weights(t.made()())
    for name, outer in OUTER.items():
        before = [dict(rank["now"][name][0]) for rank in ranks]
        names = [n for n, p in t.made()().named_parameters() if p.requires_grad]
        common = {n: nn.Parameter(start[n].clone()) for n in names}
        models = copy.deepcopy(before)
        mover = None if outer is None else outer(list(common.values()))
        with torch.no_grad():
            meet(models, common, mover)
        for rank in ranks:
            after = rank["now"][name][1]
            assert max((after[n] - common[n]).abs().max() for n in names) < EXACT
            assert gap(rank["now"][name][0], after) > 1e-6


@pytest.mark.filterwarnings("ignore:1 normalise over the rows of one rank")
def test_running_statistics_are_averaged_with_the_weights():
    """Each rank has those of its rows until then."""
    (one, two), (other, too) = testing.run(2)(normed)()
    assert not torch.equal(one, other)
    assert torch.equal(two, too)


SAVED = {"local": 2, "diloco": 2, "adam": 3}


def leave(env, folder):
    """Save each run where ranks agree; its weights, and what was refused between."""
    made = {}
    for name, every in SAVED.items():
        save = ax.save_state(env, f"{folder}/{name}", every=every)
        tx = chain(env, name, every, save)
        state, trace = train(env, tx, t.grouped, t.masked)
        alone, odd = ax.save_state(env, f"{folder}/odd"), chain(env, name, every)
        state, _ = train(env, odd, t.grouped, t.masked, DATA[: every + 1])
        with pytest.raises(
            ax.CheckpointError, match=r"agree on, but 1\b.*updates"
        ) as e:
            alone(state)
        assert f"ax.with_{'local_sgd' if name == 'local' else 'diloco'}(" in str(
            e.value
        )
        for read in (ax.stream_weights, lambda *held: ax.export(held, folder)):
            with pytest.raises(ax.CheckpointError, match=r"on, but 1 .*: do it then"):
                read(env, state)
        alone(PASSES[name](env, every)(state))
        made[name] = trace
    return made


def moments(state):
    """This rank's moments of one weight."""
    p = dict(state.trained)["head.bias"]
    return state.optim.state[p]["exp_avg"].clone()


def arrive(env, urls):
    """Each run from its first save on: weights step by step, moments as loaded."""
    made = {}
    for name, url in urls.items():
        every = SAVED[name]
        tx = chain(env, name, every, ax.load_state(env, url))
        start = ax.init(tx, t.made(seed=9), t.grouped)
        first = moments(start), start.step
        step, trace = ax.step(tx, t.masked), []
        state = start
        for batch in DATA[every:]:
            state, _ = step(state, t.part(env, batch))
            trace.append(t.weights(state.model))
        made[name] = (first, trace)
    return made


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    """On the same ranks, each with its own moments; on others with their mean."""
    left = testing.run(2)(leave)(str(tmp_path))
    urls = {n: str(min((tmp_path / n).iterdir())) for n in SAVED}
    again = testing.run(2)(arrive)(urls)
    for mine, there in zip(left, again, strict=True):
        for name, every in SAVED.items():
            assert there[name][0][1] == every
            for k, weights in enumerate(there[name][1]):
                assert t.same(weights, mine[name][every + k][1]), (name, k)
    three = testing.run(3)(arrive)(urls)
    for name in SAVED:
        one, other = (rank[name][0][0] for rank in again)
        assert not torch.equal(one, other)
        for rank in three:
            assert torch.equal(rank[name][0][0], (one + other) / 2)


def test_saves_that_would_find_ranks_apart_are_refused_at_once():
    """When the state is made, with what to write; a multiple is right."""

    def rank(env):
        for name in PASSES:
            tx = chain(env, name, 4, ax.save_state(env, "none", every=6))
            with pytest.raises(ax.CheckpointError, match=r"every=4\), or a multiple"):
                ax.init(tx, t.made(), sgd)
            ax.init(chain(env, name, 3, ax.save_state(env, "none", 6)), t.made(), sgd)

    testing.run(2)(rank)()


def test_slices_and_other_envs_are_refused():
    """A mean of whole copies is taken over the ranks of the model."""

    def rank(env):
        for make in PASSES.values():
            for place in (ax.identity, ax.shard_model(env, "fsdp2")):
                with pytest.raises(
                    ax.PlacementError, match=r'write shard_model.*"ddp"'
                ):
                    ax.init(ax.chain(place, make(env, 2)), t.made(), sgd)
            tx = ax.chain(ax.shard_model(env), make(ax.Env(), 2))
            with pytest.raises(ax.PlacementError, match="once, for both"):
                ax.init(tx, t.made(), sgd)
            for odd in ({"hook": "bf16"}, {"static_graph": True}):
                tx = ax.chain(ax.shard_model(env, **odd), make(env, 2))
                with pytest.raises(ax.PlacementError, match="none are; write"):
                    ax.init(tx, t.made(torch.float32), sgd)

    testing.run(2)(rank)()


def averaged_too(env):
    """Averages of weights that ranks agree on, and what is refused."""
    place, apart = ax.shard_model(env), with_local_sgd(env, 2)
    with pytest.raises(ax.PlacementError, match=r"with_ema\(0.9, every=2\)"):
        ax.init(ax.chain(place, apart, with_ema(0.9, every=3)), t.made(), sgd)
    tx = ax.chain(place, apart, with_ema(0.9, every=2))
    state, _ = train(env, tx, t.grouped, t.masked, DATA[:5])
    return {n: w.clone() for n, w in state.slots["with_ema"].weights.items()}


def test_an_average_is_of_weights_that_ranks_agree_on():
    """So it is the same on all of them, to the bit; another rhythm is refused."""
    one, other = testing.run(2)(averaged_too)()
    assert t.same(one, other)


def scaled(env):
    """Loss scales and counts of a run in fp16 in which one rank overflows once."""
    calls = []

    def odd(model, batch):
        calls.append(1)
        big = 1e30 if env.rank == 1 and len(calls) == 2 else 1.0
        return t.bare(model, batch) * big

    tx = ax.chain(
        ax.shard_model(env), with_local_sgd(env, 2), ax.with_precision("fp16")
    )
    state = ax.init(tx, t.made(torch.float32), t.grouped)
    step, scales = ax.step(tx, odd), []
    for batch in DATA:
        state, _ = step(state, t.part(env, (batch[0], batch[1].float())))
        scales.append(state.slots["loss_scale"].scale)
    return scales, state.step, state.skipped


def test_ranks_agree_on_the_loss_scale():
    """An overflow on one is skipped by all, and they stay in one rhythm."""
    one, other = testing.run(2)(scaled)()
    assert one == other
    assert one[2] >= 1
    assert one[0][1] < one[0][0]
