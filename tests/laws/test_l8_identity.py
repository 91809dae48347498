"""L8: placing keeps the object, its class and its names."""

import inspect

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import accelx as ax
from accelx import testing
from tests.laws import training as t

pytestmark = [pytest.mark.multi, t.quiet_views]

LEAVES = [
    lambda: nn.Linear(3, 3),
    lambda: nn.Linear(3, 3, bias=False),
    lambda: nn.LayerNorm(3),
    lambda: nn.GroupNorm(1, 3),
    lambda: nn.Embedding(2, 3),
    lambda: nn.Identity(),
    lambda: nn.Dropout(0.1),
]


class Own(nn.Module):
    """A user's class, with a weight of its own, a method and a plain attribute."""

    def __init__(self, inner):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("dropped", torch.ones(2), persistent=False)
        self.inner = inner
        self.note = {"made": "by hand"}

    def extra(self):
        return self.note["made"]


def nest(children):
    """A module that holds modules."""
    return st.one_of(
        st.lists(children, min_size=1, max_size=3).map(
            lambda made: lambda: nn.Sequential(*[make() for make in made])
        ),
        st.dictionaries(st.sampled_from("abc"), children, max_size=2).map(
            lambda made: lambda: nn.ModuleDict({k: make() for k, make in made.items()})
        ),
        children.map(lambda make: lambda: Own(make())),
        children.map(lambda make: lambda: tied(make(), make())),
    )


def tied(one, other):
    """Two modules with the same weights, where they have any."""
    for name, p in one.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(owner), leaf, p)
    return Own(nn.ModuleList([one, other]))


models = st.recursive(st.sampled_from(LEAVES), nest, max_leaves=5)


def identity(model):
    """All that a user may know a model by."""
    return {
        "parameters": [n for n, _ in model.named_parameters(remove_duplicate=False)],
        "ties": [n for n, _ in model.named_parameters()],
        "buffers": [n for n, _ in model.named_buffers(remove_duplicate=False)],
        "saved": list(model.state_dict()),
        "modules": [n for n, _ in model.named_modules(remove_duplicate=False)],
        "objects": [id(m) for m in model.modules()],
        "trained": [p.requires_grad for p in model.parameters()],
        "shapes": [tuple(p.shape) for p in model.parameters()],
        "signature": str(inspect.signature(model.forward)),
        "modes": [m.training for m in model.modules()],
    }


def classes(model):
    """The class of each module."""
    return [type(m) for m in model.modules()]


def check(env, kind, make, seed):
    """Place one model and compare all of that."""
    torch.manual_seed(seed)
    model = Own(make())
    model.inner.eval()
    model.weight.requires_grad_(seed % 2 == 0)
    before, kinds = identity(model), classes(model)
    tx = ax.identity if kind == "plain" else ax.shard_model(env, kind)
    state = ax.init(tx, model)
    assert state.model is model
    assert identity(model) == before
    assert model.extra() == "by hand"
    for was, now in zip(kinds, classes(model), strict=True):
        assert issubclass(now, was)
        if kind != "fsdp2":  # torch's fully_shard adds its methods by a subclass
            assert now is was


@pytest.mark.parametrize("kind", t.KINDS)
def test_any_model_keeps_object_class_and_names(kind):
    """Nested, tied, frozen, with buffers, in two modes: nothing that is seen moves."""

    def rank(env):
        @settings(max_examples=20)
        @given(models, st.integers(0, 3))
        def holds(make, seed):
            check(env, kind, make, seed)

        holds()  # examples are fixed, so the ranks have the same

    testing.run(t.ranks(kind))(rank)()


@pytest.mark.parametrize("kind", t.KINDS)
@pytest.mark.parametrize("alone", [False, True])
def test_a_model_made_by_a_function_is_the_one_it_makes(kind, alone):
    """Names, ties and class are those of calling the function; so by itself, too."""

    def rank(env):
        tx = t.placing(env, kind)
        wanted = t.made()()
        if alone and kind != "plain":
            model = tx(t.made())
        else:
            model = ax.init(tx, t.made(), t.grouped).model
        assert isinstance(model, t.Net)
        before, after = identity(wanted), identity(model)
        del before["objects"], after["objects"]
        assert before == after
        assert model.head.weight is model.embed.weight

    testing.run(t.ranks(kind))(rank)()


@pytest.mark.parametrize("kind", t.KINDS)
def test_optimizers_stay_the_users_own(kind):
    """The object that the function made comes back, before and after steps."""

    class Mine(torch.optim.SGD):
        def hello(self):
            return "mine"

    def rank(env):
        made = []

        def optim(model):
            made.append(Mine(model.parameters(), 0.1))
            return made[0]

        tx = t.placing(env, kind)
        state = ax.init(tx, t.made(), optim)
        assert state.optim is made[0]
        state, _ = ax.step(tx, t.bare)(state, t.part(env, t.batches()[0]))
        assert state.optim is made[0]
        assert type(state.optim) is Mine

    testing.run(t.ranks(kind))(rank)()


def test_control_another_name_is_seen():
    """The comparison sees a wrapper's prefix and another object."""
    model = Own(nn.Linear(3, 3))
    assert identity(nn.Sequential(model)) != identity(model)
    assert identity(Own(nn.Linear(3, 3)))["objects"] != identity(model)["objects"]
