"""clip and clip_value do what torch's own functions do."""

import pytest
import torch
from torch import nn

import accelx as ax
from accelx import testing
from tests.laws import training as t

pytestmark = [pytest.mark.multi, t.quiet_views]
DATA = t.batches()[:1]


def update(env, kind, *passes):
    """What one step of SGD with rate 1 takes away: the gradients after the passes."""
    tx = ax.chain(t.placing(env, kind), *passes)
    sgd = lambda m: torch.optim.SGD(m.parameters(), 1.0)  # noqa: E731
    state = ax.init(tx, t.made(), sgd)
    before = {n: t.whole(p).clone() for n, p in state.model.named_parameters()}
    state, out = ax.step(tx, t.bare)(state, t.part(env, DATA[0]))
    after = {n: t.whole(p) for n, p in state.model.named_parameters()}
    norm = None if out.norm is None else out.norm.item()
    return norm, {n: before[n] - after[n] for n in before}


def by_torch(clip):
    """The same by torch's functions: the norm, and gradients by name."""
    model = t.made()()
    t.bare(model, DATA[0]).backward()
    norm = clip(model.parameters())
    zeros = torch.zeros_like
    return norm, {
        n: zeros(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }


CASES = {
    "clip": ((ax.clip(0.1),), lambda p: nn.utils.clip_grad_norm_(p, 0.1)),
    "loose": ((ax.clip(1e6),), lambda p: nn.utils.clip_grad_norm_(p, 1e6)),
    "measured": (
        (ax.clip(float("inf")),),
        lambda p: nn.utils.get_total_norm([x.grad for x in p if x.grad is not None]),
    ),
    "value": ((ax.clip_value(0.01),), lambda p: nn.utils.clip_grad_value_(p, 0.01)),
    "both": (
        (ax.clip(0.1), ax.clip_value(0.01)),
        lambda p: clipped(list(p)),
    ),
}


def clipped(parameters):
    """Both, one after the other."""
    norm = nn.utils.clip_grad_norm_(parameters, 0.1)
    nn.utils.clip_grad_value_(parameters, 0.01)
    return norm


@pytest.mark.parametrize("kind", t.KINDS)
def test_gradients_are_clipped_as_torch_does(kind):
    """On every engine, by the norm over all slices; Out.norm is from before."""

    def rank(env):
        return {name: update(env, kind, *passes) for name, (passes, _) in CASES.items()}

    for found in testing.run(t.ranks(kind))(rank)():
        for name, (_, judge) in CASES.items():
            norm, grads = by_torch(judge)
            gaps = [(grads[n] - found[name][1][n]).abs().max().item() for n in grads]
            assert max(gaps) < 1e-12, name
            assert (norm is None) == (found[name][0] is None)
            assert norm is None or found[name][0] == pytest.approx(
                norm.item(), abs=1e-12
            )


def test_control_the_cases_differ():
    """The limits above bite."""
    assert by_torch(CASES["clip"][1])[0] > 0.2
    grads = [
        by_torch(CASES[n][1])[1]["embed.weight"] for n in ("clip", "loose", "value")
    ]
    assert not torch.allclose(grads[0], grads[1])
    assert not torch.allclose(grads[1], grads[2])
