"""Optimizers are the user's own, and every trained weight is in exactly one."""

import pytest
import torch
from torch import nn

import accelx as ax
from accelx.optimizers import make
from accelx.saves.spread import Absent
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


def test_a_stage_without_trained_weights_is_told_to_give_frozen_ones():
    """Of a model that is whole, torch's own error stays."""
    model = nn.Linear(2, 2).requires_grad_(False)

    def trained(m):
        return torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1)

    with pytest.raises(ValueError, match="empty parameter list") as caught:
        make(trained, model)
    assert not isinstance(caught.value, ax.AccelxError)
    model.gone = Absent("gone", torch.Size([2]), torch.float32, torch.device("cpu"))
    with pytest.raises(ax.PlacementError, match="give it frozen weights too"):
        make(trained, model)


@pytest.mark.parametrize(
    ("there", "words"),
    [((), r"has no c\+\+ and no ninja"), (("ninja",), r"has no c\+\+;")],
)
def test_an_optimizer_that_lacks_a_compiler_says_which(
    there, words, tmp_path, monkeypatch
):
    """DeepSpeed's own, on a PATH without: what it wants, what is missing, what else."""
    adam = pytest.importorskip("deepspeed.ops.adam").DeepSpeedCPUAdam
    for name in there:
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ax.MissingExtraError, match=words) as caught:
        ax.init(ax.identity, nn.Linear(2, 2), lambda m: adam(m.parameters(), 1e-3))
    assert "wants c++ and ninja on PATH" in str(caught.value)
    assert "install g++ and ninja, or make torch.optim.AdamW" in str(caught.value)
    assert "cpu_adam" in str(caught.value.__cause__)


def test_an_error_of_ones_own_is_left_as_it_is(monkeypatch, tmp_path):
    """The control: without compilers, too."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def failing(model):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match=r"^out of luck$"):
        make(failing, nn.Linear(2, 2))


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
