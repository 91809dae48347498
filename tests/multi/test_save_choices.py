"""What is saved and loaded when less, other or damaged things are there."""

import re
import warnings
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from torch import nn

import accelx as ax
from accelx import testing
from tests import saving
from tests.laws import odd
from tests.laws.training import made, quiet_views

pytestmark = [pytest.mark.multi, quiet_views]
ENV = ax.Env()
BASE = 256  # weights that are left out: BASE * BASE of eight bytes


class Adapted(nn.Module):
    """A large frozen base, tied to another name, and a small part that is trained."""

    def __init__(self, value):
        super().__init__()
        self.base = nn.Linear(BASE, BASE, bias=False).requires_grad_(False)
        self.twin = nn.Linear(BASE, BASE, bias=False).requires_grad_(False)
        self.twin.weight = self.base.weight
        self.base.weight.copy_(torch.linspace(-1, value, BASE * BASE).view(BASE, BASE))
        self.down, self.up = nn.Linear(BASE, 2), nn.Linear(2, BASE)
        self.register_buffer("count", torch.tensor(2))

    def forward(self, x):
        return self.twin(self.base(x)) / BASE + self.up(self.down(x))


def adapted(env, kind, value, *more):
    """A state over a base that ends in `value`, and its step."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    tx = ax.chain(ax.shard_model(env, kind), *more)
    state = ax.init(tx, Adapted(value), lambda m: torch.optim.Adam(odd.trained(m)))
    return state, ax.step(tx, lambda model, x: model(x).square().mean())


def on_top(env, kind, folder):
    """A run with a base that is not saved: size, resumed run, and another base."""
    x = torch.randn(4, BASE, generator=torch.Generator().manual_seed(env.rank)).double()
    save = ax.save_state(env, folder, every=1, keep=1, select="trainable")
    state, step = adapted(env, kind, 1.0, save)
    for _ in range(2):
        state, _ = step(state, x)
    back, again = adapted(env, kind, 1.0, ax.load_state(env, folder))
    state, _ = step(state, x)
    back, _ = again(back, x)
    differing = odd.differing(odd.described(state), odd.described(back))
    with pytest.raises(ax.CheckpointError, match=r"base\.weight") as error:
        adapted(env, kind, 1.0 + 1e-12, ax.load_state(env, ax.latest(folder).url))
    return ax.latest(folder).commit.size, differing, str(error.value)


@pytest.mark.parametrize(("world", "kind"), [(1, "ddp"), (2, "ddp"), (2, "fsdp2")])
def test_a_frozen_base_is_left_out_and_asked_for(world, kind, tmp_path):
    """The file has the trained part's size; the same base resumes, another cannot."""
    small = 3 * 8 * (4 * BASE + BASE + 2) + 12_000 * world  # moments; random streams
    for size, differing, told in testing.run(world)(on_top)(kind, str(tmp_path)):
        assert size < small < 8 * BASE * BASE / 4
        assert differing == []
        assert "load_weights" in told
        assert "down" not in told


def test_a_base_is_the_same_however_it_is_placed(tmp_path):
    """Saved by two ranks that slice it, it is recognised by one that holds it whole."""
    testing.run(2)(on_top)("fsdp2", str(tmp_path))
    state, _ = adapted(ENV, "ddp", 1.0, ax.load_state(ENV, str(tmp_path)))
    assert state.step == 3
    with pytest.raises(ax.CheckpointError, match=r"other ones here.*base\.weight"):
        adapted(ENV, "ddp", 2.0, ax.load_state(ENV, str(tmp_path)))


def test_a_trained_weight_cannot_be_left_out(tmp_path):
    """Neither at the start of a run nor by hand; the weight is named."""
    save = ax.save_state(ENV, str(tmp_path), every=1, select="down.*")
    with pytest.raises(ax.CheckpointError, match=r"'down\.\*' leaves out up\.weight"):
        adapted(ENV, "ddp", 1.0, save)
    state, _ = adapted(ENV, "ddp", 1.0)
    with pytest.raises(ax.CheckpointError, match="up"):
        ax.save_state(ENV, str(tmp_path), select=lambda n, _: "up" not in n)(state)
    assert list(tmp_path.iterdir()) == []


