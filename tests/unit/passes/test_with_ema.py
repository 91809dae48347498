"""The average of with_ema is torch's own, and it changes nothing of the run."""

import copy
from contextlib import nullcontext

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import accelx as ax
from accelx.passes.with_ema import with_ema
from accelx.run_averaged import averaged
from tests.laws import training as t

ENV = ax.Env()
DATA = t.batches(rows=(5, 1, 7, 3, 4, 6))


def run(*passes, loss=t.masked, data=DATA, make=None, each=lambda state: None):
    """The last state of a run; `each` sees the state of every batch."""
    tx = ax.chain(*passes, ax.clip(t.LIMIT), ax.with_schedule(t.curve))
    state = ax.init(tx, make or t.made(), t.grouped)
    step = ax.step(tx, loss)
    for batch in data:
        state, _ = step(state, t.part(ENV, batch))
        each(state)
    return state


def judge(decay, every):
    """torch's AveragedModel beside a run without the pass: its weights by name."""
    theirs = []

    def follow(state):
        if not theirs:
            theirs.append(AveragedModel(state.model, avg_fn=get_ema_avg_fn(decay)))
        if state.step % every == 0:
            theirs[0].update_parameters(state.model)

    run(each=follow)
    return dict(theirs[0].module.named_parameters())


def gap(one, other):
    """The largest difference of two sets of tensors, by the names of the first."""
    return max((one[n] - other[n]).detach().abs().max().item() for n in one)


def averages(state):
    """The slot's averages."""
    return state.slots["with_ema"].weights


@settings(max_examples=12, deadline=None)
@given(st.floats(0.0, 0.9999), st.integers(1, 3))
def test_it_is_the_average_that_torch_takes(decay, every):
    """AveragedModel's, fed each `every`-th update, frozen weights too."""
    wanted = judge(decay, every)
    state = run(with_ema(decay, every=every))
    assert gap(averages(state), wanted) < 1e-14
    with averaged(state) as model:
        assert gap(dict(model.named_parameters()), wanted) < 1e-14
    assert state.slots["with_ema"].taken == len(DATA) // every


def test_control_other_decays_and_rhythms_are_seen():
    """The comparison tells 0.9 from 0.8, and each update from every second."""
    wanted = judge(0.9, 1)
    for decay, every in ((0.8, 1), (0.9, 2)):
        assert gap(averages(run(with_ema(decay, every=every))), wanted) > 1e-4


def follow(decays):
    """The average by its formula with one decay for each update after the first."""
    trace = []
    run(each=lambda state: trace.append(t.weights(state.model)))
    average = trace[0]
    for decay, weights in zip(decays, trace[1:], strict=True):
        average = {n: decay * average[n] + (1 - decay) * weights[n] for n in average}
    return average


COUNTS = range(1, len(DATA))


@pytest.mark.parametrize(
    ("given", "decays"),
    [
        ((0.999, True), [(1 + n) / (10 + n) for n in COUNTS]),
        ((0.25, True), [min(0.25, (1 + n) / (10 + n)) for n in COUNTS]),
        ((lambda n: n / 10, False), [n / 10 for n in COUNTS]),
        ((lambda n: 1.0, True), [(1 + n) / (10 + n) for n in COUNTS]),
    ],
)
def test_the_decay_follows_how_often_it_was_taken(given, decays):
    """The warm-up, and a function of one's own, by the formula."""
    state = run(with_ema(given[0], warmup=given[1]))
    assert gap(averages(state), follow(decays)) < 1e-14
    assert gap(averages(state), follow([0.5] * len(COUNTS))) > 1e-4


def test_the_run_is_the_one_without_it():
    """Every weight, moment and loss to the bit; evaluating in between, too."""
    losses = []

    def look(state):
        with averaged(state) as model:
            losses.append(float(t.bare(model, DATA[0])))

    plain, state = run(), run(with_ema(0.9), each=look)
    assert t.same(t.weights(plain.model), t.weights(state.model))
    moments = [list(s.optim.state.values()) for s in (plain, state)]
    assert all(t.same(*both) for both in zip(*moments, strict=True))
    assert losses[-1] != t.bare(state.model, DATA[0]).item()


def test_a_skipped_update_moves_it_not():
    """A batch without a token leaves average and count."""
    tokens, mask = DATA[0]
    state = run(with_ema(0.9), data=[*DATA[:3], (tokens, mask * 0)])
    wanted = run(with_ema(0.9), data=DATA[:3])
    assert (state.skipped, state.slots["with_ema"].taken) == (1, 3)
    assert t.same(averages(state), averages(wanted))


