"""A precision is what its name says, in every place, on every engine."""

from functools import cache

import pytest
import torch
from torch import nn

import accelx as ax
from accelx import testing
from tests.laws import training as t

pytestmark = pytest.mark.multi
each_kind = pytest.mark.parametrize("kind", t.KINDS)
HALF = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Tiny(nn.Module):
    """A model small enough for float16 on a CPU."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2)
        self.head.bias.requires_grad_(False)
        self.register_buffer("shift", torch.zeros(4))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x + self.shift))
        return self.head(x)


def tiny():
    """The same Tiny each time."""
    torch.manual_seed(0)
    return Tiny()


def placing(env, kind, precision):
    """A chain that places Tiny in a precision, in either order."""
    place = ax.identity if kind == "plain" else ax.shard_model(env, kind, "layers.*")
    return ax.chain(place, ax.with_precision(precision))


def adam(model):
    """Adam over what is trained."""
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)


def batch(env, rows=4):
    """This rank's rows of the same batch."""
    draw = torch.Generator().manual_seed(1)
    return t.part(env, [torch.randn(rows, 4, generator=draw)])


def seen(env, kind, precision):
    """The dtypes that are really there, after a step and inside it."""
    inside = {}

    def loss(model, data):
        out = model(data[0])
        inside["output"] = out.dtype
        return out.float().square().mean()

    tx = placing(env, kind, precision)
    state = ax.init(tx, tiny, adam)
    state, out = ax.grads(tx, loss)(state, batch(env))
    grads = {p.grad.dtype for p in state.model.parameters() if p.grad is not None}
    state, out = ax.apply(tx)(state, out)
    assert out.stepped
    moments = [v for s in state.optim.state.values() for v in s.values()]
    return {
        "param": {p.dtype for p in state.model.parameters() if p.requires_grad},
        "grad": grads,
        "moment": {m.dtype for m in moments if m.dim()},
        "output": {inside["output"]},
        "buffer": {state.model.shift.dtype},
        "count": {state.model.count.dtype},
    }


WANTED = {
    **{name: name for name in HALF},
    "output": ax.Precision("fp32", "bf16", output="fp32"),
    "pure": ax.Precision(param="bf16", compute="bf16", buffer="bf16"),
}


@cache
def dtypes_of(kind):
    """What each rank has seen of each precision, in one launch."""

    def rank(env):
        return {name: seen(env, kind, wanted) for name, wanted in WANTED.items()}

    return testing.run(t.ranks(kind))(rank)()


@each_kind
@pytest.mark.parametrize("name", HALF)
def test_presets_keep_weights_in_float32_and_compute_as_named(kind, name):
    """Weights, gradients and moments are float32; outputs stay in the compute dtype."""
    wide = {torch.float32}
    for dtypes in (rank[name] for rank in dtypes_of(kind)):
        assert dtypes["output"] == {HALF[name]}
        assert all(dtypes[k] == wide for k in ("param", "grad", "moment", "buffer"))
        assert dtypes["count"] == {torch.int64}


@each_kind
def test_an_output_dtype_is_what_the_loss_sees(kind):
    """Precision(output="fp32") casts what the model returns, and nothing else."""
    for dtypes in (rank["output"] for rank in dtypes_of(kind)):
        assert dtypes["output"] == {torch.float32}
        assert dtypes["param"] == {torch.float32}


@each_kind
def test_pure_bfloat16_holds_everything_in_it(kind):
    """Weights, gradients, moments and buffers; integers stay integers."""
    for dtypes in (rank["pure"] for rank in dtypes_of(kind)):
        for part in ("param", "grad", "moment", "output", "buffer"):
            assert dtypes[part] == {torch.bfloat16}, part
        assert dtypes["count"] == {torch.int64}


@each_kind
def test_bfloat16_is_autocast_to_rounding(kind):
    """The gradient is that of torch.autocast on one process; float32's is another."""

    def loss(model, data):
        return model(data[0]).float().square().mean()

    def rank(env):
        tx = placing(env, kind, "bf16")
        state = ax.init(tx, tiny, adam)
        state, _ = ax.grads(tx, loss)(state, batch(env))
        return {
            n: t.whole(p.grad)
            for n, p in state.model.named_parameters()
            if p.grad is not None
        }

    def judge(dtype):
        model = tiny()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            loss(model, batch(ax.Env())).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    half, full = judge("bf16"), judge("fp32")
    for found in testing.run(t.ranks(kind))(rank)():
        gap = max((found[n] - half[n]).abs().max() for n in half)
        size = max(g.abs().max() for g in half.values())
        assert gap < 0.01 * size
        assert not t.same(found, full)


@each_kind
def test_an_overflow_on_one_rank_skips_the_step_on_all(kind):
    """Nothing moves, neither schedule nor count; the scale halves; training goes on."""

    def loss(model, data):
        huge = 1e30 if (data[0] > 50).any() else 1.0
        return model(data[0]).float().square().mean() * huge

    def rank(env):
        asked = []

        def curve(step):
            asked.append(step)
            return 1.0

        tx = ax.chain(placing(env, kind, "fp16"), ax.clip(1.0), ax.with_schedule(curve))
        state = ax.init(tx, tiny, adam)
        before = t.weights(state.model)
        bad = [torch.zeros(4, 4)]
        bad[0][3] = 99.0  # a row of the last rank alone
        step, skipped = ax.step(tx, loss), []
        scale = state.slots["loss_scale"].scale
        del asked[:]
        state, out = step(state, t.part(env, bad))
        assert "non-finite" in out.skipped
        assert not out.stepped
        assert f"{scale / 2:g}" in out.skipped
        assert state.slots["loss_scale"].scale == scale / 2
        assert (state.step, state.skipped) == (0, 1)
        assert asked == []
        assert t.same(before, t.weights(state.model))
        for _ in range(20):  # a scale that fits is found
            state, out = step(state, batch(env))
            skipped.append(out.skipped)
        assert out.stepped
        assert state.step == 20 - sum(s is not None for s in skipped)
        assert asked == list(range(state.step))
        return state.step, state.slots["loss_scale"].scale, float(out.loss)

    found = testing.run(t.ranks(kind))(rank)()
    assert len(set(found)) == 1
    assert found[0][2] < 0.05