def small(*more, names=("one", "two")):
    """A state over two layers of these names, after one step."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(2, 2))
    tx = ax.chain(*more)
    state = ax.init(tx, model, lambda m: torch.optim.Adam(m.parameters(), 0.1))
    if not more:
        step = ax.step(tx, lambda m, x: m(x).square().mean())
        state, _ = step(state, torch.ones(3, 2))
    return state


@pytest.mark.parametrize(
    "rename",
    [
        {"two.weight": "three.weight", "two.bias": "three.bias"},
        lambda name: name.replace("two", "three"),
    ],
)
def test_weights_and_their_moments_follow_a_new_name(rename, tmp_path):
    """By a mapping or a function, from the name in the file to the name here."""
    old = small()
    ax.save_state(ENV, str(tmp_path))(old)
    load = ax.load_state(ENV, str(tmp_path), rename=rename)
    new = small(load, names=("one", "three"))
    for p, q in zip(old.model.parameters(), new.model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert odd.same(dict(old.optim.state[p]), dict(new.optim.state[q]))
    with pytest.raises(ax.CheckpointError, match=r"(?s)three\.bias is not in it.*two"):
        small(ax.load_state(ENV, str(tmp_path)), names=("one", "three"))


def test_two_names_cannot_become_one(tmp_path):
    """The renaming that would lose a weight is refused with both of them."""
    ax.save_state(ENV, str(tmp_path))(small())
    rename = {"two.weight": "one.weight"}
    with pytest.raises(ax.CheckpointError, match=r"one\.weight.*two\.weight"):
        small(ax.load_state(ENV, str(tmp_path), rename=rename))


def test_only_some_of_it_is_loaded(tmp_path):
    """What `only` does not take stays what it was, be it there in the file or not."""
    old = small()
    ax.save_state(ENV, str(tmp_path))(old)
    fresh = small(ax.transform("nothing", done=lambda s, o: (s, o)))
    load = ax.load_state(ENV, str(tmp_path), only=("model.one.*", "step"))
    new = small(load, names=("one", "other"))
    assert torch.equal(new.model.one.weight, old.model.one.weight)
    assert torch.equal(new.model.other.weight, fresh.model.two.weight)
    assert (new.step, new.skipped, dict(new.optim.state)) == (1, 0, {})


def test_a_run_may_start_without_a_checkpoint_if_it_says_so(tmp_path):
    """An empty folder is an error that says both ways on, or a fresh start."""
    with pytest.raises(ax.CheckpointError, match='missing="fresh"'):
        small(ax.load_state(ENV, str(tmp_path)))
    state = small(ax.load_state(ENV, str(tmp_path), missing="fresh"))
    assert (state.step, state.slots["load_state"].url) == (0, None)


def flip(url, part=0, at=-1):
    """Change a byte of a part's data."""
    file = Path(url.removeprefix("file://")) / f"rank-{part:05d}.safetensors"
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    return file.name, len(data)


def fallen_back(env, url):
    """What a load says of a damaged checkpoint, and what it takes in its place."""
    load = ax.load_state(env, url)
    with pytest.raises(ax.DamagedError) as error:
        ax.init(saving.chain(env, "ddp", load), made(), saving.grouped)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        load = ax.load_state(env, url, fallback=True)
        state = ax.init(saving.chain(env, "ddp", load), made(), saving.grouped)
    kinds = [w.category for w in heard if w.category is ax.CheckpointWarning]
    assert kinds == [ax.CheckpointWarning] * env.main
    loaded = state.slots["load_state"]
    return str(error.value), state.step, loaded.step, loaded.skipped


@pytest.mark.parametrize("world", [1, 2])
def test_a_damaged_checkpoint_is_named_and_passed_over(world, tmp_path):
    """File, tensor and bytes; with `fallback` every rank takes the one before."""

    def saved(env):
        tx = saving.chain(env, "ddp", ax.save_state(env, str(tmp_path), every=1))
        saving.train(tx, 3)

    testing.run(world)(saved)()
    newest = ax.latest(str(tmp_path)).url
    file, end = flip(newest, part=world - 1)
    results = testing.run(world)(fallen_back)(str(tmp_path))
    assert len(set(results)) == 1
    told, step, loaded, skipped = results[0]
    assert (step, loaded) == (2, 2)
    assert re.search(rf"{file}.*of \S+ at \d+ to {end} have another digest", told)
    assert ("rank" in told.split("rank-")[0]) == (world == 2)
    assert len(skipped) == 1
    assert newest.rpartition("/")[2] in skipped[0]


def test_where_all_are_damaged_there_is_nothing_to_fall_back_to(tmp_path):
    """Not even a fresh start: that is for a folder without a checkpoint."""
    flip(ax.save_state(ENV, str(tmp_path))(small()))
    load = ax.load_state(ENV, str(tmp_path), missing="fresh", fallback=True)
    with (
        pytest.raises(ax.DamagedError, match="all are damaged"),
        pytest.warns(ax.CheckpointWarning, match="passed over"),
    ):
        small(load)


@attrs.frozen
class Derived:
    """A record with a field that nothing could set again."""

    size: int
    double: int = attrs.field(init=False, default=2)


LOOP = []
LOOP.append(LOOP)
REFUSED = {
    "a function": (lambda: 0, "slots.mine is a function"),
    "a set": ({"a": {1, 2}}, "slots.mine.a is a set"),
    "an array": ([np.ones(2)], "slots.mine.0 is a ndarray"),
    "a numpy integer": (np.int64(3), "slots.mine is a int64"),
    "a class": (nn.Linear, "slots.mine is a type"),
    "a tuple as key": ({(1, 2): 3}, r"slots.mine has the key (1, 2)"),
    "itself": (LOOP, "nested deeper than 16"),
    "a sparse tensor": (torch.eye(2).to_sparse(), "slots.mine wants to be a dense"),
    "no numbers": (torch.empty(2, device="meta"), "on meta"),
    "a class of tensors": (nn.Buffer(torch.ones(2)).as_subclass(odd.Own), "is a Own"),
    "bits": (torch.ones(2).view(torch.bits8), "slots.mine wants a dtype"),
    "a derived field": (Derived(1), "slots.mine.double is a field"),
    "two tensors of a name": (
        {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}},
        "'slots.mine.a.b'",
    ),
    "a long name": ({"a" * 5000: torch.ones(1)}, "at most 4096 characters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_is_refused_with_its_path(name, tmp_path):
    """Before a file is written; without it the same state is saved."""
    value, told = REFUSED[name]
    state = small()
    with pytest.raises(ax.CheckpointError, match=re.escape(told)):
        ax.save_state(ENV, str(tmp_path))(ax.with_slot(state, "mine", value))
    assert list(tmp_path.iterdir()) == []
    ax.save_state(ENV, str(tmp_path))(state)
