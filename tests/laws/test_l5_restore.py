"""L5: restoring what was saved gives the same state, on any ranks and any engine.

And L6 over the same matrix: from there on the losses are those of a run that was not
stopped.
"""

import re
from itertools import product

import attrs
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax
from accelx import testing
from accelx.saves.commit import open_manifest, resolve
from tests.laws import odd
from tests.laws.training import curve, quiet_views

pytestmark = [pytest.mark.multi, quiet_views]
WORLDS = (1, 2, 3, 4)
OPTIMS = {f.__name__: f for f in (odd.adamw, odd.sgd, odd.several, odd.adafactor)}
COPIED = "adafactor"  # the one with weights that fsdp2 cannot train
ROWS, BATCH, NEXT = 17, 5, 5  # four batches an epoch, the last of two rows
STOPS = range(2, 10)  # each batch of two epochs once, behind the one that is skipped
SKIPPED = 1
ROUNDING = 1e-12


def cases(world):
    """(kind, optimizer) that a world is tried with; on one rank there is one kind."""
    kinds = ("plain",) if world == 1 else ("ddp", "fsdp2")
    every = product(kinds, OPTIMS)
    return [one for one in every if one != ("fsdp2", COPIED)]


def chain(env, kind, *more):
    """A loader's order, a placed model, a schedule, and a slot of a user's own."""
    place = ax.identity if kind == "plain" else ax.shard_model(env, kind)
    opened = ax.transform("mine", start=lambda s, tx: ax.with_slot(s, "mine", blank()))
    left = ax.transform("left_out", before=skip)
    rest = left, ax.with_schedule(curve), opened
    return ax.chain(ax.shard_loader(env, seed=3), place, *rest, *more)


def blank():
    """The slot as its pass opens it: of what it cannot make out of nothing."""
    kinds = {k: odd.slot(0)[k] for k in ("record", "object", "counter")}
    return {**kinds, "later": None}


def skip(state, out):
    """Leave out one update."""
    why = "left out" if state.position == SKIPPED else out.skipped
    return state, attrs.evolve(out, skipped=why)


