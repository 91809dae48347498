"""What a Precision casts, leaves and finds wanting."""

import pytest
import torch
from torch import nn

from accelx.dtypes import cast, precision, read_back
from accelx.errors import PrecisionError
from accelx.records import Precision


def net():
    """Trained, frozen and integer weights; floating, integer and unsaved buffers."""
    model = nn.Linear(2, 2)
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    model.index = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    model.register_buffer("mean", torch.zeros(2))
    model.register_buffer("table", torch.zeros(2), persistent=False)
    model.register_buffer("count", torch.zeros(2, dtype=torch.int64))
    return model


def test_cast_changes_what_was_asked_and_nothing_else():
    """Trained weights and floating buffers; objects and persistence stay."""
    model = net()
    weight = model.weight
    cast(model, Precision(param="bf16", buffer="fp64"))
    assert model.weight is weight
    assert model.weight.dtype == model.bias.dtype == torch.bfloat16
    assert model.frozen.dtype == torch.float32
    assert model.index.dtype == model.count.dtype == torch.int64
    assert model.mean.dtype == model.table.dtype == torch.float64
    assert set(model.state_dict()) == {
        "weight",
        "bias",
        "frozen",
        "index",
        "mean",
        "count",
    }


@pytest.mark.parametrize("wanted", [None, Precision(), Precision("fp32", "bf16")])
def test_cast_of_what_is_so_already_changes_nothing(wanted):
    """No weight is copied."""
    model = net()
    before = [p.data_ptr() for p in (*model.parameters(), *model.buffers())]
    cast(model, wanted)
    assert [p.data_ptr() for p in (*model.parameters(), *model.buffers())] == before


def test_a_cast_model_reads_back():
    """What cast gives, read_back accepts; control: before, it does not."""
    wanted, model = Precision(param="bf16", buffer="bf16"), net()
    with pytest.raises(
        PrecisionError, match=r"weight is torch\.float32.*buffer mean is"
    ):
        read_back(model, wanted)
    cast(model, wanted)
    read_back(model, wanted)


@pytest.mark.parametrize("name", ["bfloat16", torch.bfloat16, "bf16"])
def test_names_of_dtypes_are_understood(name):
    """Ours, torch's, and torch's own objects."""
    assert precision(Precision(param=name)) == Precision(param="bf16")
