"""What an error of full memory says: who held it on this rank, and what needs less."""

import pytest
import torch
from torch import nn

import accelx as ax
from accelx.fit_full import full
from accelx.fit_held import Held

GB = 10**9
GPU = ax.Env(rank=3, world=8, device="cuda:3")


def held(params=13, optimizer=26, device="cuda:3"):
    """What parts of a state hold, in GB."""
    parts = (("parameters", params), ("optimizer state", optimizer))
    return tuple(Held(what, device, 1, count * GB) for what, count in parts)


def said(env=GPU, kind="ddp", parts=None, used=66, capacity=80):
    """The text, where 27 GB of 66 are no part of the state."""
    parts = held() if parts is None else parts
    return full(env, kind, parts, (("head", "cuda:3", GB),), used * GB, capacity * GB)


def test_it_names_every_part_and_the_largest_tensor():
    """In bytes that a person reads, with what no part of the state holds."""
    assert said().startswith(
        "rank 3 on cuda:3 wanted more memory than there is; in use were parameters "
        "13.0 GB, optimizer state 26.0 GB, activations and others 27.0 GB, of 80.0 GB; "
        "the largest is head, 1.00 GB. "
    )


@pytest.mark.parametrize(
    ("more", "first", "last"),
    [
        ({}, 'For the state write shard_model(env, "fsdp2");', "accumulate(n)"),
        ({"used": 79}, "For activations write accumulate(n)", '"fsdp2")'),
        ({"kind": "hsdp"}, "For the state more ranks", '"hsdp", offload=True);'),
        ({"kind": None, "env": ax.Env(device="cuda:0")}, "more ranks, with", "fsdp2"),
        ({"parts": held(device="cpu")}, "For activations", "others 66.0 GB"),
    ],
)
def test_what_to_write_depends_on_what_holds_the_most(more, first, last):
    """The remedy for it comes first; a state on the CPU fills no GPU."""
    assert first in said(**more)
    assert last in said(**more)


def running(loss, optim=torch.optim.SGD):
    """What a step raises, by this loss."""
    state = ax.init(
        ax.identity, lambda: nn.Linear(8, 8), lambda m: optim(m.parameters(), 0.1)
    )
    with pytest.raises(RuntimeError) as caught:
        ax.step(ax.identity, loss)(state, torch.ones(2, 8))
    return getattr(caught.value, "__notes__", [])


def test_a_step_that_fills_memory_says_so():
    """In the loss, and in the update; the error keeps its type and its text."""

    def large(model, x):
        return model(x).mean() + torch.empty(10**15).mean()

    class Large(torch.optim.SGD):
        def step(self, closure=None):
            torch.empty(10**15)

    for notes in (running(large), running(lambda m, x: m(x).mean(), Large)):
        assert len(notes) == 1
        assert "in use were parameters 288 B" in notes[0]
        assert "the largest is weight, 256 B" in notes[0]


def test_control_another_error_is_left_as_it_is():
    """What does not come of memory gets no advice on it."""
    assert running(lambda model, x: model(x[:, :3]).mean()) == []