def made(seed, name, tx):
    """A state over new weights."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    return ax.init(tx, odd.Odd(name == COPIED), OPTIMS[name])


def go_on(tx, state, stop, start=None):
    """Train up to batch `stop`, of shuffled rows: the state and each loss."""
    draw = torch.Generator().manual_seed(5)
    rows = torch.randn(ROWS, odd.WIDTH, generator=draw, dtype=torch.float64)
    loader = DataLoader(TensorDataset(rows), BATCH, shuffle=True)
    step, losses = ax.step(tx, lambda model, batch: odd.loss(model, batch[0])), []
    for batch in ax.feed(tx, loader, start=start or state, stop=stop):
        state, out = step(state, batch)
        losses.append(float(out.loss))
    return state, losses


def uninterrupted(name):
    """The judge: losses of one process that neither saves nor loads."""
    tx = chain(ax.Env(), "plain")
    return go_on(tx, made(1, name, tx), STOPS[-1] + NEXT)[1]


@attrs.frozen
class Save:
    """What was saved where, and how its run went on."""

    url: str
    stop: int  # batches before it
    wanted: dict  # what the state held, in full
    losses: list  # the next ones of the run that was saved


def trained(env, kind, name, stop=3):
    """A state after `stop` batches, of which one is skipped, with a full slot."""
    tx = chain(env, kind)
    state, _ = go_on(tx, made(1, name, tx), stop)
    return ax.with_slot(state, "mine", {**odd.slot(7), "later": torch.ones(2)})


def saved(env, folder):
    """Save each case of a world, each at another batch, and go on."""
    found = {}
    for number, (kind, name) in enumerate(cases(env.world)):
        stop = STOPS[(number + 3 * env.world) % len(STOPS)]
        state = trained(env, kind, name, stop)
        wanted = odd.described(state)
        url = ax.save_state(env, f"{folder}/{env.world}-{kind}-{name}")(state)
        _, losses = go_on(chain(env, kind), state, stop + NEXT)
        found[env.world, kind, name] = Save(url, stop, wanted, losses)
    return found if env.main else None


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """(world, kind, optimizer) -> what was saved there."""
    folder = tmp_path_factory.mktemp("saves")
    found = {}
    for world in WORLDS:
        found |= testing.run(world, timeout=120)(saved)(folder)[0]
    return found


@pytest.fixture(scope="module")
def judge():
    """Optimizer -> the losses of an undisturbed run."""
    every = lambda env: {name: uninterrupted(name) for name in OPTIMS}  # noqa: E731
    return testing.run(1)(every)()[0]


def restored(env, saves):
    """For each save and each kind of this world, what differs, and the next losses."""
    faults, losses = {}, {}
    for (kind, name), (origin, save) in product(cases(env.world), saves.items()):
        if name != origin[2]:
            continue
        tx = chain(env, kind, ax.load_state(env, save.url))
        state = made(2, name, tx)
        wanted = sliced(save.wanted, state, env)
        odd_ones = odd.differing(wanted, odd.described(state, odd.local))
        case = origin, kind, name
        faults[case] = odd_ones + misplaced(state)
        losses[case] = go_on(tx, state, save.stop + NEXT)[1]
    return faults, losses


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


@pytest.fixture(scope="module", params=WORLDS)
def arrivals(saves, request):
    """A world, and what each of its ranks found in each save."""
    return request.param, testing.run(request.param, timeout=170)(restored)(saves)


def test_what_is_restored_is_what_was_saved(saves, arrivals):
    """Every tensor, option, slot and count, to the bit, from any ranks and engine."""
    world, ranks = arrivals
    for faults, _ in ranks:
        assert len(faults) == sum(
            name == other[2] for _, name in cases(world) for other in saves
        )
        assert not {case: odd_ones for case, odd_ones in faults.items() if odd_ones}


def test_the_next_losses_are_those_of_a_run_that_was_not_stopped(
    saves, arrivals, judge
):
    """To rounding from any ranks and engine, and to the bit from the same."""
    world, ranks = arrivals
    assert {save.stop for save in saves.values()} == {*STOPS}
    for (origin, kind, name), losses in ranks[0][1].items():
        stop = saves[origin].stop
        wanted = judge[name][stop : stop + NEXT]
        assert losses == pytest.approx(wanted, rel=ROUNDING), (origin, kind)
        if origin == (world, kind, name):
            assert losses == saves[origin].losses
    assert all(others == ranks[0][1] for _, others in ranks)


def forget(state):
    """Zero what the optimizer keeps of one weight."""
    held = state.optimizers[0].state
    moments = held[next(p for p in held if p.numel() > 1)].values()
    for moment in (m for m in moments if isinstance(m, torch.Tensor) and m.dim()):
        moment.zero_()
    return state.position


def late(state):
    """The position one too far."""
    return state.position + 1


@pytest.mark.parametrize("change", [forget, late])
@pytest.mark.parametrize("name", OPTIMS)
def test_control_one_moment_or_a_batch_off_gives_other_losses(
    saves, judge, name, change
):
    """What is not restored shows in the next losses."""
    save = saves[3, "ddp", name]
    tx = chain(ax.Env(), "plain", ax.load_state(ax.Env(), save.url))
    state = made(2, name, tx)
    losses = go_on(tx, state, save.stop + NEXT, change(state))[1]
    wanted = judge[name][save.stop : save.stop + NEXT][: len(losses)]
    assert losses != pytest.approx(wanted, rel=1e3 * ROUNDING)


def test_a_checkpoint_holds_no_more_than_that(saves):
    """Buffers that are not persistent, and tied weights twice, are not in the file."""
    for (_, _, name), save in saves.items():
        manifest = open_manifest(resolve(save.url))[1]
        model = {n for n in save.wanted if n.startswith("model.")}
        stored = {n for n in manifest.tensors if n.startswith("model.")}
        assert stored == model - {"model.again.weight"}
        assert manifest.aliases == {"model.again.weight": "model.up.weight"}
        assert ("model.scale" in stored) == (name == COPIED)


def test_the_states_differ_from_one_another_and_moved(saves):
    """What was saved is no blank: there are moments, a skipped step, a changed rate."""
    for save in saves.values():
        wanted = save.wanted
        assert (wanted["step"], wanted["skipped"]) == (save.stop - 1, 1)
        rate = float(wanted["optim.0.group.0"]["lr"])
        base = wanted["slots.with_schedule"][1]["base"][0][0]
        assert rate == pytest.approx(base * curve(save.stop - 2))
        assert all(wanted[n] for n in wanted if n.startswith("optim.0."))


def flip(tensor):
    """A copy with one bit changed."""
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    if copy.numel():
        odd.bits(copy)[0] ^= 1
    return copy


def test_control_one_changed_bit_in_any_tensor_is_seen(saves):
    """A flipped bit in a tensor is told by its name, and nothing else is."""
    wanted = saves[4, "fsdp2", "adamw"].wanted
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
    wanted = saves[1, "plain", "adamw"].wanted
    assert odd.differing(wanted, {**wanted, **other}) == list(other)


def test_control_the_order_of_a_dict_is_seen(saves):
    """Options in another order are others: who walks them would walk otherwise."""
    wanted = saves[1, "plain", "adamw"].wanted
    turned = dict(reversed(wanted["optim.0.group.0"].items()))
    assert odd.differing(wanted, {**wanted, "optim.0.group.0": turned})


def test_control_a_state_that_was_not_restored_differs(saves):
    """Without load_state weights, moments, slots and counts are others."""
    for name in OPTIMS:
        wanted = saves[1, "plain", name].wanted
        fresh = odd.described(made(2, name, chain(ax.Env(), "plain")))
        same = {n for n in wanted if n not in odd.differing(wanted, fresh)}
        # what every model has, and options that no schedule moved yet
        assert all(n.startswith(("model.", "slots.with")) for n in same)
        assert not any(".weight" in n or ".bias" in n for n in same)
