"""The backward pass without torch's questions: its numbers, and who still gets them."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import accelx as ax
from accelx._torch_backward import backward_of
from tests.unit.source import PACKAGE

ENV = ax.Env()
MOST = 20  # functions of accelx in a step of one rank; 16 when this was written


def gradients(run, seeds, dtype):
    """Gradients of a weight and a scalar leaf, from that many roots."""
    torch.manual_seed(0)
    weight = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    leaf = torch.zeros((), dtype=dtype, requires_grad=True)
    loss = (weight @ torch.randn(3, dtype=dtype)).square().mean()
    roots = (loss, leaf)[: len(seeds)]
    run(roots, tuple(torch.full_like(r, s) for r, s in zip(roots, seeds, strict=True)))
    return [weight.grad, leaf.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seeds", [(1.0,), (1 / 3,), (0.25, 7.0)])
def test_it_is_torchs_own_to_the_bit(seeds, dtype):
    """For one root and two; another seed gives other gradients."""
    ours = gradients(backward_of, seeds, dtype)
    theirs = gradients(torch.autograd.backward, seeds, dtype)
    other = gradients(torch.autograd.backward, (0.7, *seeds[1:]), dtype)
    assert torch.equal(ours[0], theirs[0])
    assert (ours[1] is None) == (theirs[1] is None) == (len(seeds) == 1)
    assert ours[1] is None or torch.equal(ours[1], theirs[1])
    assert not torch.equal(ours[0], other[0])


class Odd(torch.Tensor):
    """A tensor of a user's own."""


class Any(TorchFunctionMode):
    """Sees torch's functions, and changes none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ["plain", "subclass", "mode", "transform"])
def test_what_torch_may_see_otherwise_gets_its_questions(case, monkeypatch):
    """A subclass, a mode and a transform of functions; a plain tensor does not."""
    asked = []
    theirs = torch.autograd.backward

    def known(*args, **kwargs):
        asked.append(args)
        return theirs(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", known)

    def run(x):
        loss = x.square().sum()
        backward_of((loss,), (torch.ones_like(loss),))
        return loss

    weight = torch.ones(3, requires_grad=True)
    if case == "transform":
        with pytest.raises(RuntimeError, match="functorch transform"):
            torch.func.grad(run)(weight)
    elif case == "mode":
        with Any():
            run(weight)
    else:
        run(weight.as_subclass(Odd) if case == "subclass" else weight)
    assert bool(asked) == (case != "plain")
    assert case == "transform" or torch.equal(weight.grad, torch.full((3,), 2.0))


def calls(run):
    """How often each function of Python is called in `run()`, by file and name."""
    found = Counter()

    def seen(frame, event, _):
        if event == "call":
            code = frame.f_code
            found[Path(code.co_filename), code.co_name] += 1

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def ours(found):
    """Those of accelx."""
    return sum(n for (path, _), n in found.items() if path.is_relative_to(PACKAGE))


def mean_square(model, rows):
    """A loss."""
    return model(rows).square().mean()


def second_step(*passes):
    """What the second step of a chain calls."""
    tx = ax.chain(ax.shard_model(ENV), *passes)
    make = lambda m: torch.optim.SGD(m.parameters(), 0.1)  # noqa: E731
    state = ax.init(tx, lambda: torch.nn.Linear(3, 2), make)
    step, rows = ax.step(tx, mean_square), torch.ones(4, 3)
    state, _ = step(state, rows)
    return calls(lambda: step(state, rows))


def test_a_step_of_one_rank_calls_few_functions():
    """Of accelx, and none of torch's that make seeds; the long way calls more."""
    short = second_step()
    long = second_step(ax.transform("look", backward=lambda grads: grads))
    assert 0 < ours(short) <= MOST < ours(long)
    assert not any(name == "_make_grads" for _, name in short)
    loss = torch.ones((), requires_grad=True) * 2
    assert any(name == "_make_grads" for _, name in calls(loss.backward))
