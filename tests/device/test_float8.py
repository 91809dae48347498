"""fp8 where the GPU has it: it trains, near bf16; where not, it is refused."""

import pytest
import torch
from torch import nn

import accelx as ax
from accelx.engines import float8

X = torch.randn(32, 256, generator=torch.Generator().manual_seed(2))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.GELU()),
        nn.Linear(256, 16),
    )


def train(env, precision):
    """Ten steps towards zero: all losses, and the state."""
    tx = ax.chain(ax.with_precision(precision), ax.shard_model(env))
    state = ax.init(tx, network, lambda m: torch.optim.AdamW(m.parameters(), 1e-3))
    step = ax.step(tx, lambda model, x: model(x).float().square().mean())
    losses = []
    for _ in range(10):
        state, out = step(state, X.to(env.device))
        losses.append(float(out.loss))
    return losses, state


def test_fp8_trains_near_bf16_or_is_refused(env):
    """The products are in 8 bits: near those of 16, and not the same."""
    pytest.importorskip("torchao")
    found = torch.cuda.get_device_properties(env.device)
    amd = getattr(found, "gcnArchName", "") if torch.version.hip else ""
    if float8.lacking("cuda", (found.major, found.minor), amd):
        with pytest.raises(ax.PrecisionError, match="fp8 wants a GPU"):
            train(env, "fp8")
        return
    losses, state = train(env, "fp8")
    half, _ = train(env, "bf16")
    assert state.slots["with_precision"].names == ("0", "2")
    assert losses[-1] < losses[0] / 2
    gaps = [abs(a - b) / b for a, b in zip(losses, half, strict=True)]
    assert 0 < max(gaps) < 0.2


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_packed_weights_on_the_gpu_are_those_of_the_cpu(env, kind):
    """Packed in host memory, unpacked on the device: the same floats, the same loss."""

    def frozen():
        made = network()
        made[0].requires_grad_(False)
        made[4].requires_grad_(False)
        return made

    def loss_on(place):
        tx = ax.chain(ax.quantize(kind), ax.shard_model(place))
        optim = lambda m: torch.optim.SGD(m[2].parameters(), 0.1)  # noqa: E731
        step = ax.step(tx, lambda m, x: m(x).square().mean())
        _, out = step(ax.init(tx, frozen, optim), X.to(place.device))
        return float(out.loss)

    there, here = loss_on(env), loss_on(ax.Env())
    assert abs(there - here) < 1e-4 * here
    other = ax.quantize("int8" if kind != "int8" else "int4")(frozen())
    assert abs(other(X).square().mean().item() - here) > 1e-4 * here  # the control
