"""A run on XLA is the run of a plain loop on the CPU, on any number of devices."""

from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax
from tests.laws import training as t

NEAR = 2e-6  # float32: the gaps measured are at most 5e-7


ROWS = (8, 8, 6)


def by_hand(loss=t.bare, optim=t.grouped, factor=t.curve):
    """The judge: torch alone, on the CPU, with whole batches."""
    make, data = t.made(torch.float32), t.batches(ROWS, torch.float32)
    return t.by_hand(make, loss, optim, data, factor=factor)


@pytest.mark.parametrize(
    ("loss", "optim", "n"),
    [(t.bare, t.grouped, 1), (t.masked, t.grouped, 2), (t.masked, t.pair, 1)],
)
def test_a_run_on_xla_is_the_plain_one(train, loss, optim, n):
    """Losses, norms and every weight at every step: masks, ties, microbatches (L4)."""
    run, _ = train(ax.accumulate(n), loss=loss, optim=optim)
    judge = by_hand(loss, optim)
    assert t.apart(judge, run) < NEAR
    other = by_hand(loss, optim, factor=lambda step: 1.0)
    assert t.apart(other, run) > 1e-4  # the control: another schedule is told apart


def test_the_mean_of_means_is_another_run(train):
    """The control of accumulation: what must not be written is seen."""
    run, _ = train(ax.accumulate(2), loss=t.mean_of_means)
    assert t.apart(by_hand(t.masked), run) > 1e-4


def test_placing_keeps_the_object_its_class_and_its_names(train):
    """Nothing is wrapped, and tied weights stay one (L8)."""
    model = t.made(torch.float32)()
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    _, state = train(model=model)
    assert state.model is model
    assert type(model) is t.Net
    assert [n for n, _ in model.named_parameters(remove_duplicate=False)] == names
    assert model.head.weight is model.embed.weight
    assert {p.device.type for p in model.parameters()} == {"xla"}


def test_weights_and_moments_lie_in_slices(train):
    """With several devices each holds a part of a weight, its gradient's and Adam's."""
    from torch_xla.distributed import spmd

    from accelx._xla import cut, devices, host

    _, state = train()
    cut(wait=True)
    weight = state.model.embed.weight  # 11 rows of 8: slices of 8 / devices columns
    held = [weight, state.optim.state[weight]["exp_avg"]]
    for tensor in held:
        sliced = spmd.wrap_if_sharded(tensor.detach())
        if devices() > 1:
            shapes = [tuple(shard.data.shape) for shard in sliced.local_shards]
            assert shapes == [(11, 8 // devices())] * devices()
        assert host(tensor).shape == (11, 8)


def test_a_run_compiles_each_program_once(env, compilations):
    """Forward and backward, the norm, the update, the second update: and no more."""
    rows = torch.arange(44.0).reshape(11, 4).sin()
    loader = DataLoader(TensorDataset(rows), batch_size=4, shuffle=True)

    def loss(model, batch):
        each = model(batch[0]).square().mean(1)
        weights = ax.row_weights(batch)
        return ax.Mean((each * weights).sum(), weights.sum())

    tx = ax.chain(
        ax.shard_loader(env, static_shapes=True),
        ax.shard_model(env, "xla"),
        ax.clip(1.0),
        ax.with_schedule(lambda step: 1 / (2 + step)),
    )
    state = ax.init(tx, lambda: torch.nn.Linear(4, 4), t.grouped)
    step, counts = ax.step(tx, loss), [compilations()]
    for batch in ax.feed(tx, loader, stop=9):  # every third is short
        state, _ = step(state, batch)
        counts.append(compilations())
    new = [after - before for before, after in pairwise(counts)]
    assert new[0] <= 5
    assert new[1] <= 1  # AdamW has moments now
    assert new[2:] == [0] * 7
    x = next(iter(ax.feed(tx, loader)))[0][:3]
    step(state, [x])
    assert compilations() > counts[-1]  # the control: another shape is compiled


def test_a_fork_goes_its_own_way(train, env):
    """A step of the fork is that of the original, and touches nothing of it (L7)."""
    from accelx._xla import host, put

    _, state = train()
    tx = ax.chain(ax.shard_model(env, "xla"))
    batch = [put(x) for x in t.batches((6,), torch.float32)[0]]
    twin = ax.fork(state)
    before = {n: host(w) for n, w in t.weights(state.model).items()}
    twin, _ = ax.step(tx, t.bare)(twin, batch)
    assert t.same(before, {n: host(w) for n, w in t.weights(state.model).items()})
    state, _ = ax.step(tx, t.bare)(state, batch)
    one, two = (
        {n: host(w) for n, w in t.weights(s.model).items()} for s in (state, twin)
    )
    assert t.same(one, two)
    assert not t.same(one, before)  # the control: a step moves weights


def test_evaluation_is_that_of_the_plain_model(train, env):
    """`measure` gives Means as on the CPU, and leaves nothing to be run later."""
    from accelx._xla import put

    trace, state = train()
    batches = t.batches((8, 8), torch.float32)
    score = ax.measure(ax.chain(ax.shard_model(env, "xla")), t.masked)
    found = score(state, [put(x) for x in batches[0]])
    found += score(state, [put(x) for x in batches[1]])
    plain = t.made(torch.float32)()
    plain.load_state_dict(trace[-1].weights, strict=False)
    with torch.no_grad():
        parts = [t.masked(plain, batch) for batch in batches]
    wanted = parts[0] + parts[1]
    assert float(found.value) == pytest.approx(float(wanted.value), abs=NEAR)
    assert float(found.weight) == float(wanted.weight)


def test_bf16_is_near_and_not_the_same(train):
    """Autocast reaches XLA."""
    run, _ = train(ax.with_precision("bf16"))
    assert 1e-5 < t.apart(by_hand(), run) < 5e-2


def test_averages_of_weights_follow(train):
    """`with_ema` averages what lies on devices, as it does on the CPU."""
    from accelx._xla import host

    decay = 0.5
    trace, state = train(ax.with_ema(decay))
    wanted = trace[0].weights["head.bias"]
    for step in trace[1:]:
        wanted = decay * wanted + (1 - decay) * step.weights["head.bias"]
    with ax.averaged(state) as model:
        torch.testing.assert_close(host(model.head.bias), wanted, atol=NEAR, rtol=0)
    assert not torch.equal(wanted, trace[-1].weights["head.bias"])  # the control
