"""ddp that sends fewer bits, in other buckets, of a static graph, by other methods."""

import copy
import re
from functools import cache

import pytest
import torch
from torch import nn

import accelx as ax
from accelx import testing
from accelx.engines.options import PowerSGD
from tests.laws import training as t
from tests.multi import test_engines as e, test_shard_model as s

pytestmark = [pytest.mark.multi, t.quiet_views]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BATCH = t.batches(rows=(4,))[0]


def parts():
    """The rows of each of two ranks."""
    return [[x[low : low + 2] for x in BATCH] for low in (0, 2)]


def summed(dtype):
    """Gradients as two ranks make them of `dtype`, by torch in one process."""
    found = {}
    for part in parts():
        model = t.made()()
        t.bare(model, part).backward()
        for name, grad in e.gradients(model).items():
            sent = grad.to(dtype) / 2
            found[name] = found[name] + sent if name in found else sent
    return {name: grad.double() for name, grad in found.items()}


def sent(env, hook):
    """The gap of gradients from what `hook` should make of them, and from the exact."""
    tx = ax.shard_model(env, hook=hook)
    state = ax.init(tx, t.made(), t.grouped)
    state, out = ax.grads(tx, t.bare)(state, t.part(env, BATCH))
    exact, model = e.by_torch([(t.bare, BATCH)])
    found = e.gradients(state.model)
    return (
        e.compare(env, found, summed(DTYPES[hook])),
        e.compare(env, found, exact),
        abs(float(out.loss) - t.bare(model, BATCH).item()),
    )


@pytest.mark.parametrize("hook", DTYPES)
def test_a_hook_sends_gradients_in_its_dtype(hook):
    """To the bit what casting, halving and adding them makes; the loss stays whole."""
    for rounded, exact, loss in told("sent", hook):
        assert rounded == 0
        assert 1e-6 < exact < 1e-1
        assert loss < 1e-12


@pytest.mark.parametrize("hook", ["bf16", "fp16", "powersgd", PowerSGD(2, start=5)])
def test_a_hook_is_seen_in_explain(hook):
    """It is no neutral pass, and its settings are in the table."""
    table = repr(ax.explain(ax.shard_model(ax.Env(), hook=hook)))
    row = table.splitlines()[1]
    assert row.split()[2] == "no"
    assert f"hook={hook!r}" in row
    assert not any(p.neutral for p in ax.shard_model(ax.Env(), hook=hook))
    assert all(p.neutral for p in ax.shard_model(ax.Env(), bucket_mb=1))
    assert (
        repr(ax.explain(ax.shard_model(ax.Env()))).splitlines()[1].split()[2] == "yes"
    )