class Short(nn.Module):
    """One weight, and a loss whose gradient is 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

    def forward(self, x):
        return (self.weight * x).sum()


def test_weights_of_16_bits_are_averaged_in_32():
    """Steps that bfloat16 would swallow add up; the model gets them rounded."""
    tx = with_ema(0.999)
    sgd = lambda m: torch.optim.SGD(m.parameters(), 0.125)  # noqa: E731
    state = ax.init(tx, Short(), sgd)
    step = ax.step(tx, lambda model, x: model(x))
    wanted, sunk, weight = torch.tensor(0.875), torch.tensor(0.875).bfloat16(), 1.0
    for k in range(5):
        state, _ = step(state, torch.ones(1, dtype=torch.bfloat16))
        weight -= 0.125
        if k:
            wanted = wanted.lerp(torch.tensor(weight), 1e-3)
            sunk = sunk.lerp(torch.tensor(weight).bfloat16(), 1e-3)
    held = averages(state)["weight"]
    assert held.dtype == torch.float32
    assert held.tolist() == pytest.approx([wanted.item()] * 4, abs=1e-6)
    assert sunk == 0.875  # the control: in bfloat16 nothing would have moved
    with averaged(state) as model:
        assert torch.equal(model.weight, held.bfloat16())
    assert state.model.weight.dtype == torch.bfloat16


def test_inside_averaged_the_model_has_the_averages():
    """In evaluation mode, without gradients, for measure too; nested is the same."""
    tx = ax.chain(with_ema(0.5))
    state = run(with_ema(0.5))
    state.model.layers[0].eval()
    modes = [m.training for m in state.model.modules()]
    wanted = copy.deepcopy(state.model)
    for name, p in wanted.named_parameters():
        p.data.copy_(averages(state).get(name, p.detach()))
    with averaged(state) as model, averaged(state):
        assert model is state.model
        assert not model.training
        assert not torch.is_grad_enabled()
        found = ax.measure(tx, t.masked)(state, DATA[2])
    assert [m.training for m in state.model.modules()] == modes
    assert found.value.item() == t.masked(wanted, DATA[2]).value.item()
    assert float(found.value) != float(ax.measure(tx, t.masked)(state, DATA[2]).value)


def test_an_autocast_around_sees_the_averages_too():
    """torch casts a weight once inside of it; measured before, within and after."""
    tx, x = with_ema(0.5), torch.randn(8, 4)
    loss = lambda m, x: m(x).float().square().mean()  # noqa: E731
    sgd = lambda m: torch.optim.SGD(m.parameters(), 0.1)  # noqa: E731
    state, step = ax.init(tx, nn.Linear(4, 2), sgd), ax.step(tx, loss)
    for _ in range(3):
        state, _ = step(state, x)

    def found(around):
        values = []
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            for lend in (nullcontext, averaged, nullcontext):
                with lend(state), torch.autocast("cpu", torch.bfloat16):
                    values.append(loss(state.model, x).item())
        return values

    assert found(True) == found(False)
    assert found(True)[0] != found(True)[1]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_at_the_end_the_weights_are_what_they_were(error):
    """To the bit, also when the body raises, and the run goes on as if unlooked at."""
    state = run(with_ema(0.5))
    before = t.weights(state.model)

    def fails():
        with averaged(state) as model:
            assert not t.same(before, t.weights(model))
            raise error

    with pytest.raises(error):
        fails()
    assert t.same(before, t.weights(state.model))
    assert not state.slots["with_ema"].lent


def test_before_the_first_update_it_is_the_weights_themselves():
    """Also where they were loaded after the slot was opened."""
    tx = with_ema(0.5)
    state = ax.init(tx, t.made(), t.grouped)
    with torch.no_grad():
        for p in state.model.parameters():
            p.add_(1.0)
    before = t.weights(state.model)
    with averaged(state) as model:
        assert t.same(before, t.weights(model))
    state, _ = ax.step(tx, t.bare)(state, DATA[0])
    assert t.same(averages(state), dict(state.trained))


def test_to_step_or_save_inside_is_refused(tmp_path):
    """Both would take the averages for the weights that are trained."""
    tx = with_ema(0.5)
    state = run(tx)
    with averaged(state):
        with pytest.raises(ax.CheckpointError, match=r"averages; save outside"):
            ax.save_state(ENV, str(tmp_path))(state)
        kept = ax.fork(state)
        with (
            torch.enable_grad(),
            pytest.raises(ax.PlacementError, match="step outside"),
        ):
            ax.step(tx, t.bare)(kept, DATA[0])
    ax.save_state(ENV, str(tmp_path))(state)


def test_a_fork_has_an_average_of_its_own():
    """The next step of one leaves the other's average."""
    tx = with_ema(0.5)
    state = run(tx)
    other = ax.fork(state)
    before = {n: w.clone() for n, w in averages(other).items()}
    state, _ = ax.step(tx, t.bare)(state, DATA[0])
    assert t.same(before, averages(other))
    other, _ = ax.step(tx, t.bare)(other, DATA[0])
    assert t.same(averages(state), averages(other))


