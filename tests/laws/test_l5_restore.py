"""L5: restoring what was saved gives the same state, on any ranks and any engine."""

import re
from itertools import product

import pytest
import torch

import accelx as ax
from accelx import testing
from accelx.saves.commit import open_manifest, resolve
from tests.laws import odd
from tests.laws.training import curve, quiet_views

pytestmark = [pytest.mark.multi, quiet_views]
WORLDS = (1, 2, 3, 4)
OPTIMS = {f.__name__: f for f in (odd.adamw, odd.sgd, odd.several, odd.adafactor)}
COPIED = "adafactor"  # the one with weights that fsdp2 cannot train


def cases(world):
    """(kind, optimizer) that a world is tried with; on one rank there is one kind."""
    kinds = ("plain",) if world == 1 else ("ddp", "fsdp2")
    every = product(kinds, OPTIMS)
    return [one for one in every if one != ("fsdp2", COPIED)]


def chain(env, kind, *more):
    """A placed model, a schedule, and a slot of a user's own."""
    place = ax.identity if kind == "plain" else ax.shard_model(env, kind)
    opened = ax.transform("mine", start=lambda s, tx: ax.with_slot(s, "mine", blank()))
    return ax.chain(place, ax.with_schedule(curve), opened, *more)


def blank():
    """The slot as its pass opens it: of what it cannot make out of nothing."""
    kinds = {k: odd.slot(0)[k] for k in ("record", "object", "counter")}
    return {**kinds, "later": None}


