"""Learning rates are a function of updates: never of ranks, microbatches or skips."""

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    ReduceLROnPlateau,
    StepLR,
)

import accelx as ax
from accelx import testing
from tests.laws import training as t

pytestmark = [pytest.mark.multi, t.quiet_views]
DATA = t.batches(rows=(4, 1, 6, 3, 5))


def rates(env, schedule, microbatches=1, optim=t.grouped, loss=t.bare, data=DATA):
    """The rate of every group at every update."""
    tx = ax.chain(
        ax.shard_model(env), ax.accumulate(microbatches), ax.with_schedule(schedule)
    )
    state = ax.init(tx, t.made(), optim)
    step, trace = ax.step(tx, loss), []
    groups = [g for o in state.optimizers for g in o.param_groups]
    for optimizer in state.optimizers:
        optimizer.register_step_pre_hook(
            lambda o, *_: trace.append([float(g["lr"]) for g in o.param_groups])
        )
    for batch in data:
        state, _ = step(state, t.part(env, batch))
    return trace, [float(g["lr"]) for g in groups]


def by_torch(make, losses=(), optim=t.grouped):
    """The rates of a plain loop around torch's own scheduler."""
    optimizer = optim(t.made()())
    scheduler, trace = make(optimizer), []
    for k in range(len(DATA)):
        trace.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        scheduler.step(*losses[k : k + 1])
    return trace


SCHEDULES = {
    "function": (t.curve, lambda o: LambdaLR(o, t.curve)),
    "cosine": (ax.warmup_cosine(2, 5), lambda o: LambdaLR(o, ax.warmup_cosine(2, 5))),
    "StepLR": (lambda o: StepLR(o, 2),) * 2,
    "CosineAnnealingLR": (lambda o: CosineAnnealingLR(o, 5),) * 2,
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("world", [1, 2])
def test_rates_are_those_of_a_plain_loop(world, microbatches, name):
    """One step of the schedule an update, on any ranks, for each group's own rate."""
    given, judge = SCHEDULES[name]
    for trace, _ in testing.run(world)(rates)(given, microbatches):
        assert torch.allclose(torch.tensor(trace), torch.tensor(by_torch(judge)))


@pytest.mark.parametrize("world", [1, 2])
def test_a_plateau_is_judged_by_the_global_loss_once_an_update(world):
    """ReduceLROnPlateau sees Out.loss, the same on all ranks."""
    seen = []

    def plateau(optimizer):
        made = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        step = made.step
        made.step = lambda loss: (seen.append(loss), step(loss))[1]
        return made

    def rank(env):
        del seen[:]
        trace, _ = rates(env, plateau, 4)
        return trace, list(seen)

    found = testing.run(world)(rank)()
    assert all(one == found[0] for one in found)
    trace, losses = found[0]
    assert len(losses) == len(DATA)
    make = lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0)  # noqa: E731
    assert torch.allclose(torch.tensor(trace), torch.tensor(by_torch(make, losses)))
    assert trace[0] != trace[-1]
    first = t.by_hand(t.made(), t.bare, t.grouped, DATA[:1], 1e9)[0].loss
    assert losses[0] == pytest.approx(first, abs=1e-12)


@pytest.mark.parametrize("schedule", [t.curve, lambda o: StepLR(o, 2)])
def test_each_of_several_optimizers_is_scheduled(schedule):
    """A list from `optim` is scheduled one by one, from each one's own rate."""
    trace, _ = rates(ax.Env(), schedule, optim=t.pair)
    adam, sgd = trace[::2], trace[1::2]
    assert len(adam) == len(sgd) == len(DATA)
    for k, ((one,), (other,)) in enumerate(zip(adam, sgd, strict=True)):
        assert one / t.RATE == pytest.approx(other / 0.1)
        factor = t.curve(k) if schedule is t.curve else 0.1 ** (k // 2)
        assert one == pytest.approx(t.RATE * factor)


def test_a_skipped_step_moves_no_schedule():
    """The next update has the rate that the skipped one would have had."""
    for schedule in (t.curve, lambda o: StepLR(o, 1)):
        tokens, mask = DATA[0]
        data = [DATA[0], (tokens, mask * 0), DATA[2]]
        skipping, _ = rates(ax.Env(), schedule, loss=t.masked, data=data)
        plain, _ = rates(ax.Env(), schedule, loss=t.masked, data=[DATA[0], DATA[2]])
        assert skipping == plain


def test_a_rate_that_is_a_tensor_stays_one():
    """As compiled optimizers want it: filled in place, not replaced."""
    rate = torch.tensor(0.1)
    tx = ax.with_schedule(t.curve)
    state = ax.init(tx, t.made(), lambda m: torch.optim.Adam(m.parameters(), rate))
    for batch in DATA[:2]:
        state, _ = ax.step(tx, t.bare)(state, t.part(ax.Env(), batch))
    now = state.optim.param_groups[0]["lr"]
    assert isinstance(now, torch.Tensor)
    assert now.item() == pytest.approx(0.1 * t.curve(1))


@pytest.mark.parametrize("wrong", [1e-3, "cosine", None])
def test_what_is_no_function_is_refused(wrong):
    """A number or a name is not a schedule; the message has both forms."""
    with pytest.raises(TypeError, match=r"lambda step.*StepLR") as error:
        ax.with_schedule(wrong)
    assert repr(wrong) in str(error.value)


def test_a_function_that_makes_neither_is_refused():
    """What came back is named."""
    tx = ax.with_schedule(lambda o: "0.1")
    with pytest.raises(TypeError, match=r"got str.*StepLR"):
        ax.init(tx, t.made(), t.grouped)


def test_two_schedules_are_refused():
    """Both would set the rate."""
    with pytest.raises(ax.OrderError, match="multiply their factors"):
        ax.chain(ax.with_schedule(t.curve), ax.with_schedule(ax.warmup_cosine(1, 2)))
