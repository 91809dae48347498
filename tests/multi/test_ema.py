"""The average of with_ema on ranks: slices, no communication, any number of ranks."""

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

import accelx as ax
from accelx import testing
from accelx.passes.with_ema import with_ema
from accelx.run_averaged import averaged
from tests.laws import training as t

pytestmark = [pytest.mark.multi, t.quiet_views]
DATA = t.batches(rows=(5, 1, 7, 3))
PLACES = [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3)]
SLOT = "with_ema"


def chain(env, kind, *more):
    """A pipeline with an average; slices of 6 and 11 rows are uneven on 3 ranks."""
    return t.pipeline(env, kind, with_ema(0.8, warmup=True), *more)


def trained(env, kind, data=DATA, *more, seed=1):
    """A state after a step for each batch."""
    tx = chain(env, kind, *more)
    state = ax.init(tx, t.made(seed=seed), t.grouped)
    step = ax.step(tx, t.masked)
    for batch in data:
        state, _ = step(state, t.part(env, batch))
    return state


def held(state):
    """This rank's part of each average."""
    return {n: t.local(w).clone() for n, w in state.slots[SLOT].weights.items()}


def full(state):
    """Each average in full; a collective where it is in slices."""
    return {n: t.whole(w).clone() for n, w in state.slots[SLOT].weights.items()}


def gap(one, other):
    """The largest difference."""
    assert one.keys() == other.keys()
    return max((one[n] - other[n]).abs().max().item() for n in one)


def alone():
    """The judge: averages, and the loss with them, of one process."""
    state = trained(ax.Env(), "plain")
    with averaged(state) as model:
        return full(state), float(t.bare(model, DATA[2])), t.weights(model)


def on_ranks(env, kind):
    """Averages, their loss, what was sent to take them, and whether all came back."""
    state = trained(env, kind)
    before, mine = t.weights(state.model), held(state)
    sharded = all(hasattr(w, "to_local") for w in state.slots[SLOT].weights.values())
    with averaged(state) as model:
        loss = float(t.bare(model, DATA[2]))
        inside = {n: t.whole(p).clone() for n, p in model.named_parameters()}
    again = t.same(before, t.weights(state.model)) and t.same(mine, held(state))
    after = float(ax.measure(ax.identity, t.bare)(state, DATA[2]).value)
    tx = chain(env, kind)
    take = next(p.after for p in tx if p.name == SLOT)
    with CommDebugMode() as seen:
        take(state, None)
    return full(state), loss, inside, again, sharded, after, seen.get_total_counts()


@pytest.mark.parametrize(("kind", "world"), PLACES)
def test_it_is_the_average_of_one_process(kind, world):
    """On copies and on uneven slices, inside `averaged` too, with nothing sent."""
    _, loss, whole = alone()
    for found in testing.run(world)(on_ranks)(kind):
        assert found[1] == pytest.approx(loss, abs=1e-12)
        assert gap(found[2], {n: whole[n] for n in found[2]}) < 1e-12
        assert found[3]
        assert found[4] == (kind == "fsdp2")
        assert abs(found[5] - loss) > 1e-4  # the control: the weights are others
        assert found[6] == 0


def same_run(env, kind):
    """Whether a run with an average ends, to the bit, as one without it."""
    tx = t.pipeline(env, kind)
    state = ax.init(tx, t.made(), t.grouped)
    step = ax.step(tx, t.masked)
    for batch in DATA:
        state, _ = step(state, t.part(env, batch))
    return t.same(t.weights(state.model), t.weights(trained(env, kind).model))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_run_is_the_one_without_it(kind):
    """Of every rank's part of every weight."""
    assert all(testing.run(2)(same_run)(kind))


def forked(env, kind):
    """A fork's averages after a step of the other, and after its own."""
    tx = chain(env, kind)
    state = trained(env, kind)
    other, before = ax.fork(state), held(state)
    step = ax.step(tx, t.bare)
    state, _ = step(state, t.part(env, DATA[0]))
    still = t.same(before, held(other)) and not t.same(before, held(state))
    other, _ = step(other, t.part(env, DATA[0]))
    return still and t.same(held(state), held(other))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_fork_has_an_average_of_its_own(kind):
    """On every engine; after the same step both are the same."""
    assert all(testing.run(2)(forked)(kind))


def leave(env, kind, folder):
    """Save after two steps; the averages then and at the end."""
    state = trained(env, kind, DATA[:2])
    url = ax.save_state(env, folder)(state)
    return url, full(state), full(trained(env, kind))


def arrive(env, kind, url):
    """The averages as they are loaded, whether they are slices, and at the end."""
    load = ax.load_state(env, url)
    state = trained(env, kind, [], load, seed=9)
    cut = [hasattr(w, "to_local") for w in state.slots[SLOT].weights.values()]
    loaded, taken = full(state), state.slots[SLOT].taken
    end = trained(env, kind, DATA[2:], load, seed=9)
    return loaded, cut, taken, full(end), held(end)


@pytest.mark.parametrize(
    ("kind", "world"), [("fsdp2", 2), ("fsdp2", 3), ("ddp", 3), ("plain", 1)]
)
def test_it_is_loaded_on_any_ranks(kind, world, tmp_path):
    """Saved on two ranks in slices: to the bit as it was, in the slices of here."""
    left = testing.run(2)(leave)("fsdp2", str(tmp_path))
    (url, saved, last), _ = left
    for loaded, cut, taken, end, _ in testing.run(world)(arrive)(kind, url):
        assert t.same(saved, loaded)
        assert set(cut) == {kind == "fsdp2"}
        assert taken == 2
        assert gap(last, end) < 1e-12
        assert (world, kind) != (2, "fsdp2") or t.same(last, end)
    assert gap(saved, last) > 1e-4


def exported(env, folder):
    """Export inside `averaged` under fsdp2; the averages in full."""
    state = trained(env, "fsdp2")
    with averaged(state):
        ax.export((env, state), folder)
    return full(state)


def test_averages_are_exported_inside(tmp_path):
    """What other programs read are the averages; frozen weights are the model's."""
    from safetensors.torch import load_file

    averages = testing.run(2)(exported)(str(tmp_path))[0]
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[n], averages[n]) for n in averages)
    assert "layers.3.norm.weight" in found
    assert "layers.3.norm.weight" not in averages