def made(seed, name, tx):
    """A state over new weights."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    return ax.init(tx, odd.Odd(name == COPIED), OPTIMS[name])


def weighted(model, x):
    """A loss whose second batch has no weight, so that its step is skipped."""
    weight = x.new_tensor(float(x[0, 0] != 0))
    return ax.Mean(odd.loss(model, x) * weight, weight)


def trained(env, kind, name):
    """A state after two updates and a skipped one, with a full slot."""
    tx = chain(env, kind)
    state, step = made(1, name, tx), ax.step(tx, weighted)
    share = 12 // env.world
    for k in range(3):
        x = odd.batch(k) * (k != 1)
        state, _ = step(state, x[env.rank * share : (env.rank + 1) * share])
    return ax.with_slot(state, "mine", {**odd.slot(7), "later": torch.ones(2)})


def saved(env, folder):
    """Save each case of a world; what each state held, in full."""
    found = {}
    for kind, name in cases(env.world):
        state = trained(env, kind, name)
        url = ax.save_state(env, f"{folder}/{env.world}-{kind}-{name}")(state)
        found[env.world, kind, name] = url, odd.described(state)
    return found if env.main else None


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """(world, kind, optimizer) -> URL, and the description of what was saved."""
    folder = tmp_path_factory.mktemp("saves")
    found = {}
    for world in WORLDS:
        found |= testing.run(world, timeout=120)(saved)(folder)[0]
    return found


def restored(env, saves):
    """What differs from what was saved, for each save and each kind of this world."""
    faults = {}
    for (kind, name), (origin, (url, wanted)) in product(
        cases(env.world), saves.items()
    ):
        if name != origin[2]:
            continue
        state = made(2, name, chain(env, kind, ax.load_state(env, url)))
        wanted = sliced(wanted, state, env)
        odd_ones = odd.differing(wanted, odd.described(state, odd.local))
        faults[origin, kind, name] = odd_ones + misplaced(state)
    return faults


def sliced(wanted, state, env):
    """A description cut as this rank holds its tensors, by `chunk` of torch."""
    if not any(hasattr(p, "full_tensor") for p in state.model.parameters()):
        return wanted
    weights = dict(state.model.named_parameters(remove_duplicate=False))
    shapes = {n: p.shape for n, p in weights.items()}

    def part(tensor, shape):
        if tensor.shape != shape:
            return tensor
        return (*tensor.chunk(env.world), *[tensor[:0]] * env.world)[env.rank]

    found = {}
    for name, value in wanted.items():
        shape = shapes.get(re.sub(r"^(model|optim\.\d)\.", "", name))
        if shape is None:
            found[name] = value
        else:
            found[name] = odd.viewed(value, lambda t, shape=shape: part(t, shape))
    return found


def misplaced(state):
    """Moments that do not lie as their weights do."""
    return [
        f"{type(held).__name__} {word}"
        for o in state.optimizers
        for p, words in o.state.items()
        for word, held in words.items()
        if isinstance(held, torch.Tensor) and p.dim() and held.shape == p.shape
        if hasattr(held, "full_tensor") != hasattr(p, "full_tensor")
    ]


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_restored_is_what_was_saved(saves, world):
    """Every tensor, option, slot and count, to the bit, from any ranks and engine."""
    for faults in testing.run(world, timeout=170)(restored)(saves):
        assert len(faults) == sum(
            name == other[2] for _, name in cases(world) for other in saves
        )
        assert not {case: odd_ones for case, odd_ones in faults.items() if odd_ones}


def held(saves):
    """The descriptions alone, with the manifests beside them."""
    for (world, kind, name), (url, wanted) in saves.items():
        yield world, kind, name, wanted, open_manifest(resolve(url))[1]


def test_a_checkpoint_holds_no_more_than_that(saves):
    """Buffers that are not persistent, and tied weights twice, are not in the file."""
    for _, _, name, wanted, manifest in held(saves):
        model = {n for n in wanted if n.startswith("model.")}
        stored = {n for n in manifest.tensors if n.startswith("model.")}
        assert stored == model - {"model.again.weight"}
        assert manifest.aliases == {"model.again.weight": "model.up.weight"}
        assert ("model.scale" in stored) == (name == COPIED)


def test_the_states_differ_from_one_another_and_moved(saves):
    """What was saved is no blank: there are moments, a skipped step, a changed rate."""
    for _, _, _, wanted, _ in held(saves):
        assert (wanted["step"], wanted["skipped"]) == (2, 1)
        rate = float(wanted["optim.0.group.0"]["lr"])
        assert rate == pytest.approx(
            wanted["slots.with_schedule"][1]["base"][0][0] * 0.75
        )
        assert all(wanted[n] for n in wanted if n.startswith("optim.0."))


def flip(tensor):
    """A copy with one bit changed."""
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    if copy.numel():
        odd.bits(copy)[0] ^= 1
    return copy


def test_control_one_changed_bit_in_any_tensor_is_seen(saves):
    """A flipped bit in a tensor is told by its name, and nothing else is."""
    _, wanted = saves[4, "fsdp2", "adamw"]
    assert odd.differing(wanted, odd.viewed(wanted, torch.clone)) == []
    for name, value in wanted.items():
        sizes = []
        odd.viewed(value, lambda t, sizes=sizes: sizes.append(t.numel()) or t)
        flipped = {**wanted, name: odd.viewed(value, flip)}
        assert odd.differing(wanted, flipped) == [name] * any(sizes)


@pytest.mark.parametrize(
    "other",
    [
        {"step": 3},
        {"step": 2.0},
        {"model.one": torch.ones(1)},
        {"slots.mine": odd.slot(8)},
        {"new": None},
    ],
)
def test_control_another_number_type_or_name_is_seen(saves, other):
    """Whatever is not the same is told by its name."""
    _, wanted = saves[1, "plain", "adamw"]
    assert odd.differing(wanted, {**wanted, **other}) == list(other)


def test_control_the_order_of_a_dict_is_seen(saves):
    """Options in another order are others: who walks them would walk otherwise."""
    _, wanted = saves[1, "plain", "adamw"]
    turned = dict(reversed(wanted["optim.0.group.0"].items()))
    assert odd.differing(wanted, {**wanted, "optim.0.group.0": turned})


def test_control_a_state_that_was_not_restored_differs(saves):
    """Without load_state weights, moments, slots and counts are others."""
    for name in OPTIMS:
        _, wanted = saves[1, "plain", name]
        fresh = odd.described(made(2, name, chain(ax.Env(), "plain")))
        same = {n for n in wanted if n not in odd.differing(wanted, fresh)}
        # what every model has, and options that no schedule moved yet
        assert all(n.startswith(("model.", "slots.with")) for n in same)
        assert not any(".weight" in n or ".bias" in n for n in same)