def wide():
    """A model with a matrix that is worth cutting down."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 24)).double()


def ranks_of_updates(env, hook, steps):
    """The rank, as a matrix, of what each step adds to a weight, and the weights."""
    draw = torch.Generator().manual_seed(1)
    data = [torch.randn(16, 24, generator=draw).double() for _ in range(steps)]
    loss = lambda model, x: (model(x[0]) - x[0].flip(0)).square().mean()  # noqa: E731
    tx = ax.shard_model(env, hook=hook)
    state = ax.init(tx, wide, lambda m: torch.optim.SGD(m.parameters(), 1.0))
    found = []
    for x in data:
        before = state.model[0].weight.detach().clone()
        state, _ = ax.step(tx, loss)(state, t.part(env, [x]))
        moved = state.model[0].weight.detach() - before
        found.append(int(torch.linalg.matrix_rank(moved, rtol=1e-9)))
    return found, t.weights(state.model)


@pytest.mark.parametrize("rank", [1, 2])
def test_powersgd_sends_thin_matrices_from_its_start_on(rank):
    """Updates have that rank and no other, every rank makes the same; before, whole."""
    one, two = told("updates", rank)
    assert one[0] == two[0]
    assert min(one[0][:3]) > rank
    assert set(one[0][3:]) == {rank}
    assert t.same(one[1], two[1])


def test_control_without_it_updates_are_whole_matrices():
    """The count sees what is not thin."""
    found, _ = told("updates", None)[0]
    assert min(found) > 2


def remembering(env):
    """What powersgd does not fork, and warns of before it is saved."""
    place = ax.shard_model(env, hook="powersgd")
    state = ax.init(place, t.made(), t.grouped)
    with pytest.raises(ax.PlacementError) as forked:
        ax.fork(state)
    tx = ax.chain(place, ax.save_state(env, "memory://run", every=1))
    with pytest.warns(ax.NeutralityWarning) as saved:
        ax.init(tx, t.made(), t.grouped)
    return str(forked.value), [str(one.message) for one in saved]


def test_what_powersgd_remembers_is_neither_forked_nor_saved():
    """Both are said, and what may be written instead."""
    for forked, saved in told("remembering"):
        assert re.search(r"memory of powersgd.*bf16", forked)
        assert any("save_state does not keep that" in one for one in saved)


def forking(env):
    """Whether a state and its copy make the same step under bf16."""
    tx = ax.shard_model(env, hook="bf16")
    state = ax.init(tx, t.made(), t.grouped)
    other = ax.fork(state)
    pair = [ax.step(tx, t.bare)(x, t.part(env, BATCH))[0] for x in (state, other)]
    return t.same(*(t.weights(x.model) for x in pair))


def test_bf16_is_forked():
    """A hook without a memory copies with its state (L7)."""
    assert told("forking") == [True, True]


def run(env, *rest, **options):
    """The gap of a ddp run from the run by hand."""
    return s.gap(env, "ddp", *rest, **options)


def buckets(env, size):
    """How many reductions a step makes."""
    tx = ax.shard_model(env, bucket_mb=size)
    state = ax.init(tx, t.made(), t.grouped)
    step = ax.step(tx, t.bare)
    for _ in range(2):  # torch makes its buckets anew after the first
        state, _ = step(state, t.part(env, BATCH))
    with s.Collectives() as seen:
        step(state, t.part(env, BATCH))
    return seen.counts["allreduce_"]


EXACT = {
    "static": lambda env: run(env, static_graph=True),
    "static-accumulated": lambda env: run(env, ax.accumulate(3), static_graph=True),
    "static-allow": lambda env: run(env, static_graph=True, unused="allow"),
    "buckets": lambda env: run(env, ax.accumulate(2), bucket_mb=1e-4),
    "method": lambda env: run(
        env, make=s.tiny, loss=s.by("around"), methods=("around", "encode")
    ),
    "method-by-forward": lambda env: run(
        env, ax.accumulate(2), make=s.tiny, loss=s.by("scored"), methods="scored"
    ),
    "method-beside-forward": lambda env: run(env, make=s.tiny, methods="encode"),
    "static-method": lambda env: run(
        env, make=s.tiny, loss=s.by("around"), methods="around", static_graph=True
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_no_other_option_of_ddp_changes_a_number(case):
    """Buckets, a static graph, and methods in place of the model."""
    gaps = [rank[case] for rank in found()]
    assert max(gaps) < 1e-12, gaps


def test_buckets_are_as_large_as_asked():
    """Small ones go one by one, and all at once is one reduction."""
    for rank in found():
        assert rank[None] == 1
        assert rank[1e-4] > 5


def unused(env):
    """A static graph of which a part is not used."""
    tx = ax.shard_model(env, static_graph=True)
    state = ax.init(tx, e.partly, lambda m: torch.optim.SGD(m.parameters(), 0.1))
    batch = t.part(env, [torch.ones(4, 2).double()])
    with pytest.raises(ax.UnusedParameterError, match=r"layers\.1\.weight"):
        ax.step(tx, e.square)(state, batch)
    return True


def test_a_static_graph_still_names_unused_parameters():
    """Torch leaves them without a gradient, and so they are seen."""
    assert told("unused") == [True, True]


def unnamed(env):
    """A loss that calls a method, which is named and then is not."""
    tx = ax.shard_model(env, methods="encode")
    state = ax.init(tx, s.tiny, t.grouped)
    loss = lambda model, batch: type(model).around(model, batch[0]).mean()  # noqa: E731
    state, _ = ax.step(tx, loss)(state, t.part(env, BATCH))  # encode was seen
    tx = ax.shard_model(env)
    state = ax.init(tx, s.tiny, t.grouped)
    with pytest.raises(ax.PlacementError, match='methods="encode"'):
        ax.step(tx, loss)(state, t.part(env, BATCH))
    return True


def test_a_method_that_is_not_named_is_refused_with_the_word_to_write():
    """ddp cannot reduce what it did not see."""
    assert told("unnamed") == [True, True]


def raising(env):
    """Calls that raise, a deep copy, and then a step."""
    tx = ax.chain(ax.shard_model(env, methods="around"), ax.clip(t.LIMIT))
    state = ax.init(tx, s.tiny, t.grouped)
    tokens = BATCH[0]
    for call in (state.model, state.model.around):
        with pytest.raises((IndexError, TypeError)):
            call(tokens + 1000)
    twin = copy.deepcopy(state.model)
    with torch.no_grad():
        before = twin.around(tokens)
        for p in twin.parameters():
            p.mul_(0.5)
        assert not torch.equal(twin.around(tokens), before)
        assert torch.equal(state.model.around(tokens), before)
    state, out = ax.step(tx, s.by("around"))(state, t.part(env, BATCH))
    judge = t.by_hand(s.tiny, s.by("around"), t.grouped, [BATCH], factor=lambda k: 1)
    trace = t.Step(float(out.loss), out.norm.item(), t.weights(state.model))
    assert t.apart(judge, [trace]) < 1e-12
    return True


def test_a_method_that_raises_and_a_copy_leave_ddp_as_it_was():
    """The next step counts; a deep copy's method computes with the copy's weights."""
    assert told("raising") == [True, True]


def reducing(env):
    """A wire of fewer bits, without the hook and with it."""
    wanted = ax.with_precision(ax.Precision(param="fp32", reduce="bf16"))
    with pytest.raises(ax.PrecisionError, match='hook="bf16"'):
        ax.init(ax.chain(wanted, ax.shard_model(env)), t.made(torch.float32), t.grouped)
    tx = ax.chain(wanted, ax.shard_model(env, hook="bf16"))
    state = ax.init(tx, t.made(torch.float32), t.grouped)
    assert ax.step(tx, t.bare)(state, t.part(env, BATCH))[1].stepped
    return True


def test_a_hook_is_how_ddp_reduces_in_another_dtype():
    """Precision(reduce="bf16") is refused without it, and taken with it."""
    assert told("reducing") == [True, True]


@cache
def found():
    """What each rank saw of all of it, in one launch."""
    updates = {
        1: (PowerSGD(1, start=3), 6),
        2: (PowerSGD(2, start=3), 6),
        None: (None, 4),
    }
    cases = {
        **{("sent", h): lambda env, h=h: sent(env, h) for h in DTYPES},
        **{
            ("updates", k): lambda env, args=args: ranks_of_updates(env, *args)
            for k, args in updates.items()
        },
        **{f.__name__: f for f in (remembering, forking, unused, unnamed)},
        **{f.__name__: f for f in (raising, reducing)},
        **{n: lambda env, n=n: buckets(env, n) for n in (None, 1e-4)},
    }
    return testing.run(2, timeout=120)(s.all_of(EXACT | cases))()


def told(*case):
    """What each rank saw of one case."""
    return [rank[case if len(case) > 1 else case[0]] for rank in found()]
