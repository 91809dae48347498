"""with_local_sgd and with_diloco: what they refuse, print and do on one rank."""

import pytest
import torch

import accelx as ax
from accelx.passes.with_diloco import with_diloco
from accelx.passes.with_local_sgd import with_local_sgd
from tests.laws import training as t

ENV = ax.Env()
DATA = t.batches()


def outer(params):
    """An outer optimizer."""
    return torch.optim.SGD(params, 0.7, momentum=0.9, nesterov=True)


def plain(params):
    """One that only goes where the rank went."""
    return torch.optim.SGD(params, 1.0)


def nothing(params):
    """One that is none."""
    return


MAKE = {"with_local_sgd": with_local_sgd}
MAKE["with_diloco"] = lambda env, every: with_diloco(env, every, outer)
each = pytest.mark.parametrize("name", MAKE)


def run(*passes, data=DATA):
    """Weights after a run on one rank."""
    tx = ax.chain(ax.shard_model(ENV), *passes, ax.clip(t.LIMIT))
    state = ax.init(tx, t.made(), t.grouped)
    step = ax.step(tx, t.masked)
    for batch in data:
        state, _ = step(state, batch)
    return state


def gap(one, other):
    """The largest difference of two states' weights."""
    ours, theirs = t.weights(one.model), t.weights(other.model)
    return max((ours[n] - theirs[n]).abs().max().item() for n in ours)


def test_one_rank_by_itself_trains_as_ever():
    """There is nobody to agree with; an outer step of rate 1 goes where it went."""
    wanted = run()
    assert gap(run(with_local_sgd(ENV, 2)), wanted) == 0
    assert gap(run(with_diloco(ENV, 2, plain)), wanted) < 1e-12
    assert gap(run(with_diloco(ENV, 2, outer)), wanted) > 1e-4  # the control


def test_one_rank_is_saved_and_resumed(tmp_path):
    """At any step of local SGD; the outer state of DiLoCo comes along."""
    for every, stop in ((2, 2), (1, 1)):
        whole = run(with_diloco(ENV, every, outer))
        url = f"{tmp_path}/{every}"
        ax.save_state(ENV, url)(run(with_diloco(ENV, every, outer), data=DATA[:stop]))
        load = ax.load_state(ENV, url)
        assert (
            gap(run(with_diloco(ENV, every, outer), load, data=DATA[stop:]), whole) == 0
        )


def test_weights_loaded_alone_are_where_an_outer_run_starts(tmp_path):
    """The common weights are copied at the first update, not when the slot is made."""
    state = run()
    ax.save_state(ENV, str(tmp_path))(state)
    load = ax.load_state(ENV, str(tmp_path), only="model.**")
    start = run(with_diloco(ENV, 5, outer), load, data=DATA[:1])
    common = start.slots["with_diloco"].common
    assert all(torch.equal(common[n], p) for n, p in state.trained)


@each
@pytest.mark.parametrize("every", [0, -2, 1.5, True, None])
def test_no_number_of_updates_is_refused(name, every):
    """With the value."""
    with pytest.raises(ValueError, match=rf"{name}\(env, every=8\)") as error:
        MAKE[name](ENV, every)
    assert repr(every) in str(error.value)


@each
def test_an_env_that_is_none_is_refused(name):
    """As with every transform of ranks."""
    with pytest.raises(TypeError, match=f"{name} wants an Env first, got int"):
        MAKE[name](3, 2)


@pytest.mark.parametrize("wrong", [None, 0.7, torch.optim.SGD([torch.ones(1)], 0.1)])
def test_an_outer_that_is_no_function_is_refused(wrong):
    """An optimizer is over parameters that nobody knows yet."""
    with pytest.raises(TypeError, match="wants a function of parameters"):
        with_diloco(ENV, 2, wrong)
    with pytest.raises(TypeError, match="one that gives NoneType"):
        run(with_diloco(ENV, 2, nothing))


@each
def test_what_does_not_go_together_is_refused(name):
    """Two rhythms, both of them, and saves at any step."""
    other = MAKE[next(n for n in MAKE if n != name)](ENV, 2)
    one = MAKE[name](ENV, 2)
    with pytest.raises(ax.OrderError, match="one rhythm"):
        ax.chain(one, one)
    with pytest.raises(ax.OrderError, match="both would average"):
        ax.chain(one, other)
    with pytest.raises(ax.OrderError, match="each rank has other weights"):
        ax.chain(one, ax.on_preempt(ENV, "url"))


@each
def test_a_state_without_it_is_refused(name):
    """A mean now wants a state whose ranks train apart."""
    with pytest.raises(ax.PlacementError, match=f"chain has no {name}"):
        MAKE[name](ENV, 2)(run())


@each
def test_a_mean_now_spends_the_state(name):
    """What it returns goes on."""
    tx = ax.chain(ax.shard_model(ENV), MAKE[name](ENV, 9))
    state = ax.init(tx, t.made(), t.grouped)
    state, _ = ax.step(tx, t.masked)(state, DATA[0])
    after = MAKE[name](ENV, 9)(state)
    with pytest.raises(ax.SpentStateError, match=name):
        _ = state.model
    after, out = ax.step(tx, t.masked)(after, DATA[1])
    assert out.stepped


def test_they_print_as_their_code_and_claim_nothing():
    """Neither is neutral."""
    assert repr(with_local_sgd(ENV, 8)) == "with_local_sgd(Env(), 8)"
    assert repr(with_diloco(ENV, 8, outer)) == "with_diloco(Env(), 8, outer)"
    for make in MAKE.values():
        assert not any(p.neutral for p in make(ENV, 2))
