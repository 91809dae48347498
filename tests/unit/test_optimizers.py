"""Optimizers are the user's own, and every trained weight is in exactly one."""

import torch
from torch import nn

import accelx as ax
from accelx.optimizers import make
from tests.laws import training as t


def test_none_one_and_many():
    """No function makes none; one optimizer or a list stay as made."""
    model = nn.Linear(2, 2)
    one = torch.optim.SGD(model.parameters(), 0.1)
    weight, bias = ([p] for p in model.parameters())
    many = [torch.optim.SGD(weight, 0.1), torch.optim.Adam(bias, 0.1)]
    assert make(None, model) == ()
    assert make(lambda m: one, model) == (one,)
    assert make(lambda m: many, model) == tuple(many)


def test_tied_and_frozen_weights_are_counted_once_and_not_at_all():
    """A shared weight in one group is not twice; a frozen one may be left out."""
    model = t.made()()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    for optim in (lambda m: torch.optim.SGD(m.parameters(), 0.1), t.grouped, t.pair):
        groups = [g for one in make(optim, model) for g in one.param_groups]
        held = [id(p) for g in groups for p in g["params"] if p.requires_grad]
        assert sorted(held) == sorted(trained)


def test_param_groups_take_each_weight_by_its_first_glob():
    """Groups hold names and settings, frozen weights are left out."""
    model = t.made()()
    groups = ax.param_groups(
        model, {"**.bias": {"weight_decay": 0.0}, "layers.**": {"lr": 0.5}, "**": {}}
    )
    assert [g["name"] for g in groups] == ["**.bias", "layers.**", "**"]
    names = [[n for n, _ in g["params"]] for g in groups]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(n for group in names for n in group) == sorted(trained)
    assert all(n.endswith("bias") for n in names[0])
    assert all(n.startswith("layers") for n in names[1])
    assert names[2] == ["embed.weight"]


def test_param_groups_train_as_groups_made_by_hand():
    """In a pipeline, against torch's own groups in a plain loop."""

    def by_name(model):
        settings = {"**.bias": {"weight_decay": 0.0}, "**": {"lr": t.RATE / 2}}
        groups = ax.param_groups(model, settings)
        return torch.optim.AdamW(groups, lr=t.RATE, weight_decay=0.1)

    data = t.batches()
    run = t.train(
        t.pipeline(ax.Env(), "plain"), ax.Env(), t.made(), t.bare, by_name, data
    )
    assert t.apart(t.by_hand(t.made(), t.bare, t.grouped, data), run) < 1e-12