@each_kind
def test_a_scaled_loss_leaves_the_numbers_of_the_gradient(kind):
    """norm, clip and loss are those of the unscaled run, to half precision."""

    def loss(model, data):
        return model(data[0]).float().square().mean()

    def rank(env):
        tx = ax.chain(placing(env, kind, "fp16"), ax.accumulate(2), ax.clip(0.01))
        _state, out = ax.step(tx, loss)(ax.init(tx, tiny, adam), batch(env))
        return float(out.norm), float(out.loss), out.skipped

    model = tiny()
    value = loss(model, batch(ax.Env()))
    value.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for found in testing.run(t.ranks(kind))(rank)():
        assert found[2] is None
        assert found[0] == pytest.approx(norm.item(), rel=0.01)
        assert found[1] == pytest.approx(value.item(), rel=0.01)


@each_kind
def test_the_scale_grows_after_enough_good_steps(kind):
    """It doubles once, and counts anew."""
    from accelx.passes.with_precision import LossScale
    from accelx.state import with_slot

    def rank(env):
        tx = placing(env, kind, "fp16")
        state = with_slot(ax.init(tx, tiny, adam), "loss_scale", LossScale(8.0, 0, 3))
        scales = []
        step = ax.step(tx, lambda m, data: m(data[0]).float().square().mean())
        for _ in range(4):
            state, _ = step(state, batch(env))
            scales.append(state.slots["loss_scale"].scale)
        return scales

    assert testing.run(t.ranks(kind))(rank)() == [[8, 8, 16, 16]] * t.ranks(kind)


@each_kind
def test_a_pass_that_changes_dtypes_after_placing_is_caught(kind):
    """The real dtypes are read back, and named."""

    def place(state, tx):
        state.model.to(torch.bfloat16)
        return state

    def rank(env):
        place_it = ax.identity if kind == "plain" else ax.shard_model(env, kind)
        tx = ax.chain(
            ax.with_precision("fp32"), place_it, ax.transform("bad", place=place)
        )
        with pytest.raises(
            ax.PrecisionError, match=r"layers\.0\.weight is torch.bfloat16"
        ):
            ax.init(tx, tiny, adam)

    testing.run(t.ranks(kind))(rank)()


def test_ddp_refuses_a_reduction_dtype_that_it_cannot_have():
    """It reduces what the weights are; fsdp2 can do it, and does."""

    def rank(env):
        wanted = ax.Precision("fp32", "bf16", reduce="bf16")
        with pytest.raises(ax.PrecisionError, match=r"reduce='bf16'.*fsdp2"):
            ax.init(placing(env, "ddp", wanted), tiny, adam)
        assert seen(env, "fsdp2", wanted)["grad"] == {torch.float32}
        with pytest.raises(RuntimeError) as caught:
            normed(env)
        assert 'ignored="**.norm"' in caught.value.__notes__[0]
        normed(env, ignored="1")

    testing.run(2)(rank)()


def normed(env, **options):
    """A step in which LayerNorm is given float32: a buffer makes its rows so."""
    model = nn.Sequential(Shifted(), nn.LayerNorm(4))
    place = ax.shard_model(env, "fsdp2", **options)
    tx = ax.chain(place, ax.with_precision("bf16"))
    loss = lambda m, data: m(data[0]).square().mean()  # noqa: E731
    ax.step(tx, loss)(ax.init(tx, model, adam), batch(env))


class Shifted(nn.Linear):
    """A product, with something in float32 added to it."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x):
        return super().forward(x) + self.shift


@pytest.mark.parametrize("given", ["fp4", "half", 16, None, torch.float16])
def test_an_unknown_precision_says_which_there_are(given):
    """The four presets and the record are named, with what came."""
    with pytest.raises(ax.PrecisionError, match="'fp32', 'bf16', 'fp16'") as error:
        ax.with_precision(given)
    assert repr(given) in str(error.value)
    assert "Precision(...)" in str(error.value)
    half = given in ("half", 16, torch.float16)
    assert ('write with_precision("fp16")' in str(error.value)) == half


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"param": "fp16", "compute": "fp16"}, 'with_precision("fp16")'),
        ({"compute": "fp64"}, "Precision(param='fp64'"),
        ({"compute": "int8"}, "got 'int8'"),
        ({"output": 3}, "Precision(output='bf16')"),
    ],
)
def test_a_precision_that_cannot_work_says_why(given, words):
    """Weights in float16 and compute dtypes that torch lacks are refused at once."""
    with pytest.raises(ax.PrecisionError) as error:
        ax.with_precision(ax.Precision(**given))
    assert words in str(error.value)


def test_torchs_own_dtypes_are_understood():
    """Precision(torch.bfloat16) is Precision("bf16")."""
    tx = ax.with_precision(ax.Precision(torch.float32, torch.bfloat16))
    assert tx.find("with_precision").precision == ax.Precision("fp32", "bf16")