def test_a_run_that_is_resumed_has_the_same_average(tmp_path):
    """Stopped after any update: averages and counts to the bit."""
    whole = run(with_ema(0.9, every=2, warmup=True))
    for stop in range(len(DATA) + 1):
        url = f"{tmp_path}/{stop}"
        tx = with_ema(0.9, every=2, warmup=True)
        ax.save_state(ENV, url)(run(tx, data=DATA[:stop]))
        state = run(tx, ax.load_state(ENV, url), data=DATA[stop:], make=t.made(seed=9))
        assert t.same(averages(whole), averages(state))
        assert state.slots["with_ema"].taken == whole.slots["with_ema"].taken


def test_control_without_its_slot_a_resumed_run_has_another(tmp_path):
    """What is left out of the load starts anew, from the weights that were loaded."""
    tx = with_ema(0.9)
    ax.save_state(ENV, str(tmp_path))(run(tx, data=DATA[:3]))
    only = ("model.**", "optim.**", "step", "skipped", "slots.with_schedule")
    load = ax.load_state(ENV, str(tmp_path), only=only)
    state = run(tx, load, data=DATA[3:], make=t.made(seed=9))
    assert gap(averages(run(tx)), averages(state)) > 1e-5
    with pytest.raises(ax.CheckpointError, match="not in this chain; put it in, or"):
        run(ax.load_state(ENV, str(tmp_path)))
    rest = lambda name, _: not name.startswith("slots.with_ema")  # noqa: E731
    plain = run(ax.load_state(ENV, str(tmp_path), only=rest), data=DATA[3:])
    assert gap(dict(plain.trained), dict(run().trained)) == 0
    first = run(tx, data=DATA[:4])
    once = run(tx, load, data=DATA[3:4], make=t.made(seed=9))
    assert t.same(averages(once), dict(first.trained))


@pytest.mark.parametrize("decay", [1, 1.0, -0.1, 2, True, "0.9", None, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    """Before anything is made, with the value and what to write."""
    with pytest.raises(ValueError, match=r"with_ema\(0.999\)") as error:
        with_ema(decay)
    assert repr(decay) in str(error.value)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None])
def test_a_rhythm_that_is_none_is_refused(every):
    """A whole number of updates is wanted."""
    with pytest.raises(ValueError, match=r"write every=1"):
        with_ema(0.9, every=every)


def test_a_function_that_leaves_the_range_is_refused():
    """With what it returned, and for which count."""
    with pytest.raises(ValueError, match=r"got 2 for 2"):
        run(with_ema(lambda n: n))


def test_a_state_without_an_average_says_so():
    """The chain that would have one is named."""
    with pytest.raises(ax.PlacementError, match=r"ax.with_ema"), averaged(run()):
        pass


def test_it_prints_as_its_code_and_stands_once():
    """Two of them, or one before the ranks agree, are refused."""
    assert repr(with_ema(0.9)) == "with_ema(0.9)"
    wanted = "with_ema(0.9, every=2, warmup=True)"
    assert repr(with_ema(0.9, every=2, warmup=True)) == wanted
    with pytest.raises(ax.OrderError, match="two averages"):
        ax.chain(with_ema(0.9), with_ema(0.99))
    later = ax.transform("with_local_sgd", after=lambda state, out: (state, out))
    with pytest.raises(ax.OrderError, match="all ranks agree on"):
        ax.chain(with_ema(0.9), later)


def test_a_model_without_trained_weights_has_an_empty_average():
    """Nothing is taken, and nothing fails."""
    frozen = t.made()().requires_grad_(False)
    state = ax.init(with_ema(0.9), frozen)
    assert averages(state) == {}
    slot = attrs.evolve(state.slots["with_ema"], taken=1)
    with averaged(ax.with_slot(state, "with_ema", slot)) as model:
        assert model is frozen
