"""Low-rank adapters of peft over a packed Llama, against the same floats by hand."""

import tempfile
from functools import cache

import attrs
import pytest
import torch
from torch import nn

import accelx as ax
from accelx import testing
from accelx.engines.packed import Form, pack, unpack
from tests.laws import training as t
from tests.multi.test_shard_model import DATA, LAYERS, adapters, flat, llama, spoken
from tests.unit.passes import test_quantize as small

pytest.importorskip("peft")
pytestmark = pytest.mark.multi
NEAR = 1e-6  # Llama takes its norms and rotations in float32, whatever its weights are


def adapted():
    """A Llama in float64, frozen, with adapters that are trained."""
    return llama(True)


def rounded(kind):
    """The same with the floats that the packed weights stand for, in plain torch."""
    model = adapted()
    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            weight = module.weight
            form = Form(kind, weight.shape[1], weight.dtype)
            weight.data.copy_(unpack(pack(weight, kind), form))
    return model


def trained(trace):
    """A trace of what is trained: what is frozen lies otherwise in the two runs."""
    kept = [{n: w for n, w in s.weights.items() if "lora" in n} for s in trace]
    return [attrs.evolve(s, weights=w) for s, w in zip(trace, kept, strict=True)]


@cache
def judge(kind):
    """The trace of a plain loop; over unrounded weights for None."""
    make = adapted if kind is None else lambda: rounded(kind)
    return trained(t.by_hand(make, spoken, adapters, DATA, 0.05, lambda k: 1.0))


def gaps(env, kind, place, *more):
    """How far a run is from the judge over packed weights, and over unrounded ones."""
    env = env if place == "hsdp" else flat(env)
    shard = ax.shard_model(env, place, LAYERS)
    tx = ax.chain(ax.quantize(kind), shard, ax.clip(0.05), *more)
    run = trained(t.train(tx, env, adapted, spoken, adapters, DATA))
    at = env.rank, env.world
    return t.apart(judge(kind), run, *at), t.apart(judge(None), run, *at)


def moved(env):
    """The last loss of a run saved on two ranks in slices, gone on with on one."""
    url = ax.broadcast(env, tempfile.mkdtemp())
    tx = ax.chain(
        ax.quantize("nf4"), ax.shard_model(env, "fsdp2", LAYERS), ax.clip(0.05)
    )
    save = ax.save_state(env, url, every=2, select="trainable")
    state = ax.init(ax.chain(tx, save), adapted, adapters)
    step = ax.step(ax.chain(tx, save), spoken)
    for batch in DATA[:2]:
        state, _ = step(state, t.part(env, batch))
    forked, _ = step(ax.fork(state), t.part(env, DATA[2]))
    lost = float(step(state, t.part(env, DATA[2]))[1].loss)
    assert forked.step == 3
    one = ax.Env()
    tx = ax.chain(ax.quantize("nf4"), ax.clip(0.05), ax.load_state(one, url))
    state = ax.init(tx, adapted, adapters)
    found = float(ax.step(tx, spoken)(state, DATA[2])[1].loss)
    want = judge("nf4")[2].loss
    return max(abs(lost - want), abs(found - want))


CASES = {
    "int8-ddp": lambda env: gaps(env, "int8", "ddp"),
    "nf4-ddp": lambda env: gaps(env, "nf4", "ddp", ax.accumulate(2)),
    "int4-fsdp2": lambda env: gaps(env, "int4", "fsdp2"),
    "nf4-fsdp2": lambda env: gaps(env, "nf4", "fsdp2", ax.remat(LAYERS)),
    "nf4-hsdp": lambda env: gaps(env, "nf4", "hsdp"),
}


@cache
def found():
    """Each case, in one launch."""
    for kind in (None, "int8", "int4", "nf4"):
        judge(kind)  # before the fork, for all ranks at once

    def rank(env):
        return {n: case(env) for n, case in CASES.items()} | {"moved": moved(flat(env))}

    axes = (ax.Axis("replicate", 1), ax.Axis("shard", 2))
    return testing.run(2, axes=axes, timeout=120)(rank)()


@pytest.mark.parametrize("case", CASES)
def test_adapters_over_packed_weights_are_trained_as_by_hand(case):
    """Losses, norms and adapters of every step; over unrounded weights they differ."""
    for rank in found():
        exact, other = rank[case]
        assert exact < NEAR < 1e-3 < other


def test_a_run_over_packed_slices_goes_on_on_one_rank():
    """Adapters are saved, the base is told by fingerprint, however it is cut."""
    assert max(rank["moved"] for rank in found()) < NEAR


def half(env, place):
    """Two steps in bf16: the loss of the second, and what was trained, in full."""
    tx = ax.chain(
        ax.quantize("nf4"), ax.with_precision("bf16"), ax.shard_model(env, place)
    )
    state = ax.init(tx, small.net, small.optimizer)
    step = ax.step(tx, small.loss)
    mine = small.ROWS.chunk(env.world)[env.rank]
    for _ in range(2):
        state, out = step(state, mine)
    weights = {n: t.whole(p) for n, p in small.trained(state.model).items()}
    return float(out.loss), weights


def test_in_bf16_slices_compute_as_copies_do():
    """fsdp2 gathers packed weights as bytes, beside others in 16 bits."""
    ranks = testing.run(2)(lambda env: [half(env, k) for k in ("ddp", "fsdp2")])()
    for (loss, weights), (other, sliced) in ranks:
        assert abs(loss - other) < 1e-6
        assert small.gap(weights, sliced) < 1e-6
        assert small.gap(weights, small.by_hand(small.rounded("int8"), True)) > 1e-5


def differing(env, kind):
    """Each rank's own weights are packed; rank 0's are what all have then."""
    torch.manual_seed(env.rank)
    model = nn.Sequential(nn.Linear(6, 4).requires_grad_(False), nn.Linear(4, 1))
    tx = ax.chain(ax.quantize("int8"), ax.shard_model(env, kind))
    state = ax.init(tx, model, lambda m: torch.optim.SGD(m[1].parameters(), 0.1))
    return t.whole(state.model[0].weight).tolist()


def test_rank_0s_packed_weights_are_every_ranks():
    """Under ddp and fsdp2, as floats are."""
    torch.manual_seed(0)
    want = pack(nn.Linear(6, 4).weight, "int8").tolist()
    kinds = ("ddp", "fsdp2")
    ranks = testing.run(2)(lambda env: [differing(env, kind) for kind in kinds])()
    assert ranks == [[want, want]] * 2
    torch.manual_seed(1)
    assert pack(nn.Linear(6, 4).weight, "int8").tolist() != want  # the control
